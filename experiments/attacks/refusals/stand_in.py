"""A federation for attacks: real sessions, ledgers, keys and encryption; a vector stands in for the model."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedmosaic.client.client import Participant
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.encryption.parameters import MaskParameters, Parameters
from fedmosaic.privacy.federation import consortium, kits
from fedmosaic.privacy.federation.terms import AdapterTerms, ScheduleTerms, Terms
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

MEMBERS: Final = ("ada", "ben", "cid", "dee", "eva")
ROUNDS: Final = 3
_PATIENCE_SECONDS: Final = 120.0
_MECHANISM: Final = ProfileMechanism(
    probe="none",
    probe_sha256="0" * 64,
    reduction=Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=32),
    noise_multiplier=1.0,
)


@dataclass
class VectorLearner:
    """A learner whose model is a vector, drawn anew every round; it remembers what it was made to load."""

    seed: int
    terms: Terms
    received: list[int] = field(default_factory=list)
    family: str = ""
    _round: int = 0

    def __post_init__(self) -> None:
        self._local = np.zeros(self.terms.adapter.shared_dimensions, dtype=np.float32)

    @property
    def adapter_spec_hash(self) -> bytes:
        """SHA-256 of the agreed layout."""
        return self.terms.adapter.spec_hash

    def load_global(self, section: str, vector: np.ndarray) -> None:
        """Write down the round in which something was loaded."""
        self.received.append(self._round + 1)

    def keep_own(self, section: str) -> None:
        """Nothing to keep."""

    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        """Draw the vector of a round."""
        self._round = round_number
        draw = np.random.default_rng([self.seed, round_number]).normal(0, 0.3, self._local.size)
        self._local = draw.astype(np.float32)

    def sections(self) -> Mapping[str, np.ndarray]:
        """What is shared."""
        return {"shared": self._local.copy()}

    def save(self, directory: Path) -> None:
        """Write the vector."""
        (directory / "vector").write_bytes(self._local.tobytes())

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        self._local = np.frombuffer((directory / "vector").read_bytes(), self._local.dtype)


@contextmanager
def founded(encryption: Parameters | None = None) -> Iterator[tuple[Path, Coordinator]]:
    """A small federation in a directory of its own, by default with the back end `mask`, and its server."""
    terms = Terms(
        adapter=AdapterTerms(rank=4, blocks=2, target_modules=("a", "b"), protection="encrypted"),
        profile=_MECHANISM,
        schedule=ScheduleTerms(
            rounds=ROUNDS, quorum=4, round_deadline_seconds=60, gathering_seconds=30, key_patience_seconds=30
        ),
        encryption=encryption or MaskParameters(),
    )
    members = tuple(kits.MemberEntry(id=member) for member in MEMBERS)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "federation"
        consortium.create(
            kits.FederationConfig(federation="attempts", members=members, terms=terms), directory
        )
        (directory / "server/server.toml").write_text('listen = "127.0.0.1:0"\nstate_dir = "state"\n')
        settings = settings_from_kit(directory / "server").model_copy(update={"durable": False})
        with Coordinator(settings) as coordinator:
            yield directory, coordinator


def open_member(
    directory: Path, name: str, seed: int, transport: Any
) -> tuple[Participant, VectorLearner, Ledger]:
    """A member with what it needs, opened in its kit; its ledger and state are the caller's to close."""
    kit = kits.open_kit(directory / "clients" / name)
    state = ClientState(kit.directory / "state", kit.roster.federation, name)
    ledger = Ledger.open(state.ledger_path, name, 1e-5, 8.0, accountant="rdp", budgeted_channels=("profile",))
    learner = VectorLearner(seed, kit.roster.terms)
    ids = tuple(f"{name}-{number}" for number in range(100))
    plan, units = AdapterPlan(0.0, 0.1), np.zeros(_MECHANISM.dimensions, dtype=np.int64)
    units[seed] = 100 * 2**24
    total = ClippedSum(units, 0, 0, 100)
    releases = Releases(ledger, kit.roster.terms, state, ids, lambda: total, SecureNoise(), plan)
    member = Participant(kit, transport, learner, state, ledger, plan, releases, Progress())
    return member, learner, ledger


def run_sessions(
    directory: Path,
    transport_of: Callable[[str], Any],
    at_end: Callable[[Participant], object] = lambda _: None,
) -> tuple[dict[str, VectorLearner], list[str]]:
    """Run every member's session in a thread of its own; gives the learners, and what went wrong.

    `at_end` is called with every member when all are through, before its ledger is closed.
    """
    opened = {
        name: open_member(directory, name, seed, transport_of(name)) for seed, name in enumerate(MEMBERS)
    }
    errors: list[str] = []

    def work(name: str) -> None:
        try:
            opened[name][0].session.run()
        except FedMosaicError as error:
            errors.append(f"{name}: {error}")

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in MEMBERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_SECONDS)
    for member, _, ledger in opened.values():
        at_end(member)
        ledger.close()
        member.state.release()
    return {name: learner for name, (_, learner, _) in opened.items()}, errors
