"""A model that a caller in Python has loaded: tried as one that is loaded here."""

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.model.acceptance import check_language_model
from fedmosaic.client.model.hardware import exact_products
from fedmosaic.client.model.load import LoadedModel, keep_way_back, model_class, set_padding
from fedmosaic.protos.errors import ModelError


def accept_model(model: Any, tokenizer: Any) -> LoadedModel:
    """Try a model and tokenizer that a caller has loaded, as `load_base_model` tries what it loads.

    Args:
        model: causal language model of transformers, on its device and in its type, without adapters. Only
            its ids for padding are set, if they are not.
        tokenizer: of the model; a copy is given back, the caller's stays as it is.

    Raises:
        ModelError: as `load_base_model`; or the model carries adapters, or is none of transformers.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"model is a {type(model).__name__} and tokenizer a {type(tokenizer).__name__}; hand over a "
            "model of transformers, bare, without PEFT around it, and its tokenizer"
        )
    source = model.name_or_path or type(model).__name__
    if getattr(model, "peft_config", None) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ModelError(
            f"the model {source!r} carries adapters already, and training would go through them; load it "
            "anew, or merge_and_unload() them first. A model that took part carries its adapter"
        )
    exact_products()
    model_class(model.config)
    find_decoder_layers(model)
    own = copy.deepcopy(tokenizer)
    set_padding(source, model, own)
    keep_way_back(model)
    check_language_model(source, model, own)
    return model, own
