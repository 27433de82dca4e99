"""Which adapters fit the terms, told before a model is loaded."""

import pytest

from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.settings import ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ModelError


def test_a_lower_rank_takes_no_part_in_group_sums() -> None:
    settings = ModelSettings(path="model", aligned="aligned", rank=4)
    with pytest.raises(ModelError, match="vectors of one length"):
        adapter_config(settings, AdapterTerms(rank=8, protection="distributed-dp"))
