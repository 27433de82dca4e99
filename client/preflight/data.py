"""What can be said about a client's examples before its model is loaded: rows, overlaps, lengths.

Everything here stays with the client: counts and shares are for its own people.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedmosaic.client.data.records import ClientData, ExampleSet, by_unit
from fedmosaic.client.model.examples import answer_tokens, example_pieces
from fedmosaic.client.vision.inputs import images_in, located, without_images
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.protos.errors import ConfigurationError


def check_sets(data: ClientData, pictures: Path | None, unit: Unit = "example") -> list[str]:
    """Check what needs no model; returns warnings, one line each.

    Raises:
        ConfigurationError: a test example cannot be scored, an image is missing, or a test set holds nothing
            but training examples; or persons are protected and a training example names none.
    """
    by_unit(data.train.examples, unit)
    for found in (data.train, *data.tests.values()):
        for number, example in enumerate(found.examples, start=1):
            where = f"{found.label}, example {number}"
            if found is not data.train and len(example.choices) == 1:
                raise ConfigurationError(
                    f"{where} has 1 choice; give two or more with the answer among them, or leave choices "
                    "out to have the written answer scored"
                )
            for image in images_in(example.prompt):
                if pictures is None:
                    raise ConfigurationError(
                        f"{where} names the image {image!r}; say in data.pictures which folder images lie in"
                    )
                located(pictures, image)
    return _warnings(data, unit)


@dataclass(frozen=True)
class Lengths:
    """How long a set's examples are in tokens, for one tokenizer, answer and end of text included.

    `longest` counts no images; `learned` is the most tokens that carry loss in one example; `cut` counts
    examples that are longer than what is read, which `warning` tells in one line.
    """

    longest: int
    learned: int
    cut: int
    warning: str


def read_lengths(
    tokenizer: PreTrainedTokenizerBase, found: ExampleSet, max_length: int, setting: str
) -> Lengths:
    """How much of a set is read within `max_length` tokens, answer and end of text included.

    Raises:
        ConfigurationError: answers or choices leave no room for their prompts, or the chat template refuses a
            conversation; the example, of several the one with the longest answer, is numbered.
        ModelError: conversations cannot be given to this model.
    """
    cut = lost = total = longest = learned = 0
    too_long: list[tuple[int, int]] = []  # answers in tokens, and the place of the example
    for number, example in enumerate(map(without_images, found.examples), start=1):
        *context, (written, _) = example_pieces(tokenizer, example, number)
        prompt = sum(len(tokens) for tokens, _ in context)
        answer = max(len(written), *(1 + len(answer_tokens(tokenizer, text)) for text in example.choices), 1)
        if answer >= max_length:
            too_long.append((answer, -number))
        over = max(0, prompt + answer - max_length)
        cut, lost, total = cut + bool(over), lost + over, total + prompt
        longest = max(longest, prompt + answer)
        learned = max(learned, len(written) + sum(len(piece) for piece, loss in context if loss))
    if too_long:
        answer, number = max(too_long)
        others = f", as in {len(too_long) - 1} more" if len(too_long) > 1 else ""
        raise ConfigurationError(
            f"{found.label}, example {-number}: its answer is {answer} tokens long with its end, and "
            f"{setting} is {max_length} and must leave room for the prompt{others}; raise {setting} to "
            f"{answer + 1} at least, or shorten what is longer"
        )
    warning = (
        f"{found.label}: {cut} of {len(found.examples)} examples are longer than {setting} = {max_length} "
        f"tokens (the longest has {longest:,}); {_percent(lost, total)} of their prompts' tokens are not "
        "read, from the left"
    )
    return Lengths(longest, learned, cut, warning if cut else "")


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if 1 <= share <= 99 else f"{share:.2g} %"


def _warnings(data: ClientData, unit: Unit) -> list[str]:
    lines = []
    trained = Counter((example.prompt, example.answer) for example in data.train.examples)
    repeated = len(data.train.examples) - len(trained)
    if repeated:
        lines.append(
            f"{data.train.label}: {repeated} of {len(data.train.examples)} rows repeat the prompt and answer "
            "of another row. The privacy guarantee is for one row: a text that stands twice is less protected"
        )
    most = data.train.most_of_one_person
    if most > 1 and unit == "example":
        lines.append(
            f"{data.train.label}: one person has {most} of the {len(data.train.examples)} rows. The privacy "
            "guarantee is for one row: the statement here tells the ε of that person as well"
        )
    for found in data.tests.values():
        both = sum((example.prompt, example.answer) in trained for example in found.examples)
        if both == len(found.examples):
            raise ConfigurationError(
                f"all {both} examples of {found.label} are training examples too, in {data.train.label}: a "
                "score over them measures memory; hold examples back that are not trained on"
            )
        if both:
            lines.append(
                f"{found.label}: {both} of {len(found.examples)} test examples are training examples too, "
                "which their score will flatter"
            )
    return lines
