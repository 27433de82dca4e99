"""A comparison as one self-contained page: tables and figures, nothing loaded from elsewhere."""

import base64
import datetime as dt
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmosaic import __version__
from fedmosaic.experiments.comparison.figures import bars, curves, privacy_figure
from fedmosaic.experiments.comparison.runs import REFERENCE, Group
from fedmosaic.experiments.comparison.tables import (
    ACCURACY_HEADS,
    COST_HEADS,
    GAIN_HEADS,
    accuracies,
    by_scenario,
    costs,
    gains,
    majority_words,
    overview,
    pooled,
)


def page(groups: Sequence[Group], command: str, reference: str = REFERENCE) -> str:
    """The page as HTML.

    Args:
        groups: at least one.
        command: that makes this page again.
        reference: the method that the others are compared with seed by seed.
    """
    environment = Environment(
        loader=PackageLoader("fedmosaic.experiments.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        runs=sum(len(group.runs) for group in groups),
        version=__version__,
        date=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        overview=overview(groups),
        together=gains(pooled(groups), reference),
        reference=reference,
        gain_heads=GAIN_HEADS,
        row_heads=(*ACCURACY_HEADS, *COST_HEADS),
        scenarios=[_scenario(name, members, reference) for name, members in by_scenario(groups)],
        command=command,
    )


def _scenario(name: str, groups: Sequence[Group], reference: str) -> dict[str, Any]:
    return {
        "name": name,
        "rows": [(group.method, (*accuracies(group), *costs(group))) for group in groups],
        "majority": majority_words(groups),
        "gains": gains(groups, reference),
        "figures": [(embedded(svg), caption) for svg, caption in _figures(groups)],
    }


def _figures(groups: Sequence[Group]) -> list[tuple[str, str]]:
    drawn = []
    if len({group.runs[0].protection for group in groups} - {""}) > 1:
        drawn.append((privacy_figure(groups), "Accuracy and relevance over ε, by what protects the adapter."))
    for figure in ("Self A_last", "Others A_last"):
        words = f"{figure} of every method, its 95 % interval over seeds and its ε towards recipients."
        drawn.append((bars(groups, figure), words))
    for own in (True, False):
        words = f"{'Self' if own else 'Others'} over the rounds; round 0 is before any training."
        drawn.append((curves(groups, own=own), words))
    return drawn


def embedded(svg: str) -> str:
    """An SVG document as the source of an image, so that no two figures of a page share an id."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
