"""A server that says one weight row and sums with another: what the recipient's own check is worth.

The recipient checks the row that it is told. Whether the sum was made with that row is another matter: a back
end either binds the sum to the row, or the server's word has to be taken for it. Here the server tells an
honest row and sends a sum that holds one single member's adapter.
"""

import os
from typing import Any, Final

import numpy as np

from fedmosaic.experiments.attacks.federation import COLLUSION
from fedmosaic.experiments.attacks.statistics.collusion import recovery_error
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey, commitment_to
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.protos.messages import WeightRow

_MEMBERS: Final = ("ada", "ben", "cid", "dee", "eva")
_SIZE: Final = 272
_NO_POLICY: Final = AggregationPolicy(minimum_contributors=1, weight_cap=1.0, squares_cap=1.0)


def claimed_row_result(policy: AggregationPolicy, seed: int) -> AttackResult:
    """Send the sum of a one-hot row under an honest one, with both encrypted back ends.

    Args:
        policy: what the recipient enforces on the row that it is told.
        seed: of the adapters.
    """
    figures = []
    answers = []
    for parameters in (CkksParameters(), MaskParameters()):
        error, answer = _attempt(parameters, policy, seed)
        name = f"back end {parameters.backend}, a sum of one member under an honest row"
        figures.append(Figure(name=name, value=error, low=error, high=error))
        answers.append(f"{parameters.backend}: {answer}")
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
        + "; ".join(answers),
    )


def _attempt(parameters: Any, policy: AggregationPolicy, seed: int) -> tuple[float, str]:
    generator = np.random.default_rng(seed)
    adapters = {name: generator.normal(0, 0.3, _SIZE) for name in _MEMBERS}
    context = RoundContext("attempts", 1, 1, "shared", _SIZE)
    key = _key(parameters)
    uploads = {
        name: create_cipher(parameters, name, policy, allow_plaintext=False).encrypt(
            vector, key, context, os.urandom(16)
        )
        for name, vector in adapters.items()
    }
    recipient, victim, *rest = _MEMBERS
    total = 1 << parameters.weight_bits
    honest = WeightRow((victim, *rest), (total // 4,) * 4, parameters.weight_bits)
    single = WeightRow((victim, *rest), (total, 0, 0, 0), parameters.weight_bits)
    server = create_aggregator(parameters, _NO_POLICY)
    told = bytes(server.aggregate(uploads, {recipient: honest}, context)[0])
    summed = bytes(server.aggregate(uploads, {recipient: single}, context)[0])
    # Everything that names the row is the honest one's; only the numbers of the sum are the other's.
    numbers = _SIZE * 4 if parameters.backend == "mask" else len(told) - HEADER_BYTES
    forged = told[:-numbers] + summed[-numbers:]
    cipher = create_cipher(parameters, recipient, policy, allow_plaintext=False)
    try:
        found = cipher.decrypt(forged, key, context, honest)
    except FedMosaicError as error:
        return 1.0, f"refused ({error})"
    return recovery_error(np.asarray(found), adapters[victim]), "accepted"


def _key(parameters: Any) -> GroupKey:
    transcript, master, secret = bytes(32), os.urandom(32), generate_group_secret(parameters)
    fingerprint = commitment_to(transcript, master, secret)
    return GroupKey("attempts", 1, _MEMBERS, parameters.digest(), transcript, fingerprint, master, secret)
