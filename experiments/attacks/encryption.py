"""What encryption does not keep out: a member that hands over its key, and a sum of another row than is told.

All members of a key epoch hold one key, so the first is no flaw of a back end but what `encrypted` means.
Keys are deleted at the end of a run: one that is over, whose members were honest, is not read this way. As to
the second, a back end either binds the sum to the row, or the server's word has to be taken for it.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.client.round.keyring import Keyring
from fedmosaic.experiments.attacks.federation import COLLUSION
from fedmosaic.experiments.attacks.refusals.stand_in import MEMBERS, ROUNDS, founded, run_sessions
from fedmosaic.experiments.attacks.statistics.collusion import recovery_error
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure
from fedmosaic.experiments.scenario.quiet_log import quiet_log
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, Parameters
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.groupkey.key import GroupKey, commitment_to
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError
from fedmosaic.protos.messages import Receipt, Upload, WeightRow
from fedmosaic.server.coordinator import Coordinator

_BACK_ENDS: Final[tuple[CkksParameters | MaskParameters, ...]] = (CkksParameters(), MaskParameters())
_NO_POLICY: Final = AggregationPolicy(minimum_contributors=1, weight_cap=1.0, squares_cap=1.0)
_SIZE: Final = 272


class _Leaking(InProcessTransport):
    """The line of a member that hands its keys over with every upload."""

    def __init__(self, coordinator: Coordinator, member: str, keys: Path, to: Path) -> None:
        super().__init__(coordinator, member, patience_seconds=60.0)
        self._keys, self._to = keys, to

    def push(self, upload: Upload) -> Receipt:
        """Copy the keyring, then push."""
        shutil.copytree(self._keys, self._to, dirs_exist_ok=True)
        return super().push(upload)


def group_key_result() -> AttackResult:
    """Read the uploads of a stand-in's run with one member's key, for both back ends."""
    with quiet_log():
        figures = [
            Figure.spread(
                "server and 1 member that gives it the group key: "
                f"a federation of {len(MEMBERS)}, {parameters.backend}",
                _errors_with_a_key(parameters),
            )
            for parameters in _BACK_ENDS
        ]
    return AttackResult(
        attack=COLLUSION,
        adversary="server and ONE member that gives it the group key",
        sees="every stored upload, and the key that this member's keyring holds",
        statistic="relative error of another member's adapter, decrypted from its upload",
        release="adapter protection `encrypted`",
        setting="product",
        figures=tuple(figures),
        headline="Encryption keeps out a server that works alone. A server that gets the group key from "
        "ONE SINGLE member reads EVERY member's upload, in every round of that key's epoch: all members of "
        "an epoch hold the same key, and no policy on weights is in the way. Against that only DP on the "
        "adapter (`dp`, `dp+encrypted`) protects",
        note="error 0: the upload is read. Under `dp+encrypted` what is read so is the DP release",
    )


def open_upload(
    parameters: Parameters, key: GroupKey, member: str, victim: str, upload: bytes, context: RoundContext
) -> np.ndarray:
    """A stored upload in the clear, as a sum of that upload alone that a member decrypts without a policy."""
    row = WeightRow((victim,), (1 << parameters.weight_bits,), parameters.weight_bits)
    (record,) = create_aggregator(parameters, _NO_POLICY).aggregate({victim: upload}, {member: row}, context)
    return np.asarray(create_cipher(parameters, member, _NO_POLICY).decrypt(record, key, context, row))


def _errors_with_a_key(parameters: Parameters) -> list[float]:
    """Relative error of every other member's adapter, read with the first one's key."""
    member = MEMBERS[0]
    with founded(parameters) as (directory, coordinator):
        keys, leaked = directory / "clients" / member / "state/keys", directory / "leaked"

        def line(name: str) -> InProcessTransport:
            if name == member:
                return _Leaking(coordinator, name, keys, leaked)
            return InProcessTransport(coordinator, name, patience_seconds=60.0)

        learners, failed = run_sessions(directory, line)
        if failed:
            raise ConfigurationError(f"the federation for the group key did not run: {'; '.join(failed)}")
        summary: Any = coordinator.summary()
        epoch = int(summary["results"][-1]["key_epoch"])
        roster = open_kit(directory / "clients" / member).roster
        # The member's own keyring, read from its disk; the signing key is not needed for that.
        keyring = Keyring(member, Ed25519PrivateKey.generate(), roster, line(MEMBERS[1]), leaked)
        key, errors = keyring.key(epoch), []
        for victim in MEMBERS[1:]:
            truth = learners[victim].sections()["shared"].astype(np.float64)
            context = RoundContext(roster.federation, epoch, ROUNDS, "shared", truth.size)
            upload = (directory / f"server/state/uploads/{ROUNDS:06d}/{victim}.bin").read_bytes()
            found = open_upload(parameters, key, member, victim, upload, context)
            errors.append(recovery_error(found, truth))
        return errors


def fresh_key(parameters: Parameters, members: tuple[str, ...] = MEMBERS) -> GroupKey:
    """A group key that nobody agreed on."""
    transcript, master, secret = bytes(32), os.urandom(32), generate_group_secret(parameters)
    fingerprint = commitment_to(transcript, master, secret)
    return GroupKey("attempts", 1, members, parameters.digest(), transcript, fingerprint, master, secret)


def claimed_row_result(policy: AggregationPolicy, seed: int) -> AttackResult:
    """Send the sum of a one-hot row under an honest one that keeps the policy, with both back ends."""
    found = {each.backend: _sum_of_another_row(each, policy, seed) for each in _BACK_ENDS}
    figures = [
        Figure.exact(f"back end {name}, a sum of one member under an honest row", error)
        for name, (error, _) in found.items()
    ]
    return AttackResult(
        attack=COLLUSION,
        adversary="malicious server, for the benefit of a recipient",
        sees="(the recipient) its aggregate, decrypted",
        statistic="relative error of the victim's adapter in what the recipient decrypts",
        release="the row told is not the row summed with",
        setting="product",
        figures=tuple(figures),
        note="error 0: the recipient reads the victim's adapter, although the row that it checked keeps the "
        "policy; error 1: refused. Under ckks the server has to be trusted to sum with the rows it tells. "
        + "; ".join(f"{name}: {answer}" for name, (_, answer) in found.items()),
    )


def _sum_of_another_row(parameters: Parameters, policy: AggregationPolicy, seed: int) -> tuple[float, str]:
    generator = np.random.default_rng(seed)
    adapters = {name: generator.normal(0, 0.3, _SIZE) for name in MEMBERS}
    context, key = RoundContext("attempts", 1, 1, "shared", _SIZE), fresh_key(parameters)
    ciphers = {name: create_cipher(parameters, name, policy, allow_plaintext=False) for name in MEMBERS}
    uploads = {
        name: ciphers[name].encrypt(vector, key, context, os.urandom(16)) for name, vector in adapters.items()
    }
    recipient, *others = MEMBERS
    total = 1 << parameters.weight_bits
    honest, single = (
        WeightRow(tuple(others), weights, parameters.weight_bits)
        for weights in ((total // 4,) * 4, (total, 0, 0, 0))
    )
    server = create_aggregator(parameters, _NO_POLICY)
    told, summed = (
        bytes(server.aggregate(uploads, {recipient: row}, context)[0]) for row in (honest, single)
    )
    # Everything that names the row is the honest one's; only the numbers of the sum are the other's.
    numbers = _SIZE * 4 if parameters.backend == "mask" else len(told) - HEADER_BYTES
    forged = told[:-numbers] + summed[-numbers:]
    try:
        found = ciphers[recipient].decrypt(forged, key, context, honest)
    except FedMosaicError as error:
        return 1.0, f"refused ({error})"
    return recovery_error(np.asarray(found), adapters[others[0]]), "accepted"
