"""`fedmosaic experiments STUDY`: rerun a study behind a figure in the documentation."""

import importlib
import sys
from collections.abc import Sequence
from typing import Final

STUDIES: Final[dict[str, tuple[str, str]]] = {
    "relevance": (
        "fedmosaic.experiments.studies.relevance.command",
        "How well relevance survives differential privacy: AUC and top-1 against ε and number of examples.",
    ),
    "table": (
        "fedmosaic.experiments.runs.table",
        "Every cell of a table of methods, scenarios, streams and seeds.",
    ),
    "sharing": (
        "fedmosaic.experiments.studies.sharing",
        "What sharing brings under differential privacy, against the number of members.",
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic experiments` with its arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fedmosaic experiments STUDY [options]      (STUDY --help explains one)\n")
        for name, (_, line) in STUDIES.items():
            print(f"  {name}  {line}")
        return 0
    if arguments[0] not in STUDIES:
        print(
            f"fedmosaic experiments: no study {arguments[0]!r}; known: {', '.join(STUDIES)}", file=sys.stderr
        )
        return 2
    study = importlib.import_module(STUDIES[arguments[0]][0])
    return int(study.main(arguments[1:]) or 0)
