"""Spoken commands to a home, drawn from the grammar that home-assistant-intents carries.

The package holds the sentence templates by which Home Assistant recognises intents, such as ``<timer_set>
[a|the|my] timer for {timer_minutes:minutes} minute[s]``. A few sentences of each are drawn, with names filled
in from the lists below. Those of one template form one group, so a test asks about phrasings never trained
on.

Template syntax: ``(a|b)`` one of, ``[a|b]`` one of or nothing, ``(a;b)`` both in any order, ``<rule>`` a
named part, ``{list}`` or ``{list:slot}`` a value.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedmosaic.experiments.tasks.labelled import ClassificationTask, LabelledText
from fedmosaic.protos.errors import ConfigurationError

MEMBER: Final = "home_assistant_intents/data/en.json"

DEVICE: Final = ClassificationTask(
    name="home-command",
    opening="Command",
    question="Climate, light, media or timer?",
    choices=("climate", "light", "media", "timer"),
)
"""Which part of the home does a command speak to?"""

_LABELS: Final = {
    "HassClimate": "climate",
    "HassFan": "climate",
    "HassLight": "light",
    "HassMedia": "media",
    "HassSetVolume": "media",
    "HassStartTimer": "timer",
    "HassIncreaseTimer": "timer",
    "HassDecreaseTimer": "timer",
    "HassCancelTimer": "timer",
    "HassPauseTimer": "timer",
    "HassUnpauseTimer": "timer",
    "HassTimerStatus": "timer",
}
"""Beginning of an intent's name, and the class of its sentences; other intents are left out."""

_WORDS: Final[Mapping[str, Sequence[str]]] = {
    name: words.split(", ")
    for name, words in {
        "area": "kitchen, bedroom, living room, bathroom, office, garage, hall, nursery, cellar",
        "floor": "ground, first, second, upper, lower",
        "name": "ceiling, desk, bedside, corner, window, reading, left, right, old, new",
        "search_query": "jazz, the beatles, abbey road, bach, morning news, blue train, nina simone",
        "timer_command": "open the curtains, lock the door, start the washing, close the gate",
        "timer_name": "pasta, pizza, tea, laundry, homework, bread, eggs, nap, rice",
    }.items()
}
"""Values of lists that the grammar leaves to the home or to the speaker."""

_DRAWS: Final = 16
_DEEPEST: Final = 20
_MAX_CHARACTERS: Final = 120
_PIECE: Final = re.compile(r"[()\[\]|;]|<[^<>]+>|\{[^{}]+\}|[^()\[\]|;<>{}]+")


def device_commands(content: bytes) -> Iterator[LabelledText]:
    """Draws sentences from the English grammar (JSON), grouped by template; repetitions may occur.

    `ConfigurationError` if the grammar is not readable or uses a syntax that is not known here.
    """
    try:
        grammar = json.loads(content)
        rules, lists, intents = grammar["expansion_rules"], grammar["lists"], grammar["intents"]
        templates = [
            (label, template)
            for intent in sorted(intents)
            for beginning, label in _LABELS.items()
            if intent.startswith(beginning)
            for block in intents[intent]["data"]
            for template in block["sentences"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{MEMBER} is not a grammar of intents in the form that is known") from error
    for label, template in templates:
        # random() with an integer seed is documented to give the same numbers on every version.
        draw = random.Random(int.from_bytes(template.encode(), "big"))  # noqa: S311 (no secret)
        parser = _Drawer(rules=rules, lists=lists, draw=draw)
        for _ in range(_DRAWS):
            text = " ".join(parser.sentence(template, 0).split())
            if 0 < len(text) <= _MAX_CHARACTERS:
                yield LabelledText(text=text, label=label, group=f"command {template}")


@dataclass(frozen=True)
class _Drawer:
    """Draws sentences: parts by name; lists of values, ``{"from", "to", "step"}`` or a wildcard."""

    rules: Mapping[str, str]
    lists: Mapping[str, Any]
    draw: random.Random

    def sentence(self, template: str, depth: int) -> str:
        """One sentence of a template."""
        if depth > _DEEPEST:
            raise ConfigurationError(f"{MEMBER} has rules that name each other more than {_DEEPEST} deep")
        pieces = _PIECE.findall(template)
        text, rest = self._alternatives(pieces, 0, depth)
        if rest != len(pieces) or "".join(pieces) != template:
            raise ConfigurationError(f"{MEMBER} has a template with unbalanced brackets")
        return text

    def _alternatives(self, pieces: list[str], at: int, depth: int) -> tuple[str, int]:
        """Reads up to a closing bracket; returns the text drawn and where reading stopped."""
        options, ordered = [""], True
        while at < len(pieces) and pieces[at] not in ")]":
            piece = pieces[at]
            if piece in "|;":
                ordered = ordered and piece == "|"
                options.append("")
            elif piece in "([":
                inner, at = self._alternatives(pieces, at + 1, depth)
                if at >= len(pieces) or (piece, pieces[at]) not in (("(", ")"), ("[", "]")):
                    raise ConfigurationError(f"{MEMBER} has a template with unbalanced brackets")
                options[-1] += inner if piece == "(" or self._index(2) else ""
            else:
                options[-1] += self._leaf(piece, depth)
            at += 1
        if ordered:
            return options[self._index(len(options))], at
        return " ".join(sorted(options, key=lambda _: self.draw.random())), at

    def _leaf(self, piece: str, depth: int) -> str:
        if piece.startswith("<"):
            rule = self.rules.get(piece[1:-1])
            if rule is None:
                raise ConfigurationError(f"{MEMBER} names a rule that it does not hold")
            return self.sentence(rule, depth + 1)
        if piece.startswith("{"):
            return self._value(piece[1:-1].partition(":")[0], depth)
        return piece

    def _value(self, name: str, depth: int) -> str:
        if name in _WORDS:
            return _WORDS[name][self._index(len(_WORDS[name]))]
        held = self.lists.get(name, {})
        if "range" in held:
            first, last = int(held["range"]["from"]), int(held["range"]["to"])
            step = int(held["range"].get("step", 1))
            return str(first + step * self._index((last - first) // step + 1))
        values = held.get("values")
        if not values:
            raise ConfigurationError(f"{MEMBER} uses a list without values that is not known here")
        value = values[self._index(len(values))]
        return self.sentence(value["in"] if isinstance(value, dict) else value, depth + 1)

    def _index(self, count: int) -> int:
        return int(self.draw.random() * count)
