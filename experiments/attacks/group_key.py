"""A server and one single member: the member hands over its group key, and the server reads every upload.

All members of a key epoch hold one key, so this is no flaw of a back end but what `encrypted` means: it
keeps the server out as long as every member keeps the key to itself. Carried out for both back ends with
the server's own stored uploads and the member's own keyring, on a federation of this process with real
sessions, key agreement and encryption. The member hands the key over while the run lasts: keys are deleted
at its end, so a run that is over, whose members were honest, is not read this way.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.client.keyring import Keyring
from fedmosaic.experiments.attacks.federation import COLLUSION
from fedmosaic.experiments.attacks.refusals.stand_in import MEMBERS, ROUNDS, configuration, run_sessions
from fedmosaic.experiments.attacks.statistics.collusion import recovery_error
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure
from fedmosaic.experiments.scenario.quiet_log import quiet_log
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, Parameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.protos.messages import Receipt, Upload, WeightRow
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

HEADLINE: Final = (
    "Encryption keeps out a server that works alone. A server that gets the group key from ONE SINGLE "
    "member reads EVERY member's upload, in every round of that key's epoch: all members of an epoch hold "
    "the same key, and no policy on weights is in the way. Against that only DP on the adapter (`dp`, "
    "`dp+encrypted`) protects"
)
_NO_POLICY: Final = AggregationPolicy(minimum_contributors=1, weight_cap=1.0, squares_cap=1.0)


class _NoNetwork:
    """A keyring asks its transport for nothing while it only reads keys from its disk."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigurationError(f"a key that is on the disk needs no {name}")


class _Leaking(InProcessTransport):
    """The line of a member that hands its keys over with every upload."""

    def __init__(self, coordinator: Coordinator, member: str, keys: Path, to: Path) -> None:
        super().__init__(coordinator, member, patience_seconds=60.0)
        self._keys, self._to = keys, to

    def push(self, upload: Upload) -> Receipt:
        """Copy the keyring, then push."""
        shutil.copytree(self._keys, self._to, dirs_exist_ok=True)
        return super().push(upload)


def group_key_results() -> list[AttackResult]:
    """Read the uploads of a stand-in's run with one member's key, for both back ends.

    Returns:
        One result, with a figure per back end.
    """
    figures = [
        Figure(
            name=f"server and 1 member that gives it the group key: {words}", value=mean, low=low, high=high
        )
        for words, errors in _of_stand_in()
        for mean, low, high in [(float(np.mean(errors)), min(errors), max(errors))]
    ]
    return [
        AttackResult(
            attack=COLLUSION,
            adversary="server and ONE member that gives it the group key",
            sees="every stored upload, and the key that this member's keyring holds",
            statistic="relative error of another member's adapter, decrypted from its upload",
            release="adapter protection `encrypted`",
            setting="product",
            figures=tuple(figures),
            headline=HEADLINE,
            note="error 0: the upload is read. Under `dp+encrypted` what is read so is the DP release",
        )
    ]


def open_upload(
    parameters: Parameters, key: GroupKey, member: str, victim: str, upload: bytes, context: RoundContext
) -> np.ndarray:
    """One upload in the clear, as a sum of that upload alone that a member decrypts without a policy.

    Args:
        parameters: of the back end.
        key: the member's group key.
        member: who gives the key away.
        victim: whose upload it is.
        upload: as the server stores it.
        context: round of the upload.
    """
    row = WeightRow((victim,), (1 << parameters.weight_bits,), parameters.weight_bits)
    (record,) = create_aggregator(parameters, _NO_POLICY).aggregate({victim: upload}, {member: row}, context)
    return np.asarray(create_cipher(parameters, member, _NO_POLICY).decrypt(record, key, context, row))


def _of_stand_in() -> Iterator[tuple[str, list[float]]]:
    for parameters in (CkksParameters(), MaskParameters()):
        with quiet_log():
            errors = _stand_in(parameters)
        yield f"a federation of {len(MEMBERS)}, {parameters.backend}", errors


def _stand_in(parameters: Parameters) -> list[float]:
    member = MEMBERS[0]
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "federation"
        federation.create(configuration(parameters), directory)
        (directory / "server/server.toml").write_text('listen = "127.0.0.1:0"\nstate_dir = "state"\n')
        settings = settings_from_kit(directory / "server").model_copy(update={"durable": False})
        coordinator = Coordinator(settings)
        keys, leaked = directory / "clients" / member / "state/keys", Path(place) / "leaked"

        def line(name: str) -> InProcessTransport:
            if name == member:
                return _Leaking(coordinator, name, keys, leaked)
            return InProcessTransport(coordinator, name, patience_seconds=60.0)

        learners, failed = run_sessions(directory, line)
        epoch = int(_last(coordinator)["key_epoch"])
        coordinator.close()
        if failed:
            raise ConfigurationError(f"the federation for the group key did not run: {'; '.join(failed)}")
        kit = federation.open_kit(directory / "clients" / member)
        key = _key(member, kit.roster, leaked, epoch)
        errors = []
        for victim in MEMBERS[1:]:
            truth = learners[victim].sections()["shared"].astype(np.float64)
            context = RoundContext(kit.roster.federation, epoch, ROUNDS, "shared", truth.size)
            upload = (directory / f"server/state/uploads/{ROUNDS:06d}/{victim}.bin").read_bytes()
            errors.append(
                recovery_error(open_upload(parameters, key, member, victim, upload, context), truth)
            )
        return errors


def _last(coordinator: Coordinator) -> Any:
    summary: Any = coordinator.summary()
    return summary["results"][-1]


def _key(member: str, roster: Roster, directory: Path, epoch: int) -> GroupKey:
    """The key from a member's own keyring, read from its disk; the signing key is not needed for that."""
    transport: Any = _NoNetwork()
    return Keyring(member, Ed25519PrivateKey.generate(), roster, transport, directory).key(epoch)
