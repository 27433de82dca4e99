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
_SMALL: Final = 500
"""How often a model's weights fit into what is free where it is not worth a second to work out the rest."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes needed by what for, training or probe at their most crowded, what is there, and remedies."""

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
    """Need against what the device has, in words, and whether it fits; ModelError if weights alone do not."""
    device = choose_device(settings.model.device)
    free, _ = free_memory(device)
    weights = weight_bytes(empty_model(settings.model), settings.model)
    if _SMALL * weights < free:
        return f"{_mib(weights)} of weights, {_mib(free)} free on {device}", True
    longest = min(lengths.longest, settings.training.max_length) if lengths else 0
    supervised = settings.training.per_device_train_batch_size * lengths.learned if lengths else 0
    need = memory_need(settings, adapter, longest=longest, supervised=min(supervised, longest))
    if need.weights > need.total:
        raise ModelError(f"the model cannot be loaded; {need.words()}")
    return need.words(), need.fits


def memory_need(
    settings: ClientSettings, adapter: AdapterTerms, *, longest: int = 0, supervised: int = 0
) -> MemoryNeed:
    """What a client needs, by `longest` and `supervised` tokens; nothing is loaded. ModelError if unfit."""
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
        device=str(device), weights=weight_bytes(model, settings.model),
        adapter=sum(tensor.nbytes for name, tensor in _tensors(model) if "colora_" in name),
        training=_KEPT_PER_TRAINED * trained + step, probe=probe,
        context=_CUDA_CONTEXT if device.type == "cuda" else 0, free=free, total=total,
        remedies=_remedies(settings),
    )  # fmt: skip


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


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
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
