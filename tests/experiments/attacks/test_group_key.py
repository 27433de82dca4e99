"""One member's key and the server's stored uploads: every upload is read."""

from typing import Any

import numpy as np
import pytest

from fedmosaic.experiments.attacks.group_key import group_key_results, open_upload
from fedmosaic.experiments.attacks.report import markdown
from fedmosaic.experiments.attacks.statistics.results import AttackReport
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey, commitment_to
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import FedMosaicError


def test_the_key_of_one_member_opens_every_other_upload_of_both_back_ends() -> None:
    (result,) = group_key_results()
    ckks, mask = result.figures
    assert ckks.name.startswith("server and 1 member that gives it the group key")
    assert "ckks" in ckks.name
    assert "mask" in mask.name
    for figure in result.figures:
        assert figure.high < 1e-3
    page = markdown(AttackReport(run="r", created="", seconds=1.0, command="", machine="", results=(result,)))
    assert page.index("ONE SINGLE member reads EVERY member's upload") < page.index("| release |")


@pytest.mark.parametrize("parameters", [CkksParameters(), MaskParameters()])
def test_without_the_epochs_key_an_upload_stays_closed(parameters: Any) -> None:
    """The control: what opens an upload is the key, and not how it is asked for."""

    def key() -> GroupKey:
        transcript, master, secret = (
            bytes(32),
            np.random.default_rng().bytes(32),
            generate_group_secret(parameters),
        )
        fingerprint = commitment_to(transcript, master, secret)
        return GroupKey("f", 1, ("a", "b"), parameters.digest(), transcript, fingerprint, master, secret)

    context, right = RoundContext("f", 1, 1, "shared", 64), key()
    vector = np.linspace(-1, 1, 64)
    cipher = create_cipher(parameters, "b", AggregationPolicy())
    upload = cipher.encrypt(vector, right, context, bytes(16))
    np.testing.assert_allclose(open_upload(parameters, right, "a", "b", upload, context), vector, atol=1e-4)
    with pytest.raises(FedMosaicError):
        open_upload(parameters, key(), "a", "b", upload, context)
