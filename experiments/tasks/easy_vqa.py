"""Public images that a projector is trained on: easy-VQA, coloured shapes with questions in simple words."""

import json
from pathlib import Path
from typing import Final

from fedmosaic.client.assets import Asset, fetch, read_member, read_members
from fedmosaic.client.model.examples import Example
from fedmosaic.client.vision.inputs import marker
from fedmosaic.protos.errors import ConfigurationError

EASY_VQA: Final = Asset(
    project="easy-vqa",
    version="1.0",
    filename="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    size=3215672,
    licence="MIT",
)


def easy_vqa(cache: Path, part: str) -> tuple[Path, tuple[Example, ...]]:
    """The folder of images and the examples of one part of easy-VQA, "train" or "test", fetched and unpacked.

    4,000 images with 38,575 questions, and 1,000 with 9,673; choices are all answers of a kind.
    `ConfigurationError` if the wheel cannot be had, or is not in the form that is known.
    """
    wheel = fetch(EASY_VQA, cache)
    folder = cache / "pictures" / "easy-vqa"
    for name, content in read_members(wheel, f"easy_vqa/data/{part}/images/", ".png", 100_000):
        place = folder / part / name.rpartition("/")[2]
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    content = read_member(wheel, f"easy_vqa/data/{part}/questions.json", 4_000_000)
    try:
        rows = [(str(q), str(a), int(number)) for q, a, number in json.loads(content)]
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{EASY_VQA.filename} is not in the form that is known: {error}") from None
    kinds = (("yes", "no"), ("circle", "rectangle", "triangle"))
    colours = tuple(sorted({a for _, a, _ in rows} - {a for kind in kinds for a in kind}))
    of_answer = {answer: kind for kind in (*kinds, colours) for answer in kind}
    examples = tuple(
        Example(f"{part}-{index}", f"{marker(f'{part}/{number}.png')} {question}", answer, of_answer[answer])
        for index, (question, answer, number) in enumerate(rows)
    )
    return folder, examples
