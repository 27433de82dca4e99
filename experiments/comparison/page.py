"""A comparison as one self-contained page: tables and figures, nothing loaded from elsewhere."""

import base64
import datetime as dt
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmosaic import __version__
from fedmosaic.experiments.comparison.figures import curves, privacy_figure
from fedmosaic.experiments.comparison.runs import REFERENCE, Group
from fedmosaic.experiments.comparison.tables import by_scenario, sections


def page(groups: Sequence[Group], command: str, reference: str = REFERENCE) -> str:
    """The page as HTML; `command` is what makes it again, `reference` as of `sections`."""
    environment = Environment(
        loader=PackageLoader("fedmosaic.experiments.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    scenarios = by_scenario(groups)
    return environment.get_template("page.html.j2").render(
        runs=sum(len(group.runs) for group in groups),
        version=__version__,
        date=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        title=", ".join(name for name, _ in scenarios),
        sections=sections(groups, reference),
        figures=[figure for name, members in scenarios for figure in _figures(name, members)],
        command=command,
    )


def _figures(scenario: str, groups: Sequence[Group]) -> list[tuple[str, str]]:
    drawn = []
    if len({group.runs[0].protection for group in groups} - {""}) > 1:
        drawn.append((privacy_figure(groups), "accuracy and relevance over ε, by what protects the adapter."))
    for own in (True, False):
        words = f"{'Self' if own else 'Others'} over the rounds; round 0 is before any training."
        drawn.append((curves(groups, own=own), words))
    return [(_embedded(svg), f"{scenario}: {words}") for svg, words in drawn]


def _embedded(svg: str) -> str:
    """An SVG document as the source of an image, so that no two figures of a page share an id."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
