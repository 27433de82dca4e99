"""`flwr run` in a simulation and on a SuperLink with three SuperNodes: the adapters are those of gRPC.

It takes minutes, and Flower, which not every environment has: `make test-flower` brings both together.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builders import tiny_mechanism
from end_to_end.ports import free_port
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.terms import AdapterTerms, ScheduleTerms, Terms
from tiny import save_tiny_model

pytest.importorskip("flwr", reason="Flower is not installed here; `make test-flower` installs it")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
APP = Path(__file__).parents[3] / "integrations" / "flower" / "app"
MEMBERS = ("ada", "ben", "cid", "dee")
Tensors = dict[str, torch.Tensor]
# Nothing leaves the machine, and a Ray that runs there already is let alone.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_ADDRESS": "local",
    "RAY_worker_niceness": "0",  # on a busy machine a simulation would not begin while a client waits
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*(f"w{i}" for i in range(40)), "yes", "no"]
    return save_tiny_model(tmp_path_factory.mktemp("model"), words, special)


class Place:
    """A federation of four with keys of its own, the clients' files, and the processes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        terms = Terms(
            adapter=AdapterTerms(rank=2, blocks=2, protection="encrypted"),
            profile=tiny_mechanism((16, 24, 32), probe_sha256=open_probe(load_base_model(model)[0]).sha256),
            schedule=ScheduleTerms(rounds=2, quorum=4, round_deadline_seconds=600),
            encryption={"backend": "mask"},
        )
        entries = tuple(MemberEntry(id=member) for member in MEMBERS)
        consortium.create(FederationConfig(federation="f", members=entries, terms=terms), folder / "kits")
        self.kit = folder / "kits" / "server"
        (self.kit / "server.toml").write_text(f'listen = "127.0.0.1:{self.port}"\n')
        for number, member in enumerate(MEMBERS):
            rows = [
                {"prompt": f"w{i} w{i * 7 % 40} w{number}", "answer": ("yes", "no")[(i + number) % 2]}
                for i in range(40)
            ]
            data = folder / f"{member}.jsonl"
            data.write_text("".join(json.dumps(row | {"choices": ["yes", "no"]}) + "\n" for row in rows))
            settings = {
                "kit": str(folder / "kits" / "clients" / member),
                "server": f"localhost:{self.port}",
                "state_dir": str(folder / f"{member}.state"),
                "model": {"path": str(model)},
                "probe": {"path": str(model)},
                "data": {"train": str(data)},
                "training": {"steps": 2, "per_device_train_batch_size": 4, "max_length": 32},
                "unsafe_test_noise_seed": number,
                "profile_max_length": 32,
            }
            (folder / f"{member}.json").write_text(json.dumps(settings))

    def adapters(self) -> Tensors:
        """The tensors that each member ends with."""
        found: Tensors = {}
        for member in MEMBERS:
            files = sorted((self.folder / f"{member}.state").glob("adapter/*/*.safetensors"))
            assert files, f"{member} has no adapter"
            found |= {f"{member}: {name}": tensor for name, tensor in load_file(files[-1]).items()}
        return found


@contextmanager
def started(
    name: str, folder: Path, *command: object, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped at the end, by force if need be; its output is in the folder."""
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | environment,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()


def wait_for(processes: dict[str, subprocess.Popen[bytes]], folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for name, process in processes.items():
        status: int | str
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "none"
        log = (folder / f"{name}.log").read_text(errors="replace")
        assert status == 0, f"{name}: {status}\n{log[-4000:]}"


def client(place: Place, member: str, socket: Path | None = None) -> Any:
    config = place.folder / f"{member}.json"
    over = ("fedmosaic.integrations.flower.client", config, socket) if socket else None
    words = over or ("fedmosaic.cli", "client", config)
    return started(member, place.folder, sys.executable, "-m", *words)


@pytest.fixture(scope="module")
def over_grpc(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    place = Place(tmp_path_factory.mktemp("grpc") / "f", model)
    with ExitStack() as running:
        words = (sys.executable, "-m", "fedmosaic.cli", "server", "--kit", place.kit)
        processes = {"server": running.enter_context(started("server", place.folder, *words))}
        processes |= {member: running.enter_context(client(place, member)) for member in MEMBERS}
        wait_for(processes, place.folder, 300)
    return place.adapters()


@contextmanager
def superlink(folder: Path, simulated: int = 0) -> Iterator[tuple[str, dict[str, str]]]:
    """A SuperLink that answers, its address, and the environment in which `flwr` knows it as "here"."""
    address, home = f"127.0.0.1:{free_port()}", {"FLWR_HOME": str(folder / "flwr")}
    (folder / "flwr").mkdir()
    text = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    words = ["--insecure", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    if simulated:
        text += f"options.num-supernodes = {simulated}\noptions.backend.init-args.num-cpus = {simulated}\n"
        words.append("--simulation")
    (folder / "flwr" / "config.toml").write_text(text)
    command = (BIN / "flower-superlink", *words, "--disable-runtime-dependency-installation")
    with started("superlink", folder, *command, **home):
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=1.0):
                break
            time.sleep(0.2)
        yield address, home


def run_and_wait(place: Place, paths: dict[str, Path], home: dict[str, str], **config: object) -> None:
    """Run the app, then a client for every member, over the sockets of those that have one."""
    settings = " ".join(f'{key}="{value}"' for key, value in ({"kit": place.kit} | config).items())
    command = (BIN / "flwr", "run", APP, "here", "--run-config", settings, "--stream")
    with ExitStack() as running:
        run = running.enter_context(started("flwr-run", place.folder, *command, **home))
        log, deadline = place.folder / "flwr-run.log", time.monotonic() + 300
        while "carries calls" not in log.read_text(errors="replace") and run.poll() is None:
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        clients = {name: running.enter_context(client(place, name, paths.get(name))) for name in MEMBERS}
        wait_for(clients, place.folder, 600)
        wait_for({"flwr-run": run}, place.folder, 120)


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_three_supernodes_and_a_member_on_grpc_end_where_grpc_alone_ends(
    model: Path, over_grpc: Tensors, tmp_path: Path
) -> None:
    place = Place(tmp_path / "f", model)
    sockets = {member: tmp_path / f"{member}.sock" for member in MEMBERS[:3]}
    with ExitStack() as running:
        address, home = running.enter_context(superlink(place.folder))
        for member, socket in sockets.items():
            words = ("--insecure", "--superlink", address, "--host", "127.0.0.1", "--port", free_port())
            node = (BIN / "flower-supernode", *words, "--node-config", f'socket="{socket}"')
            running.enter_context(started(f"supernode-{member}", place.folder, *node, **home))
        run_and_wait(place, sockets, home)
    same(place.adapters(), over_grpc)


def test_a_simulation_ends_where_grpc_ends(model: Path, over_grpc: Tensors, tmp_path: Path) -> None:
    place = Place(tmp_path / "f", model)
    sockets = {member: tmp_path / f"{number}.sock" for number, member in enumerate(MEMBERS)}
    with superlink(place.folder, simulated=len(MEMBERS)) as (_, home):
        run_and_wait(place, sockets, home, sockets=tmp_path)
    same(place.adapters(), over_grpc)
