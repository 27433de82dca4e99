"""Which linear modules of a model carry Co-LoRA, and which carry ordinary LoRA.

Co-LoRA sits on the last layer of each of N_B blocks of equal relative depth, so that block k of a
shallow model pairs with block k of a deep one. All other layers are "family" layers: their tensors
fit clients of the same architecture only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fedmosaic.protos.errors import ConfigurationError, ModelError

LAYER_RULES = ("relative_depth", "authors", "first", "late")
_LAYER_LIST_NAMES = frozenset({"layers", "h", "blocks"})
_NOT_LANGUAGE = frozenset(
    "vision_tower vision_model vision_encoder image_encoder visual audio_tower multi_modal_projector "
    "mm_projector".split()
)


@dataclass(frozen=True)
class Placement:
    """Where one adapted linear module sits.

    Attributes:
        name: Full module name in the base model, such as `model.layers.3.self_attn.q_proj`.
        module: Name within the decoder layer, such as `self_attn.q_proj`; equal across widths.
        layer: Index of the decoder layer, 0-based.
        block: Index of the relative-depth block of a Co-LoRA layer, 0-based; None on family layers.
    """

    name: str
    module: str
    layer: int
    block: int | None

    @property
    def kind(self) -> Literal["shared", "family"]:
        """`shared` for a Co-LoRA module, `family` for one with ordinary LoRA."""
        return "family" if self.block is None else "shared"


def target_layers(depth: int, blocks: int, rule: str = "relative_depth") -> tuple[int, ...]:
    """Return the decoder layer, 0-based, of each of N_B `blocks`, strictly increasing.

    `relative_depth` takes the layer whose end is nearest to k/N_B of the depth (halves go deeper), `authors`
    k·⌊depth/N_B⌋ − 1 with the last block at the last layer, `late` the last N_B layers, `first` the first
    N_B: for comparison only. ConfigurationError for no block or an unknown rule; ModelError with fewer layers
    than blocks.

    Reference: arXiv 2506.11024, "block-wise aggregation"; `get_target_layers` in the authors' code.
    """
    if blocks < 1:
        raise ConfigurationError(f"blocks is {blocks}; Co-LoRA needs at least 1 block.")
    if rule not in LAYER_RULES:
        raise ConfigurationError(f"layer_rule is {rule!r}; choose one of {', '.join(LAYER_RULES)}.")
    if depth < blocks:
        raise ModelError(
            f"The model has {depth} decoder layers, fewer than the {blocks} blocks of the federation. "
            f"Use at most {depth} blocks, or a deeper model for this client."
        )
    if rule == "first":
        return tuple(range(blocks))
    if rule == "late":
        return tuple(range(depth - blocks, depth))
    if rule == "authors":
        step = depth // blocks
        return (*(k * step - 1 for k in range(1, blocks)), depth - 1)
    return tuple((2 * k * depth + blocks) // (2 * blocks) - 1 for k in range(1, blocks + 1))


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Full name and stack of decoder layers of a language model or of a LLaVA-style model's language part.

    The model is one of transformers, or any module with one list of layers named `layers`, `h` or `blocks`
    outside vision and audio towers; a ModelError lists what is there if none or more than one fits.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text_config, "num_hidden_layers", None)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model  # some models call their output head so
    inside_decoder = {id(module) for module in decoder.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside_decoder
    }
    fitting = {
        name: module
        for name, module in found.items()
        if not _NOT_LANGUAGE.intersection(name.split("."))
        and (len(module) == depth if isinstance(depth, int) else name.rpartition(".")[2] in _LAYER_LIST_NAMES)
    }
    # A layer may hold lists of its own (experts); only the outermost list is the stack.
    outermost = [
        name
        for name in fitting
        if not any(name.startswith(f"{other}.") for other in fitting if other != name)
    ]
    if len(outermost) != 1:
        lists = ", ".join(f"{name} ({len(module)})" for name, module in found.items()) or "none"
        raise ModelError(
            f"{type(model).__name__} should have exactly one list of decoder layers"
            f"{f' of length {depth}' if isinstance(depth, int) else ''}, found {len(outermost)}. "
            f"Module lists in the model, with lengths: {lists}."
        )
    return outermost[0], fitting[outermost[0]]


def linear_names(layer: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """List the linear modules of one decoder layer, sorted, adapters' own parts left out."""
    names: list[str] = []
    for child_name, child in layer.named_children():
        name = f"{prefix}{child_name}"
        adaptable = isinstance(child, nn.Linear) or hasattr(child, "base_layer")
        names += [name] if adaptable else linear_names(child, f"{name}.")
    return tuple(sorted(names))


def select_modules(available: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Choose modules of a decoder layer, sorted, by names or last parts such as `q_proj`; None for all."""
    if not available:
        raise ModelError(
            "The decoder layers have no torch.nn.Linear module to adapt; Co-LoRA supports only those."
        )
    if wanted is None:
        return tuple(sorted(available))
    fitting = {want: [n for n in available if n == want or n.endswith(f".{want}")] for want in wanted}
    unknown = [want for want, names in fitting.items() if not names]
    if unknown or not wanted:
        raise ModelError(
            f"target_modules {unknown or list(wanted)!r} name no linear module of a decoder layer. "
            f"Linear modules there: {', '.join(sorted(available))}."
        )
    return tuple(sorted({name for names in fitting.values() for name in names}))


def plan_placements(
    model: nn.Module,
    shared_layers: Sequence[int],
    target_modules: Sequence[str] | None,
    *,
    family: bool,
) -> Mapping[str, Placement]:
    """Say where every adapted module sits, by full module name; ModelError if that is nowhere.

    `shared_layers` are the Co-LoRA layers, strictly increasing, one per block; `target_modules` are names
    within a layer, None for all; `family` is whether the other layers carry ordinary LoRA. The model may
    already carry other adapters.
    """
    prefix, layers = find_decoder_layers(model)
    if not shared_layers or list(shared_layers) != sorted(set(shared_layers)):
        raise ModelError(f"shared_layers {list(shared_layers)} should be strictly increasing and not empty.")
    if shared_layers[0] < 0 or shared_layers[-1] >= len(layers):
        raise ModelError(
            f"shared_layers {list(shared_layers)} lie outside the model, which has layers 0 to "
            f"{len(layers) - 1}."
        )
    present = [set(linear_names(layer)) for layer in layers]
    chosen = select_modules(tuple({name for names in present for name in names}), target_modules)
    plan: dict[str, Placement] = {}
    for index, names in enumerate(present):
        block = list(shared_layers).index(index) if index in shared_layers else None
        if block is not None and not names.issuperset(chosen):
            common = sorted(set.intersection(*(present[shared] for shared in shared_layers)))
            lacking = [module for module in chosen if module not in names]
            raise ModelError(
                f"Layer {index} should carry Co-LoRA but lacks {', '.join(lacking)}; all Co-LoRA layers need "
                "the same modules. Leave those out of target_modules (in a federation, of terms.adapter): "
                f"all {len(shared_layers)} layers have {', '.join(common) or 'none, so it cannot take part'}."
            )
        for module in chosen if family or block is not None else ():
            if module in names:
                name = f"{prefix}.{index}.{module}"
                plan[name] = Placement(name=name, module=module, layer=index, block=block)
    return plan
