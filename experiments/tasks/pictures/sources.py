"""Rows of the picture benchmark, from the folders that its data sets are published in.

Every row names its pictures in its prompt; what is behind a name is only made when the row is used.
"""

import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fedmosaic.client.vision.features import open_image
from fedmosaic.client.vision.words import marker
from fedmosaic.experiments.tasks.labelled import normalise, stable_hash
from fedmosaic.experiments.tasks.texts.sets import TEST_SHARE
from fedmosaic.experiments.tasks.texts.sources import Row
from fedmosaic.protos.errors import ConfigurationError

YES_NO: Final = ("yes", "no")
TRUTH: Final = ("true", "false")
_RADIOGRAPH_SIDE: Final = 336


@dataclass(frozen=True)
class PictureRow:
    """One question about pictures.

    Attributes:
        row: whose prompt names the pictures.
        pictures: makes each of them, by the path that the prompt names.
    """

    row: Row
    pictures: dict[str, Callable[[], Image.Image]]


ReadPictures = Callable[[Path], Iterator[PictureRow]]


def in_test(group: str) -> bool:
    """On which side of the border between training and test a group lies; as for the text sets."""
    return stable_hash("row test", normalise(group)) < int(TEST_SHARE * 2**64)


# --- SHAPES


def shapes(pattern: str) -> ReadPictures:
    """SHAPES: is it true of a picture of 3 x 3 coloured shapes? Questions that match the pattern."""
    wanted = re.compile(pattern)

    def read(data: Path) -> Iterator[PictureRow]:
        folder = data / "shapes_vqa"
        for part in ("train.tiny", "train.small", "val", "test"):
            questions = _lines(folder / f"{part}.query_str.txt.gz")
            answers = _lines(folder / f"{part}.output.gz")
            content = gzip.decompress((folder / f"{part}.input.npy.gz").read_bytes())
            arrays = np.load(io.BytesIO(content), allow_pickle=False)
            for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                if wanted.search(question):
                    path = f"pictures/shapes/{part.replace('.', '-')}-{number}.png"
                    prompt = f"{marker(path)} {question}? true or false?"
                    yield PictureRow(
                        Row(prompt, answer, TRUTH, path), {path: partial(Image.fromarray, arrays[number])}
                    )

    return read


def _lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()


# --- NLVR


def nlvr(pattern: str, *, towers: bool, without: str = "") -> ReadPictures:
    """NLVR: is a statement true of three boxes, each a picture of its own?

    Args:
        pattern: which statements.
        towers: of pictures with towers of blocks, or of those with scattered things.
        without: statements that match this are left out; nothing by default.
    """
    wanted, unwanted = re.compile(pattern, re.IGNORECASE), re.compile(without or r"(?!)", re.IGNORECASE)

    def read(data: Path) -> Iterator[PictureRow]:
        folder = data / "nlvr"
        for part in ("dev", "test", "hidden"):
            for line in (folder / f"{part}.json").read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                text = " ".join(record["sentence"].split())
                things = [thing for box in record["structured_rep"] for thing in box]
                stacked = all(thing["x_loc"] == 40 and thing["type"] == "square" for thing in things)
                if stacked is not towers or not wanted.search(text) or unwanted.search(text):
                    continue
                identity = record["identifier"]
                source = folder / "images" / f"{part}-{identity}-0.png"
                paths = [f"pictures/nlvr/{part}-{identity}-{box}.png" for box in range(3)]
                prompt = f"{' '.join(map(marker, paths))} {text} true or false?"
                yield PictureRow(
                    Row(prompt, record["label"], TRUTH, f"nlvr {identity.partition('-')[0]}"),
                    {path: partial(_box, source, box) for box, path in enumerate(paths)},
                )

    return read


def _box(source: Path, number: int) -> Image.Image:
    """One of the three boxes, 100 pixels wide, which stand 50 pixels apart."""
    return open_image(source).crop((150 * number, 0, 150 * number + 100, 100))


# --- VQA-RAD


def radiographs(organ: str, kinds: Sequence[str]) -> ReadPictures:
    """VQA-RAD: yes or no about a radiograph of one part of the body.

    Args:
        organ: HEAD, CHEST or ABD.
        kinds: of questions, as the data set names them.
    """

    def read(data: Path) -> Iterator[PictureRow]:
        folder = data / "vqa_rad"
        records = json.loads((folder / "VQA_RAD_Dataset_Public.json").read_text(encoding="utf-8"))
        for record in records:
            answer = str(record["answer"]).strip().lower()
            if (
                record["image_organ"] == organ
                and record["question_type"].split(",")[0] in kinds
                and answer in YES_NO
            ):
                name = Path(record["image_name"])
                path = f"pictures/radiographs/{name.stem}.jpg"
                prompt = f"{marker(path)} {' '.join(record['question'].split())} yes or no?"
                yield PictureRow(
                    Row(prompt, answer, YES_NO, f"radiograph {name.stem}"),
                    {path: partial(_radiograph, folder / "images" / name.name)},
                )

    return read


def _radiograph(source: Path) -> Image.Image:
    """Brought to a size that the encoder can use, so that a set of tasks stays small."""
    picture = open_image(source)
    picture.thumbnail((_RADIOGRAPH_SIDE, _RADIOGRAPH_SIDE))
    return picture


# --- Omniglot


