"""What a client's model is compared with before anything is trained, charged or sent."""

from collections.abc import Callable
from typing import Any

import pytest

from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.progress import Progress
from fedmosaic.protos.errors import ConfigurationError


def test_a_family_vector_of_another_length_than_agreed_is_refused_with_its_length(
    leave: Callable[..., Any],
) -> None:
    left = leave("llama", "none", "llama")
    size = left.terms.adapter.family_dimensions["llama"]
    longer = left.terms.adapter.model_copy(update={"family_dimensions": {"llama": size + 1}})
    terms = left.terms.model_copy(update={"adapter": longer})
    with pytest.raises(ConfigurationError, match=f"shares {size + 1:,} .* has {size:,}.*'llama' = {size}"):
        ModelLearner(left.settings, terms, "llama", Progress())
