"""Public questions and answers, from the English conversations that chatterbot-corpus carries.

They belong to no client and to no task, so what is fitted to them costs no privacy.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import yaml

from fedmosaic.client.data.records import Example
from fedmosaic.experiments.tasks.labelled import normalise, stable_hash
from fedmosaic.protos.errors import ConfigurationError

PREFIX: Final = "chatterbot_corpus/data/english/"
SUFFIX: Final = ".yml"

_SUBJECTS: Final = frozenset(
    "ai computers conversations food greetings history literature money movies science sports "
    "tech_support trivia".split()
)
_MIN_CHARACTERS: Final = 8
_MAX_CHARACTERS: Final = 120


def conversations(files: Iterable[tuple[str, bytes]]) -> Iterator[Example]:
    """One-line questions of 8 to 120 characters with their first answer, each question once.

    Files are named ``…/<subject>.yml``, in a fixed order; `ConfigurationError` if one is not in the known
    form.
    """
    seen: set[str] = set()
    for name, content in files:
        if name.removeprefix(PREFIX).removesuffix(SUFFIX) not in _SUBJECTS:
            continue
        try:
            turns = yaml.safe_load(content)["conversations"]
            pairs = [conversation[:2] for conversation in turns if len(conversation) > 1]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{name} does not hold conversations in the form that is known"
            ) from error
        for question, answer in pairs:
            if not isinstance(question, str) or not isinstance(answer, str):
                continue
            question, answer = question.strip(), answer.strip()
            key = normalise(question)
            if _is_short(question, _MIN_CHARACTERS) and _is_short(answer, 1) and key and key not in seen:
                seen.add(key)
                yield Example(id=f"public-{stable_hash('id', key):016x}", prompt=question, answer=answer)


def _is_short(text: str, least: int) -> bool:
    return least <= len(text) <= _MAX_CHARACTERS and "\n" not in text
