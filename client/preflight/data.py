"""What can be said about a client's examples before its model is loaded: rows, overlaps, lengths.

Everything here stays with the client: counts and shares are for its own people.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.examples import Example, answer_tokens, prompt_tokens, read_examples
from fedmosaic.client.settings import DataSettings
from fedmosaic.client.vision.inputs import located
from fedmosaic.client.vision.words import images_in, without_images
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class ClientData:
    """A client's examples as read, and what its people should know about them.

    Attributes:
        train: to be trained on.
        tests: to be scored, by name of the set.
        warnings: one line each.
    """

    train: tuple[Example, ...]
    tests: dict[str, tuple[Example, ...]]
    warnings: tuple[str, ...] = ()


def read_data(settings: DataSettings) -> ClientData:
    """Read every set and check what needs no model.

    Raises:
        ConfigurationError: a file cannot be read, a test example cannot be scored, an image is missing, or a
            test set holds nothing but training examples.
    """
    if "self" in settings.others:
        raise ConfigurationError(
            'data.others names a set "self", the name of data.test; give it another name'
        )
    data = ClientData(
        read_examples(settings.train),
        {name: read_examples(path) for name, path in settings.test_sets.items()},
    )
    for name, path in settings.test_sets.items():
        for number, example in enumerate(data.tests[name], start=1):
            if len(example.choices) == 1:
                raise ConfigurationError(
                    f"{path}, example {number} has 1 choice; give two or more with the answer among them, or "
                    "leave choices out to have the written answer scored"
                )
    for path, examples in ((settings.train, data.train), *_tests(settings, data)):
        _check_images(settings.pictures, path, examples)
    return replace(data, warnings=tuple(_warnings(settings, data)))


def read_share(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    examples: Sequence[Example],
    max_length: int,
    setting: str,
) -> str:
    """How much of a set's prompts is read within a length.

    Args:
        tokenizer: of the model that reads.
        path: file of the examples, for messages.
        examples: at least one; images in them are not counted.
        max_length: most tokens of an example, answer and end of text included.
        setting: name of that setting.

    Returns:
        One line if prompts are cut, else nothing.

    Raises:
        ConfigurationError: an answer or choice leaves no room for its prompt; the example is numbered.
    """
    cut = lost = total = longest = 0
    for number, example in enumerate(map(without_images, examples), start=1):
        prompt = len(prompt_tokens(tokenizer, example.prompt))
        answers = {example.answer, *example.choices}
        answer = 1 + max(len(answer_tokens(tokenizer, text)) for text in answers)
        if answer >= max_length:
            raise ConfigurationError(
                f"{path}, example {number}: its answer is {answer} tokens long with its end, {setting} is "
                f"{max_length} and must leave room for the prompt; raise {setting} to {answer + 1} at least, "
                "or shorten the answer"
            )
        over = max(0, prompt + answer - max_length)
        cut, lost, total = cut + bool(over), lost + over, total + prompt
        longest = max(longest, prompt + answer)
    if not cut:
        return ""
    return (
        f"{path.name}: {cut} of {len(examples)} examples are longer than {setting} = {max_length} tokens "
        "(the "
        f"longest has {longest:,}); {_percent(lost, total)} of their prompts' tokens are not read, from the "
        "left"
    )


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if 1 <= share <= 99 else f"{share:.2g} %"


def _tests(settings: DataSettings, data: ClientData) -> list[tuple[Path, tuple[Example, ...]]]:
    return [(path, data.tests[name]) for name, path in settings.test_sets.items()]


def _check_images(folder: Path | None, path: Path, examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples, start=1):
        named = images_in(example.prompt)
        for image in named:
            if folder is None:
                raise ConfigurationError(
                    f"{path}, example {number} names the image {image!r}; say in data.pictures which "
                    "folder images lie in"
                )
            located(folder, image)


def _warnings(settings: DataSettings, data: ClientData) -> list[str]:
    lines = []
    trained = Counter((example.prompt, example.answer) for example in data.train)
    repeated = sum(count - 1 for count in trained.values())
    if repeated:
        lines.append(
            f"{settings.train.name}: {repeated} of {len(data.train)} rows repeat the prompt and answer of "
            "another row. The privacy guarantee is for one row: a text that stands twice is less protected"
        )
    for path, examples in _tests(settings, data):
        both = sum((example.prompt, example.answer) in trained for example in examples)
        if both == len(examples):
            raise ConfigurationError(
                f"all {both} examples of {path} are training examples too, in {settings.train}: a score over "
                "them measures memory; hold examples back that are not trained on"
            )
        if both:
            lines.append(
                f"{path.name}: {both} of {len(examples)} test examples are training examples too, which "
                "their score will flatter"
            )
    return lines
