"""One member's key opens every upload the server stored; ckks sums with another row than is told."""

from typing import Any

import numpy as np
import pytest

from fedmosaic.experiments.attacks.encryption import (
    claimed_row_result,
    fresh_key,
    group_key_result,
    open_upload,
)
from fedmosaic.experiments.attacks.report import markdown
from fedmosaic.experiments.attacks.statistics.results import AttackReport
from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import FedMosaicError


def test_the_key_of_one_member_opens_every_other_upload_of_both_back_ends() -> None:
    result = group_key_result()
    ckks, mask = result.figures
    assert ckks.name.startswith("server and 1 member that gives it the group key")
    assert "ckks" in ckks.name
    assert "mask" in mask.name
    assert max(ckks.high, mask.high) < 1e-3
    page = markdown(AttackReport(run="r", created="", seconds=1.0, command="", machine="", results=(result,)))
    assert page.index("ONE SINGLE member reads EVERY member's upload") < page.index("| release |")


@pytest.mark.parametrize("parameters", [CkksParameters(), MaskParameters()])
def test_without_the_epochs_key_an_upload_stays_closed(parameters: Any) -> None:
    """The control: what opens an upload is the key, and not how it is asked for."""
    context, right = RoundContext("attempts", 1, 1, "shared", 64), fresh_key(parameters, ("a", "b"))
    vector = np.linspace(-1, 1, 64)
    cipher = create_cipher(parameters, "b", AggregationPolicy())
    upload = cipher.encrypt(vector, right, context, bytes(16))
    np.testing.assert_allclose(open_upload(parameters, right, "a", "b", upload, context), vector, atol=1e-4)
    with pytest.raises(FedMosaicError):
        open_upload(parameters, fresh_key(parameters, ("a", "b")), "a", "b", upload, context)


def test_mask_binds_a_sum_to_its_row_and_ckks_does_not() -> None:
    """A known limit, told in docs/encryption.md; should ckks ever refuse, both have to change."""
    result = claimed_row_result(AggregationPolicy(), 0)
    ckks, mask = result.figures
    assert "ckks" in ckks.name
    assert ckks.value < 1e-4
    assert mask.value == 1.0
    assert "mask: refused" in result.note
