"""Sets of image tasks, from the folders that their data sets are published in.

Every row names its images in its prompt; an image is only made when its row is used. The paths are hashed
into the splits, so they stay as they were when the published figures were made.
"""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fedmosaic.client.vision.features import open_image
from fedmosaic.client.vision.words import marker
from fedmosaic.experiments.tasks.labelled import stable_hash
from fedmosaic.experiments.tasks.rows import Row, Task, TaskSet, in_test, part_of, question, read_json
from fedmosaic.protos.errors import ConfigurationError

_YES_NO: Final = ("yes", "no")
_RADIOGRAPH_SIDE: Final = 336
_PAIRS: Final = 340
CLOTHES: Final = (
    "top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
"""Names of Fashion-MNIST's classes in the order of its labels, one short word each."""


def shapes(pattern: str) -> Task:
    """SHAPES: is it true of an image of 3 x 3 coloured shapes? Questions that match the pattern."""
    wanted, truth = re.compile(pattern), ("true", "false")

    def read(data: Path) -> Iterator[Row]:
        folder = data / "shapes_vqa"
        for part in ("train.tiny", "train.small", "val", "test"):
            asked, answers = (
                gzip.decompress((folder / f"{part}.{name}.gz").read_bytes()).decode("utf-8").splitlines()
                for name in ("query_str.txt", "output")
            )
            content = gzip.decompress((folder / f"{part}.input.npy.gz").read_bytes())
            arrays = np.load(io.BytesIO(content), allow_pickle=False)
            for number, (text, answer) in enumerate(zip(asked, answers, strict=True)):
                if wanted.search(text):
                    path = f"pictures/shapes/{part.replace('.', '-')}-{number}.png"
                    prompt = f"{marker(path)} {text}? true or false?"
                    yield Row(prompt, answer, truth, path, {path: partial(Image.fromarray, arrays[number])})

    return Task(read, "SHAPES", "BSD-2-Clause")


def radiographs(organ: str, kinds: Sequence[str]) -> Task:
    """VQA-RAD: yes or no about a radiograph of one part of the body.

    Args:
        organ: HEAD, CHEST or ABD.
        kinds: of questions, as the data set names them.
    """

    def read(data: Path) -> Iterator[Row]:
        folder = data / "vqa_rad"
        for record in read_json(folder / "VQA_RAD_Dataset_Public.json"):
            answer = str(record["answer"]).strip().lower()
            kind = record["question_type"].split(",")[0]
            if record["image_organ"] == organ and kind in kinds and answer in _YES_NO:
                name = Path(record["image_name"])
                path = f"pictures/radiographs/{name.stem}.jpg"
                prompt = f"{marker(path)} {' '.join(record['question'].split())} yes or no?"
                images = {path: partial(_radiograph, folder / "images" / name.name)}
                yield Row(prompt, answer, _YES_NO, f"radiograph {name.stem}", images)

    return Task(read, "VQA-RAD", "CC0 1.0")


def _radiograph(source: Path) -> Image.Image:
    """Brought to a size that the encoder can use, so that a set of tasks stays small."""
    image = open_image(source)
    image.thumbnail((_RADIOGRAPH_SIDE, _RADIOGRAPH_SIDE))
    return image


def same_alphabet(*alphabets: str) -> Task:
    """Omniglot: pairs of characters of two alphabets, of the same one as often as not."""

    def read(data: Path) -> Iterator[Row]:
        drawings = _drawings(data, alphabets)
        for number in range(_PAIRS):
            side = [name for name in drawings if in_test(name) == (number % 4 == 0)]
            pick = np.random.default_rng([stable_hash("alphabets", " ".join(alphabets)), number])
            first = side[pick.integers(len(side))]
            same = number // 4 % 2 == 0
            second = str(
                pick.choice([n for n in side if n != first and (_alphabet(n) == _alphabet(first)) == same])
            )
            members = [str(pick.choice(drawings[name])) for name in (first, second)]
            images = {_place(member): partial(_drawing, data, member) for member in members}
            prompt = f"{' '.join(map(marker, images))} Are both of one alphabet? yes or no?"
            yield Row(prompt, _YES_NO[not same], _YES_NO, first, images)

    return Task(read, "Omniglot", "MIT")


def which_alphabet(*alphabets: str, asked: str = "", most: int | None = None) -> Task:
    """Omniglot: which alphabet is a drawing of?

    Args:
        alphabets: to choose from.
        asked: the question; names the alphabets by default.
        most: drawings of each alphabet, chosen by hash, so that none is more frequent; all by default.
    """
    choices = tuple(name.replace("_", " ") for name in alphabets)

    def read(data: Path) -> Iterator[Row]:
        drawings = _drawings(data, alphabets)
        for alphabet, choice in zip(alphabets, choices, strict=True):
            own = [(name, m) for name, ms in drawings.items() if _alphabet(name) == alphabet for m in ms]
            if most is not None:
                own = sorted(own, key=lambda pair: stable_hash("drawing", pair[1]))[:most]
            for name, member in own:
                path = _place(member)
                prompt = f"{marker(path)} {asked or question(choices)}"
                yield Row(prompt, choice, choices, name, {path: partial(_drawing, data, member)})

    return Task(read, "Omniglot", "MIT")


def _alphabet(character: str) -> str:
    return character.partition("/")[0]


def _place(member: str) -> str:
    return f"pictures/omniglot/{'-'.join(member.split('/')[1:])}"


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
    """An array in the format of MNIST: a magic number, big-endian sizes, bytes.

    Raises:
        ConfigurationError: the file is in another format.
    """
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


FOUR: Final[TaskSet] = {
    "scripts": {
        "greek-korean": same_alphabet("Greek", "Korean"),
        "latin-katakana": same_alphabet("Latin", "Japanese_(katakana)"),
    },
    "shapes": {
        "what": shapes(r"^is a \w+ (shape )?(a \w+|red|green|blue)$"),
        "beside": shapes(r"^is a \w+ (shape )?(left|right) of a "),
    },
    "chest": {
        "present": radiographs("CHEST", ("PRES",)),
        "size": radiographs("CHEST", ("SIZE", "COUNT", "POS")),
    },
    "writing": {
        "greek-or-korean": which_alphabet("Greek", "Korean"),
        "four": which_alphabet("Balinese", "Tagalog", "Korean", "Latin"),
    },
}
"""Visual relation, visual reasoning and visual question answering, two tasks each, for a first look."""

# Tagalog has 340 drawings, the fewest.
_letters = partial(which_alphabet, asked="Letter?", most=340)
_SIBLINGS: Final = {
    "letters": (
        _letters("Balinese", "Greek", "Korean", "Latin"),
        _letters("Early_Aramaic", "Japanese_(katakana)", "Sanskrit", "Tagalog"),
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

IMAGE_SETS: Final[dict[str, TaskSet]] = {"images-four": FOUR, "images-siblings": SIBLINGS}
