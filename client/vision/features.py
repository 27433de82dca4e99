"""Images from files, and their features of the frozen encoder, computed once and kept."""

import hashlib
import logging
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
from torch.nn import functional

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.vision.encoder import CHANNELS, LITE0, EfficientNetLite0, load_efficientnet
from fedmosaic.privacy.files import private_directory, write_atomically
from fedmosaic.protos.errors import ConfigurationError

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
    paths: Sequence[Path],
    *,
    size: int = SIZE,
    grid: int = GRID,
    cache: Path | None = None,
    kept: Path | None = None,
    console: Console | None = None,
) -> torch.Tensor:
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
