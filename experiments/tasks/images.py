"""Sets of image tasks, from the folders that their data sets are published in.

An image is only made when its row is used. Paths are hashed into the splits, so they stay as they were.
"""

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fedmosaic.client.vision.inputs import marker
from fedmosaic.experiments.tasks.labelled import stable_hash
from fedmosaic.experiments.tasks.rows import Row, Task, TaskSet, part_of
from fedmosaic.protos.errors import ConfigurationError

CLOTHES: Final = tuple("top trousers pullover dress coat sandal shirt sneaker bag boot".split())
"""Names of Fashion-MNIST's classes in the order of its labels, one short word each."""


def which_alphabet(*alphabets: str) -> Task:
    """Omniglot: which alphabet is a drawing of? 340 of each by hash, as many as Tagalog has, the fewest."""
    choices = tuple(name.replace("_", " ") for name in alphabets)

    def read(data: Path) -> Iterator[Row]:
        drawings = _drawings(data, alphabets)
        for alphabet, choice in zip(alphabets, choices, strict=True):
            named = [(name, m) for name, ms in drawings.items() for m in ms]
            own = [(name, member) for name, member in named if name.partition("/")[0] == alphabet]
            for name, member in sorted(own, key=lambda pair: stable_hash("drawing", pair[1]))[:340]:
                path = f"pictures/omniglot/{'-'.join(member.split('/')[1:])}"
                made = {path: partial(_drawing, data, member)}
                yield Row(f"{marker(path)} Letter?", choice, choices, name, made)

    return Task(read, "Omniglot", "MIT")


@lru_cache(maxsize=2)
def _archive(path: Path) -> dict[str, bytes]:
    """The drawings in an archive, a megabyte and a half."""
    with zipfile.ZipFile(path) as file:
        return {member: file.read(member) for member in sorted(file.namelist()) if member.endswith(".png")}


def _drawings(data: Path, alphabets: Sequence[str]) -> dict[str, list[str]]:
    """Members of the archives by "alphabet/character"; what is in both is taken once."""
    found: dict[str, list[str]] = {}
    for number in (1, 2):
        present: dict[str, list[str]] = {}
        for member in _archive(data / "omniglot_small" / f"images_background_small{number}.zip"):
            _, alphabet, character, _ = member.split("/")
            if alphabet in alphabets:
                present.setdefault(f"{alphabet}/{character}", []).append(member)
        found = present | found
    return found


def _drawing(data: Path, member: str) -> Image.Image:
    content = _archive(data / "omniglot_small" / f"{member.partition('/')[0]}.zip")[member]
    return Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGB")


def which_clothes(*kinds: str) -> Task:
    """Fashion-MNIST: which piece of clothing is this? Of its 10,000 test images."""

    def read(data: Path) -> Iterator[Row]:
        folder = data / "fashion_mnist"
        images = _idx(folder / "t10k-images-idx3-ubyte.gz", 3)
        labels = _idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
        if len(labels) != len(images):
            raise ConfigurationError(f"{folder} has {len(images)} images and {len(labels)} labels")
        for number, label in enumerate(labels):
            if CLOTHES[label] in kinds:
                path = f"pictures/clothes/{number:04d}.png"
                made = {path: partial(_enlarged, images[number])}
                yield Row(f"{marker(path)} Clothes?", CLOTHES[label], kinds, path, made)

    return Task(read, "Fashion-MNIST", "MIT")


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An array in MNIST's format: magic number, big-endian sizes, bytes; `ConfigurationError` if not."""
    try:
        content = gzip.decompress(path.read_bytes())
        magic, *shape = np.frombuffer(content, ">i4", count=1 + dimensions).tolist()
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ConfigurationError(f"{path} is damaged or no IDX file: {error}") from None
    if magic != 0x800 + dimensions:
        raise ConfigurationError(f"{path} is no IDX file of bytes with {dimensions} dimensions")
    return values


def _enlarged(values: np.ndarray) -> Image.Image:
    """28 pixels to 112, light on dark as published."""
    image = Image.fromarray(values).resize((112, 112), Image.Resampling.BICUBIC)
    return image.convert("RGB")


_SIBLINGS: Final = {
    "letters": (
        which_alphabet("Balinese", "Greek", "Korean", "Latin"),
        which_alphabet("Early_Aramaic", "Japanese_(katakana)", "Sanskrit", "Tagalog"),
    ),
    "clothes": (
        which_clothes("top", "trousers", "bag", "boot"),
        which_clothes("dress", "coat", "sandal", "sneaker"),
    ),
}

SIBLINGS: Final[TaskSet] = {
    f"{name}-{'abc'[number]}": {
        f"{name}-{place}": part_of(task, number, 3, "sibling", lambda row: row.prompt)
        for place, task in enumerate(tasks, start=1)
    }
    for name, tasks in _SIBLINGS.items()
    for number in range(3)
}
"""Three clients for each of two domains, two tasks of four answers each, in order; only the image tells them.

Siblings have other drawings of the same alphabets and other clothes of the same kinds. Nobody trains on a
character that anybody is tested on.
"""