def same_character(alphabet: str, pairs: int = 340) -> ReadPictures:
    """Omniglot: two drawings of one alphabet, of the same character as often as not."""

    def read(data: Path) -> Iterator[PictureRow]:
        drawings = _drawings(data, (alphabet,))
        for number in range(pairs):
            side = [name for name in drawings if in_test(name) == (number % 4 == 0)]
            pick = np.random.default_rng([stable_hash("pair", alphabet), number])
            first = side[pick.integers(len(side))]
            same = number // 4 % 2 == 0
            second = first if same else str(pick.choice([name for name in side if name != first]))
            one, other = pick.choice(len(drawings[first]), 2, replace=False)
            chosen = [(first, drawings[first][one]), (second, drawings[second][other])]
            yield _pair(data, chosen, "Are both the same character? yes or no?", YES_NO[not same], first)

    return read


def same_alphabet(alphabets: tuple[str, str], pairs: int = 340) -> ReadPictures:
    """Omniglot: two characters of two alphabets, of the same one as often as not."""

    def read(data: Path) -> Iterator[PictureRow]:
        drawings = _drawings(data, alphabets)
        for number in range(pairs):
            side = [name for name in drawings if in_test(name) == (number % 4 == 0)]
            pick = np.random.default_rng([stable_hash("alphabets", " ".join(alphabets)), number])
            first = side[pick.integers(len(side))]
            same = number // 4 % 2 == 0
            matching = [
                name for name in side if name != first and (_alphabet(name) == _alphabet(first)) == same
            ]
            second = str(pick.choice(matching))
            chosen = [(name, str(pick.choice(drawings[name]))) for name in (first, second)]
            yield _pair(data, chosen, "Are both of one alphabet? yes or no?", YES_NO[not same], first)

    return read


def which_alphabet(alphabets: tuple[str, ...], question: str = "", most: int | None = None) -> ReadPictures:
    """Omniglot: which alphabet is a drawing of?

    Args:
        alphabets: to choose from.
        question: in words; names the alphabets by default.
        most: drawings of each alphabet, chosen by hash, so that none is more frequent; all by default.
    """
    choices = tuple(name.replace("_", " ") for name in alphabets)
    question = question or f"{', '.join(choices[:-1])} or {choices[-1]}?"

    def read(data: Path) -> Iterator[PictureRow]:
        drawings = _drawings(data, alphabets)
        for alphabet, choice in zip(alphabets, choices, strict=True):
            own = [(name, m) for name, ms in drawings.items() if _alphabet(name) == alphabet for m in ms]
            if most is not None:
                own = sorted(own, key=lambda pair: stable_hash("drawing", pair[1]))[:most]
            for name, member in own:
                path = _place(member)
                row = Row(f"{marker(path)} {question}", choice, choices, name)
                yield PictureRow(row, {path: partial(_drawing, data, member)})

    return read


# --- Fashion-MNIST


CLOTHES: Final = (
    "top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
"""Names of its classes in the order of its labels, one short word each."""


def which_clothes(kinds: tuple[str, ...], question: str = "Clothes?") -> ReadPictures:
    """Fashion-MNIST: which piece of clothing is this? Of its 10,000 test pictures.

    Args:
        kinds: to choose from, of `CLOTHES`.
        question: in words.
    """

    def read(data: Path) -> Iterator[PictureRow]:
        folder = data / "fashion_mnist"
        pictures = _idx(folder / "t10k-images-idx3-ubyte.gz", 3)
        labels = _idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
        if len(labels) != len(pictures):
            raise ConfigurationError(f"{folder} has {len(pictures)} pictures and {len(labels)} labels")
        for number, label in enumerate(labels):
            if CLOTHES[label] in kinds:
                path = f"pictures/clothes/{number:04d}.png"
                row = Row(f"{marker(path)} {question}", CLOTHES[label], kinds, path)
                yield PictureRow(row, {path: partial(_enlarged, pictures[number])})

    return read


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
    picture = Image.fromarray(values).resize((112, 112), Image.Resampling.BICUBIC)
    return picture.convert("RGB")


def _pair(
    data: Path, chosen: Sequence[tuple[str, str]], question: str, answer: str, group: str
) -> PictureRow:
    paths = [_place(member) for _, member in chosen]
    prompt = f"{' '.join(map(marker, paths))} {question}"
    pictures = {
        path: partial(_drawing, data, member) for path, (_, member) in zip(paths, chosen, strict=True)
    }
    return PictureRow(Row(prompt, answer, YES_NO, group), dict(pictures))


def _alphabet(character: str) -> str:
    return character.partition("/")[0]


def _place(member: str) -> str:
    return f"pictures/omniglot/{'-'.join(member.split('/')[1:])}"


@lru_cache(maxsize=2)
def _archive(path: Path) -> dict[str, bytes]:
    """The drawings in an archive, a megabyte and a half."""
    with zipfile.ZipFile(path) as file:
        return {member: file.read(member) for member in sorted(file.namelist()) if member.endswith(".png")}


def _archives(data: Path) -> list[Path]:
    return [data / "omniglot_small" / f"images_background_small{number}.zip" for number in (1, 2)]


def _drawings(data: Path, alphabets: tuple[str, ...]) -> dict[str, list[str]]:
    """Members of the archives by "alphabet/character"; what is in both is taken once."""
    found: dict[str, list[str]] = {}
    for archive in _archives(data):
        present: dict[str, list[str]] = {}
        for member in _archive(archive):
            _, alphabet, character, _ = member.split("/")
            if alphabet in alphabets:
                present.setdefault(f"{alphabet}/{character}", []).append(member)
        found = present | found
    return found


def _drawing(data: Path, member: str) -> Image.Image:
    content = _archive(data / "omniglot_small" / f"{member.partition('/')[0]}.zip")[member]
    return Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGB")
