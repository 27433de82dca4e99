"""A federation whose learners hold a vector instead of a model; everything else is the real thing."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from builders import tiny_mechanism, with_schedule
from fedmosaic.client.client import Participant
from fedmosaic.client.ledger import budgeted_channels
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.round.session import Session
from fedmosaic.client.state import ClientState
from fedmosaic.client.transport.grpc import GrpcTransport, Transport
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry, WitnessEntry, open_kit
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

MEMBERS = ("ada", "ben", "cid", "dee", "eva")
PROFILE = tiny_mechanism(noise_multiplier=1.0)


def terms(backend: str, rounds: int = 3, **schedule: float) -> Terms:
    plain = backend == "plain"
    return Terms.model_validate(
        {
            "adapter": AdapterTerms(
                rank=4, blocks=2, target_modules=("a", "b"), protection="none" if plain else "encrypted"
            ),
            "profile": PROFILE,
            "schedule": {
                "rounds": rounds,
                "quorum": 4,
                "round_deadline_seconds": 120,
                "gathering_seconds": 120,
                "key_patience_seconds": 120,
                **schedule,
            },
            "encryption": {"backend": backend},
            "allow_plaintext": plain,
        }
    )


@dataclass
class VectorLearner:
    """`Training` moves the local vector half-way to the global one and adds this client's own direction."""

    seed: int
    terms: Terms
    local: np.ndarray = field(init=False)
    global_branch: np.ndarray = field(init=False)
    received: list[np.ndarray] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    fail_after_training: bool = False
    family: str = ""

    def __post_init__(self) -> None:
        self.local = np.zeros(self.terms.adapter.shared_dimensions, dtype=np.float32)
        self.global_branch = self.local.copy()

    @property
    def adapter_spec_hash(self) -> bytes:
        return self.terms.adapter.spec_hash

    def load_global(self, section: str, vector: np.ndarray) -> None:
        assert section == "shared"
        self.received.append(vector)
        self.global_branch = vector.astype(np.float32)

    def keep_own(self, section: str) -> None:
        self.global_branch = self.local.copy()

    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        self.trained.append(round_number)
        own = np.random.default_rng([self.seed, round_number]).normal(0, 0.5, self.local.size)
        self.local = (0.5 * self.local + 0.25 * self.global_branch + own).astype(np.float32)

    def sections(self) -> Mapping[str, np.ndarray]:
        return {"shared": self.local.copy()}

    def save(self, directory: Path) -> None:
        np.savez(directory / "vector.npz", local=self.local, received=self.global_branch)
        (directory / "meta.json").write_text(json.dumps({"trained": self.trained}))

    def load(self, directory: Path) -> None:
        with np.load(directory / "vector.npz") as stored:
            self.local, self.global_branch = stored["local"], stored["received"]


def make_federation(
    directory: Path,
    agreed: Terms,
    members: tuple[str, ...] = MEMBERS,
    families: Mapping[str, str] | None = None,
    witness: WitnessEntry | None = None,
) -> Path:
    entries = tuple(MemberEntry(id=name, family=(families or {}).get(name, "")) for name in members)
    config = FederationConfig(federation="vectors", members=entries, witness=witness, terms=agreed)
    consortium.create(config, directory)
    (directory / "server" / "server.toml").write_text('listen = "127.0.0.1:0"\nstate_dir = "state"\n')
    return directory


def coordinator_of(directory: Path, **schedule: Any) -> Coordinator:
    """The federation's server, by another schedule than the members have signed if one is given."""
    settings = settings_from_kit(directory / "server")
    changes = {"durable": False, "roster_hash": settings.roster_hash}
    changes |= {"roster": with_schedule(settings.roster, **schedule)} if schedule else {}
    return Coordinator(settings.model_copy(update=changes))


@dataclass
class Client:
    """One client of the federation; `session` makes a fresh process's worth of objects each time."""

    directory: Path
    name: str
    seed: int
    learner: Any = field(init=False)
    ledger: Ledger | None = None
    state: ClientState | None = None
    target_epsilon: float = 8.0
    plan: AdapterPlan = field(default_factory=lambda: AdapterPlan(0.0, 0.1))

    @property
    def noise(self) -> SecureNoise | SeededTestNoise:
        return SecureNoise()

    def make_learner(self, agreed: Terms) -> Any:
        return VectorLearner(self.seed, agreed)

    def session(self, transport: Transport) -> Session:
        kit = open_kit(self.directory / "clients" / self.name)
        agreed = kit.roster.terms
        self.learner = self.make_learner(agreed)
        self.state = ClientState(kit.directory / "state", kit.roster.federation, self.name)
        channels, path = budgeted_channels(agreed), self.state.ledger_path
        about: dict[str, Any] = {"accountant": "rdp", "budgeted_channels": channels, "unit": agreed.unit}
        self.ledger = Ledger.open(path, self.name, 1e-5, self.target_epsilon, **about)
        ids = tuple(f"{self.name}-{i}" for i in range(100))
        releases = Releases(self.ledger, agreed, self.state, ids, self._profile, self.noise, self.plan)
        return Participant(
            kit, transport, self.learner, self.state, self.ledger, self.plan, releases, Progress()
        ).session

    def _profile(self) -> ClippedSum:
        units = np.zeros(PROFILE.dimensions, dtype=np.int64)
        units[self.seed % PROFILE.dimensions] = 100 * 2**24
        return ClippedSum(units, 0, 0, 100)

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        if self.state is not None:
            self.state.release()


