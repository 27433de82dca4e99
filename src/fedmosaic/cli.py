"""The `fedmosaic` command: one line per sub-command, each loaded only when it is asked for.

Loading late matters: `fedmosaic server` must answer within two seconds and must not import torch.
"""

import gc
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from fedmosaic import __version__
from fedmosaic.privacy.terminal import TRACEBACK_OPTION, TRACEBACK_VARIABLE, WRONG_INPUT, guarded

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "demo": (
        "fedmosaic.experiments.demo.command",
        "Run a whole federation here, with real models and data.",
    ),
    "keys": (
        "fedmosaic.privacy.federation.keys",
        "Create a federation; add, revoke and renew members.",
    ),
    "probe": ("fedmosaic.client.profile.fit", "Fit the public map of the task profile on public data."),
    "align": (
        "fedmosaic.alignment.__main__",
        "Align the bases of different models on public text; measure the transfer.",
    ),
    "server": ("fedmosaic.server.__main__", "Start the server of a federation."),
    "dashboard": (
        "fedmosaic.server.dashboard.command",
        "Watch a server: rounds, who is awaited, refusals, relevance, ε; metrics for Prometheus.",
    ),
    "client": ("fedmosaic.client.command", "Take part in a federation as one client."),
    "doctor": (
        "fedmosaic.client.preflight.doctor",
        "Check all that a client needs; change and spend nothing.",
    ),
    "witness": (
        "fedmosaic.client.witness",
        "Recompute the server's aggregates from signed uploads, and countersign them.",
    ),
    "audit": ("fedmosaic.privacy.audit", "Check the audit log of a server, a client or a witness."),
    "export": ("fedmosaic.client.result.export", "Write a client's model: PEFT adapter, LoRA, or merged."),
    "predict": ("fedmosaic.client.result.predict", "Answer the rows of a file with a client's model."),
    "chat": ("fedmosaic.client.result.chat", "Ask a client's model, line by line."),
    "ledger": ("fedmosaic.client.ledger", "Move or back up the privacy ledger of a data set."),
    "run": ("fedmosaic.experiments.runs.command", "Run a scenario file on this machine, with any method."),
    "tasks": ("fedmosaic.experiments.tasks.command", "Write the data sets of scenarios."),
    "methods": ("fedmosaic.experiments.methods", "List the methods that a scenario can be run with."),
    "report": (
        "fedmosaic.experiments.comparison.report",
        "Read a run: accuracy, relevance, privacy, bytes sent.",
    ),
    "attack": (
        "fedmosaic.experiments.attacks.command",
        "Attack a run's releases and report what an attacker gets.",
    ),
    "experiments": (
        "fedmosaic.experiments.studies.command",
        "Rerun a study behind a figure in the documentation.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `fedmosaic.privacy.terminal.guarded`.

    3 says that a run was finished in which nothing was exchanged.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != TRACEBACK_OPTION]
    name = f"fedmosaic {words[0]}" if words and words[0] in COMMANDS else "fedmosaic"
    return guarded(name, lambda: _run(words), trace=words != given)


def _run(given: Sequence[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        _print_help()
        return 0
    if given[0] in ("--version", "version"):
        print(f"fedmosaic {__version__}")
        return 0
    if given[0] not in COMMANDS:
        print(f"fedmosaic: no command {given[0]!r}; `fedmosaic --help` lists them", file=sys.stderr)
        return WRONG_INPUT
    # A model's libraries make a million objects that stay to the end. The collector would walk over them as
    # they are made, in training, and at the end: 2 of 5.4 seconds of processor time to start and end.
    gc.disable()
    try:
        module = importlib.import_module(COMMANDS[given[0]][0])
    finally:
        gc.freeze()
        gc.enable()
    return int(module.main(given[1:]) or 0)


def _print_help() -> None:
    width = max(len(name) for name in COMMANDS)
    print("Private, personalised federated fine-tuning across different models and tasks.\n")
    print("usage: fedmosaic COMMAND [options]      (fedmosaic COMMAND --help explains one)\n")
    for name, (_, line) in COMMANDS.items():
        print(f"  {name:<{width}}  {line}")
    print(f"\n{TRACEBACK_OPTION}, or {TRACEBACK_VARIABLE}=1, shows where in the program an error was found.")


if __name__ == "__main__":
    sys.exit(main())
