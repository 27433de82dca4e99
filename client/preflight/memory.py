"""What a run will need of a device's memory, worked out before anything is loaded.

The model is built without weights, from its configuration alone, and one step of training is run on fake
tensors: every operation happens in shape and type only, and what would lie in memory at each moment is added
up. So the figure follows the architecture, the adapter and the settings, with no formula of its own.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.hardware import choose_device
from fedmosaic.client.model.load import adapt, empty_model
from fedmosaic.client.model.loss import training_mode
from fedmosaic.client.model.training import checkpointing
from fedmosaic.client.preflight.data import Lengths
from fedmosaic.client.profile.probe import VOCABULARY_PER_CHUNK
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ModelError

_KEPT_PER_TRAINED: Final = 3
"""AdamW's two moments, and the values before training that its report compares with."""
_NF4_BYTES: Final = 0.5 + 1.0 / 64 + 4.0 / (64 * 256)
"""Of one weight: 4 bits, 8 bits for the scale of 64, 32 bits for the scale of 256 scales."""
_CUDA_CONTEXT: Final = 600 << 20
"""Of the driver, its kernels and cuBLAS's workspace; PyTorch does not count it as its own."""
_HELD: Final = 8
"""How often each value that enters or leaves a linear module is held in float32, with much to spare."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a client needs on its device at most, by what for, and bytes that the device has.

    `weights` are the frozen model's; `training` is optimizer, gradients and activations at the most crowded
    moment of a step; `probe` its weights and pass over one example, 0 if on another device; `context` what
    the device's driver takes; `remedies` would make it less, by setting.
    """

    device: str
    weights: int
    adapter: int
    training: int
    probe: int
    context: int
    free: int
    total: int
    remedies: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes at the most crowded moment: training and probing take turns."""
        return self.weights + self.adapter + max(self.training, self.probe) + self.context

    @property
    def fits(self) -> bool:
        """Whether that much is free now."""
        return self.needed <= self.free

    def words(self) -> str:
        """The figures in a line, and what to change where they do not fit."""
        parts = {"weights": self.weights, "adapter": self.adapter, "training step": self.training}
        parts |= {"probe": self.probe, "driver": self.context}
        shown = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
        line = f"memory on {self.device}: {_mib(self.needed)} needed, {_mib(self.free)} free ({shown})"
        if self.fits or not self.remedies:
            return line
        return f"{line}; change {', or '.join(self.remedies)}"


def check_memory(
    settings: ClientSettings, adapter: AdapterTerms, lengths: Lengths | None = None
) -> tuple[str, bool]:
    """What a client needs against what its device has, in words, and whether it fits now.

    Without the lengths of the examples, the longest that the settings allow are assumed, a quarter of it
    learned. ModelError if the weights alone are more than the device has, or as of `memory_need`.
    """
    device = choose_device(settings.model.device)
    free, _ = free_memory(device)
    longest = min(lengths.longest, settings.training.max_length) if lengths else 0
    most = most_bytes(settings, adapter.rank, longest or settings.training.max_length)
    if 2 * most < free:
        # Not worth the seconds that the rest takes.
        return f"memory on {device}: below {_mib(most)} needed, {_mib(free)} free", True
    supervised = settings.training.per_device_train_batch_size * lengths.learned if lengths else 0
    need = memory_need(settings, adapter, longest=longest, supervised=min(supervised, longest))
    if need.weights > need.total:
        raise ModelError(f"the model cannot be loaded; {need.words()}")
    return need.words(), need.fits


def most_bytes(settings: ClientSettings, rank: int, longest: int) -> int:
    """More bytes than a client needs whose longest example has `longest` tokens, counted in a moment."""
    tokens = settings.training.per_device_train_batch_size * longest
    total = _CUDA_CONTEXT
    for named, positions in ((settings.model, tokens), (settings.probe, settings.profile_max_length)):
        model = empty_model(named)
        config = model.config.get_text_config()
        # Weights of attention, too, where it is not the fused one; and two values of the adapter per rank.
        width = config.num_hidden_layers * config.num_attention_heads * positions
        linear = (module for module in model.modules() if isinstance(module, nn.Linear))
        width += sum(module.in_features + module.out_features for module in linear)
        weights = sum(tensor.nbytes for _, tensor in _tensors(model))
        total += 2 * weights + 4 * _HELD * (positions + 2 * rank) * width
    return total


def memory_need(
    settings: ClientSettings, adapter: AdapterTerms, *, longest: int = 0, supervised: int = 0
) -> MemoryNeed:
    """Work out what a client needs. No weight is read, and nothing is put on the device.

    The longest example has `longest` tokens, by default all that are allowed; a batch has at most
    `supervised` answer tokens, by default a quarter of that. ModelError if a configuration cannot be read,
    the model cannot carry the adapter, or the device is not there.
    """
    device = choose_device(settings.model.device)
    training = settings.training
    model = adapt(empty_model(settings.model), adapter_config(settings.model, adapter))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    length = longest or training.max_length
    shape = training.per_device_train_batch_size, length
    work = _TrainingStep(model, shape, supervised or max(1, length // 4), training.bf16)
    with training_mode(model, True), checkpointing(model, training.gradient_checkpointing):
        step = _peak(work)
    if settings.model.quantization is not None:
        # A product in 4 bits unpacks the weight of its layer first.
        step += max(weight.nbytes for weight in _packed(model))
    probe = 0
    if choose_device(settings.probe.device) == device:
        bare = empty_model(settings.probe)
        probe = weight_bytes(bare, settings.probe) + _peak(_ProbePass(bare, settings.profile_max_length))
    free, total = free_memory(device)
    return MemoryNeed(
        device=str(device),
        weights=weight_bytes(model, settings.model),
        adapter=sum(tensor.nbytes for name, tensor in _tensors(model) if "colora_" in name),
        training=_KEPT_PER_TRAINED * trained + step,
        probe=probe,
        context=_CUDA_CONTEXT if device.type == "cuda" else 0,
        free=free,
        total=total,
        remedies=_remedies(settings),
    )


def weight_bytes(model: nn.Module, settings: ModelSettings) -> int:
    """Bytes of the frozen weights of a model on `meta`, without an adapter; packed into 4 bits if asked."""
    size = sum(tensor.nbytes for name, tensor in _tensors(model) if "colora_" not in name)
    if settings.quantization is None:
        return size
    return round(size + sum(_NF4_BYTES * weight.numel() - weight.nbytes for weight in _packed(model)))


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that a device has free now, and in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    if device.type == "mps":
        total = int(torch.mps.recommended_max_memory())
        return total - int(torch.mps.driver_allocated_memory()), total
    memory = psutil.virtual_memory()
    return memory.available, memory.total


class _TrainingStep(nn.Module):
    """Forward and backward as `train_local` does them; a module, so that its tensors can be replaced."""

    def __init__(self, model: nn.Module, shape: tuple[int, int], supervised: int, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._shape, self._supervised, self._bf16 = shape, supervised, bf16

    def forward(self) -> object:
        ids_BT = torch.zeros(self._shape, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16) if self._bf16 else nullcontext():
            logits_BKV = self.model(
                input_ids=ids_BT, use_cache=False, logits_to_keep=torch.arange(self._supervised)
            ).logits[:, : self._supervised]
            targets_BK = torch.zeros(logits_BKV.shape[:2], dtype=torch.int64)
            loss = nn.functional.cross_entropy(logits_BKV.flatten(0, 1).float(), targets_BK.flatten())
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # While the replaced tensors are in place: recomputed activations need them too.
        return torch.autograd.grad(loss, trained, allow_unused=True)


class _ProbePass(nn.Module):
    """One example through a probe's decoder, and its positions through a chunk of the head."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model = model
        self._length = length

    def forward(self) -> object:
        with torch.no_grad():
            hidden = self.model.get_decoder()(
                input_ids=torch.zeros((1, self._length), dtype=torch.int64), use_cache=False
            ).last_hidden_state
            chunk = hidden.new_empty((VOCABULARY_PER_CHUNK, hidden.shape[-1]), dtype=torch.float32)
            return (hidden[0].float() @ chunk.T).exp() @ chunk


class _Meter(TorchDispatchMode):
    """Adds up the storages that come into being, and takes them off when they go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.held = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        produced = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(produced):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._drop, storage.nbytes())
        return produced

    def _drop(self, size: int) -> None:
        self.held -= size


def _peak(work: nn.Module) -> int:
    with FakeTensorMode():
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in _tensors(work)
        }
        with _Meter() as meter:
            torch.func.functional_call(work, tensors, ())
    return int(meter.peak)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _packed(model: nn.Module) -> list[torch.Tensor]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # nn.Module hides it
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "colora_" not in name
    ]


def _remedies(settings: ClientSettings) -> tuple[str, ...]:
    model, training = settings.model, settings.training
    possible = {
        "model.dtype = 'bfloat16' (half the weights)": model.dtype == "float32",
        "model.quantization = 'nf4' (a quarter of bfloat16's)": not (model.quantization or model.gguf_file),
        "training.gradient_checkpointing = true": not training.gradient_checkpointing,
        "training.per_device_train_batch_size lower and gradient_accumulation_steps higher": (
            training.per_device_train_batch_size > 1
        ),
        f"training.max_length below {training.max_length}": True,
    }
    return tuple(words for words, useful in possible.items() if useful)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
