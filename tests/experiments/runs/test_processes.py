"""A run as real processes that is told to end leaves none of them behind."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from waiting import wait_until

from fedmosaic.experiments.scenario.founding import fit_profile

RUN = """
import sys
from pathlib import Path
from rich.console import Console
from fedmosaic.experiments.runs.command import run
from fedmosaic.experiments.scenario.terms import Scenario
if __name__ == "__main__":
    scenario, kept = (Path(word) for word in sys.argv[1:])
    run(Scenario.model_validate_json(scenario.read_text()), Path(), Path("runs"), Console(), fitted=kept)
"""


def alive(process: psutil.Process) -> bool:
    try:
        # A zombie has ended, and waits for who has taken it over.
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_to_a_run_ends_all_of_its_processes(
    number: signal.Signals, tmp_path: Path, tiny_scenario: Any
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as nohup has it, and then by a run too")
    scenario, kept = tiny_scenario(), tmp_path / "kept"
    fit_profile(scenario, tmp_path / "fitted", Console(quiet=True), own_process=False, kept=kept)
    (tmp_path / "scenario.json").write_text(scenario.model_dump_json())
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", "scenario.json", str(kept)]
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=tmp_path, stdout=silent, stderr=silent) as run:
        started: list[psutil.Process] = []

        def a_client_is_there() -> bool:
            started[:] = psutil.Process(run.pid).children(recursive=True)
            return any(process.ppid() != run.pid for process in started)

        wait_until(a_client_is_there)
        run.send_signal(number)
        assert run.wait(60) == 128 + number
    try:
        wait_until(lambda: not any(map(alive, started)))
    finally:
        for process in filter(alive, started):
            process.kill()