class SeededClient(Client):
    """Its noise repeats, so that its run does."""

    @property
    def noise(self) -> SeededTestNoise:
        return SeededTestNoise(self.seed)


def clients_of(directory: Path, names: tuple[str, ...] = MEMBERS, kind: type[Any] = Client) -> dict[str, Any]:
    """The clients of a federation, each with a seed of its own."""
    return {name: kind(directory, name, MEMBERS.index(name)) for name in names}


def run_all(sessions: Mapping[str, Any]) -> dict[str, BaseException]:
    """Run every session in a thread of its own; returns what they raised."""
    errors: dict[str, BaseException] = {}

    def run(name: str, session: Any) -> None:
        try:
            session.run()
        except BaseException as error:
            errors[name] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in sessions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    alive = [name for name, thread in zip(sessions, threads, strict=True) if thread.is_alive()]
    assert not alive, f"sessions hang: {alive}"
    return errors


def dial(directory: Path, name: str, address: int | str, **options: Any) -> GrpcTransport:
    """A member's way to a server on a port of this machine, or at an address."""
    kit = directory / "clients" / name
    return GrpcTransport(
        address if isinstance(address, str) else f"localhost:{address}",
        authority=kit / "authority.pem",
        certificate=kit / "tls.pem",
        private_key=kit / "tls.key",
        **options,
    )


def in_process(coordinator: Coordinator, name: str) -> InProcessTransport:
    return InProcessTransport(coordinator, name, patience_seconds=120)


def play(
    coordinator: Any, clients: Mapping[str, Client], lines: Mapping[str, Callable[[Any], Any]] | None = None
) -> dict[str, BaseException]:
    """Run a process of every client to its end, and close it; returns what they raised.

    `lines` has what to put around the transport of some of them.
    """
    plain = {name: in_process(coordinator, name) for name in clients}
    wrapped = {name: (lines or {}).get(name, lambda line: line)(line) for name, line in plain.items()}
    try:
        return run_all({name: client.session(wrapped[name]) for name, client in clients.items()})
    finally:
        for client in clients.values():
            client.close()


def played(
    directory: Path,
    coordinator: Coordinator,
    killed: tuple[str, ...] = (),
    line: Callable[[Any], Any] = lambda inner: inner,
    prepare: Callable[[Any], Any] = lambda session: None,
    pause: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Run all clients until the end of the run; those that are killed, once, start again after a pause."""
    clients = clients_of(directory)

    def restarted(client: Any) -> None:
        session = client.session(line(in_process(coordinator, client.name)))
        prepare(session)
        with pytest.raises(Killed):
            session.run()
        client.close()
        pause()
        client.session(in_process(coordinator, client.name)).run()

    sessions: dict[str, Any] = {
        name: SimpleNamespace(run=partial(restarted, client))
        if name in killed
        else client.session(in_process(coordinator, name))
        for name, client in clients.items()
    }
    assert run_all(sessions) == {}
    for client in clients.values():
        client.close()
    return clients


def finish(directory: Path, kind: type[Any] = Client, around: Callable[[Any], Any] | None = None) -> Any:
    """Run all clients of a federation to the end of its run; they by name, and the server's summary."""
    coordinator = coordinator_of(directory)
    clients = clients_of(directory, kind=kind)
    assert play(coordinator if around is None else around(coordinator), clients) == {}
    summary = coordinator.summary()
    coordinator.close()
    return clients, summary


class Killed(BaseException):
    """Stands for the end of a process."""


class Dying:
    """A transport whose process dies before it pushes, or pulls, a round, or after the receipt of one."""

    def __init__(self, inner: Any, *, push: int = 0, pull: int = 0, pushed: int = 0) -> None:
        self._inner, self._push, self._pull, self._pushed = inner, push, pull, pushed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def push(self, upload: Any) -> Any:
        if upload.round == self._push:
            raise Killed
        receipt = self._inner.push(upload)
        if upload.round == self._pushed:
            raise Killed
        return receipt

    def pull(self, round_number: int, on_wait: Any = None) -> Any:
        if round_number == self._pull:
            raise Killed
        return self._inner.pull(round_number, on_wait)


class Listed:
    """A transport that writes down every call: its name, its round, and how much is sent with it.

    But for those of the key agreement, which begins before anything is received and follows the others' time.
    """

    def __init__(self, inner: Any, calls: list[str]) -> None:
        self._inner, self._calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if "key" in name:
            return found

        def listed(*arguments: Any, **named: Any) -> Any:
            first = arguments[0] if arguments else None
            sizes = [len(section.payload) for section in getattr(first, "sections", ())]
            self._calls.append(f"{name} {getattr(first, 'round', first if name == 'pull' else '')} {sizes}")
            return found(*arguments, **named)

        return listed
