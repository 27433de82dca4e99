"""A federation as real processes on this machine: what they cannot do, their files, starting and stopping."""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal

from fedmosaic import cli
from fedmosaic.client.data.records import read_examples
from fedmosaic.experiments.scenario.children import how_it_ended
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.scenario.terms import RunFailedError, Scenario, ScenarioClient
from fedmosaic.protos.errors import ConfigurationError

CLIENT_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a driver that is asked for its GPUs before a fork serves no child
    # Freed memory is kept for the next step: giving it back and asking anew takes a twentieth of a step.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
_FORKING: Final = get_context("forkserver")
# Clients are forked from a process that has read their libraries, which takes seconds, and done no more.
_FORKING.set_forkserver_preload(["fedmosaic.client.command"])


@dataclass
class ManagedProcess:
    """One of our commands in a process of its own, and the log file that it writes to."""

    name: str
    arguments: Sequence[str]
    log: Path
    _process: BaseProcess | None = None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the process; its output goes to the log file only."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = _FORKING if self.arguments[0] == "client" else get_context("spawn")
        self._process = context.Process(target=_command, args=(self.arguments, self.log), name=self.name)
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended yet."""
        return self._process is not None and self._process.exitcode is None

    @property
    def status(self) -> int | None:
        """With which it ended; None before."""
        return None if self._process is None else self._process.exitcode

    def stop(self) -> None:
        """Ask the process to end, and insist after a while."""
        if self._process is None or self._process.pid is None:
            return
        self._process.terminate()
        self._process.join(15.0)
        if self.running:
            self._process.kill()
            self._process.join()

    def end(self) -> str:
        """Where its log is and what that ends with, for an error message."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-12:]
        except OSError:
            lines = ["(no log)"]
        return "\n".join((f"{self.log} ends with:", *lines))


def _command(arguments: Sequence[str], log: Path) -> None:
    with log.open("ab") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    sys.exit(cli.main(arguments))


def free_port() -> int:
    """A TCP port on loopback that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: ManagedProcess, seconds: float) -> None:
    """Wait until something listens on a loopback port; `RunFailedError` if nothing does in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.running:
            raise RunFailedError(
                f"{process.name} {how_it_ended(process.status)} at its start; {process.end()}"
            )
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RunFailedError(
        f"{process.name} does not listen on port {port} after {seconds:.0f} s; see {process.log}"
    )


def newest_record(path: Path) -> dict[str, Any]:
    """The newest whole line of JSON that a client wrote about its progress; empty before the first."""
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}


def check_as_processes(scenario: Scenario) -> None:
    """Refuse what only one process can do; the `ConfigurationError` names it."""
    reasons = {
        f"method {scenario.method!r}": scenario.method != "fedmosaic",
        f"stream {scenario.stream!r}": scenario.stream != "all",
        "a fixed gate": scenario.fixed_gate is not None,
        "discard_received": scenario.discard_received,
        "family_sharing (give adapter.family_dimensions)": scenario.family_sharing,
        "question_only": scenario.question_only,
        "equal compute": scenario.equal_compute,
        "test noise": scenario.unsafe_test_noise_seed is not None,
        f"seed {scenario.seed}": scenario.seed != 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConfigurationError(
            f"scenario {scenario.name} has {', '.join(found)}, which client processes do not know; run it in "
            "one process, without --processes"
        )


def client_process(
    scenario: Scenario, client: ScenarioClient, directory: Path, port: int, compare_alone: bool = False
) -> ManagedProcess:
    """Write a client's settings into its kit in the run's directory; gives the process, not started yet."""
    place = directory / "federation" / "clients" / client.id
    others = {
        other.id: str(_data_file(other, "others", scenario.others_examples, directory))
        for other in scenario.clients
        if other.id != client.id
    }
    settings = {
        "kit": str(place),
        "server": f"localhost:{port}",
        "state_dir": str(place / "state"),
        "model": client.model.model_dump(exclude_none=True),
        "probe": scenario.probe.model_dump(exclude_none=True),
        **({"projector": str(client.projector)} if client.projector else {}),
        "data": {
            "train": str(_data_file(client, "train", 0, directory)),
            # Every run of a scenario is an experiment of its own, on data that many of them share.
            "ledger": str(place / "ledger"),
            "test": str(_data_file(client, "test", scenario.evaluation_examples, directory)),
            "others": others,
            **({"pictures": str(scenario.images)} if scenario.images else {}),
        },
        "training": scenario.training.model_dump(mode="json", exclude_none=True),
        "profile_max_length": scenario.profile.max_length,
        "compare_alone": compare_alone,
        "threads": 1,
    }
    path = place / "client.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return ManagedProcess(client.id, ("client", str(path)), directory / f"{client.id}.log")


def _data_file(
    client: ScenarioClient, part: Literal["train", "test", "others"], limit: int, run: Path
) -> Path:
    """A client's own file, or one of all its tasks, each cut to its first examples (0 for all)."""
    files = [task.train if part == "train" else task.test for task in client.task_list]
    if len(files) == 1 and not limit:
        return files[0]
    path = run / "data" / f"{client.id}.{part}.jsonl"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        named = zip(client.task_list, files, strict=True)
        cut = [(task.name, e) for task, file in named for e in read_examples(file)[: limit or None]]
        write_examples(path, [replace(example, id=f"{name}/{example.id}") for name, example in cut])
    return path
