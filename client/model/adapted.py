"""A base model with a fresh adapter of the agreed shape on it."""

import math
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora import CoLoraConfig, shared_layout
from fedmosaic.client.colora.aligned import aligned_config, basis_name, embedded_layout, load_basis
from fedmosaic.client.colora.vectors import SharedLayout
from fedmosaic.client.model.acceptance import check_adapter
from fedmosaic.client.model.load import LoadedModel, adapt, load_model
from fedmosaic.client.settings import ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ModelError


def load_adapted(
    settings: ModelSettings, adapter: AdapterTerms, base: LoadedModel | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a base model, or take one that was accepted, and put a fresh adapter of the agreed shape into it.

    Raises:
        ModelError: the model cannot be loaded, lacks modules that the adapter needs or never calls them, or
            is aligned to another basis than the roster's; see `fedmosaic.client.model.acceptance`.
    """
    _check_basis(settings, adapter)
    bare, tokenizer = base or load_model(settings)
    model = adapt(bare, adapter_config(settings, adapter))
    if settings.aligned is not None:
        load_basis(model, settings.aligned)
    size = agreed_layout(model, adapter).size
    if size != adapter.shared_dimensions:
        raise ModelError(
            f"{settings.path} gives a shared adapter of {size} values, the roster says "
            f"{adapter.shared_dimensions}; it lacks some of the {adapter.blocks} blocks of modules "
            f"{', '.join(adapter.target_modules)}"
        )
    check_adapter(model, tokenizer)
    return model, tokenizer


def _check_basis(settings: ModelSettings, adapter: AdapterTerms) -> None:
    if settings.aligned is None:
        if adapter.basis:
            raise ModelError(
                f"the roster's basis is {adapter.basis}, but no aligned checkpoint is named for "
                f"{settings.path}; name what `fedmosaic align` wrote for this model in model.aligned"
            )
        return
    found = basis_name(settings.aligned)
    if found != adapter.basis_name:
        raise ModelError(
            f"the checkpoint {settings.aligned} has the basis {found}, the roster's is {adapter.basis_name}: "
            "a core means something else there; take the checkpoint of the federation's own alignment"
        )


def adapter_config(settings: ModelSettings, adapter: AdapterTerms) -> CoLoraConfig:
    """The configuration of a fresh adapter of the agreed shape, on the basis that the settings name.

    Raises:
        ModelError: the settings ask for a higher rank than the federation's, or a lower one in group sums; an
            aligned checkpoint's cores are not on the last layers where the terms say so.
    """
    common: dict[str, Any] = {"other_layers": adapter.other_layers, "personal_branch": adapter.private}
    common["basis_seed"] = adapter.basis_seed
    if settings.aligned is None:
        return CoLoraConfig(
            r=adapter.rank,
            alpha=adapter.alpha,
            blocks=adapter.blocks,
            layer_rule=adapter.layer_rule,
            target_modules=list(adapter.target_modules),
            **common,
        )
    rank = settings.rank or adapter.rank
    if rank > adapter.rank:
        raise ModelError(f"model.rank is {rank}, the federation's is {adapter.rank}; take at most that")
    if adapter.in_group_sums and rank < adapter.rank:
        raise ModelError(
            f"model.rank is {rank}, the federation's is {adapter.rank}: sums of groups are of vectors of one "
            "length, so take the federation's, or leave rank out"
        )
    # The scale s = α/r is the federation's at every rank.
    scale = adapter.alpha / adapter.rank
    config = aligned_config(settings.aligned, rank=rank, alpha=scale * rank, **common)
    # Other rules say nothing of an aligned checkpoint, whose layers may be paired by their likeness.
    layers, depth = config.shared_layers, config.model_depth or 0
    if adapter.layer_rule == "late" and layers != [*range(depth - adapter.blocks, depth)]:
        raise ModelError(
            f"the checkpoint {settings.aligned} has its cores on layers {layers} of {depth}, the roster's "
            f"layer_rule 'late' wants the last {adapter.blocks}; take the checkpoint that `fedmosaic align "
            "--layer-rule late` wrote for the federation"
        )
    return config


def agreed_layout(model: nn.Module, adapter: AdapterTerms) -> SharedLayout:
    """The layout of what the model shares, at the federation's rank."""
    wide = embedded_layout(shared_layout(model), adapter.rank)
    # Only the last bit of α can be lost on the way to another rank and back.
    same = math.isclose(wide.alpha, adapter.alpha, rel_tol=1e-12)
    return replace(wide, alpha=adapter.alpha) if same else wide
