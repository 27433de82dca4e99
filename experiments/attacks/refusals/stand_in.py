"""A federation for attacks: real sessions, ledgers, keys and encryption; a vector stands in for the model."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedmosaic.client.client import Participant
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.progress import Progress
from fedmosaic.client.releases import Releases
from fedmosaic.client.session import Session
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.encryption.parameters import MaskParameters, Parameters
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.roster import AdapterTerms, Roster, ScheduleTerms, Terms
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.privacy.mechanism.profile import ClippedSum, ProfileMechanism, Reduction
from fedmosaic.protos.errors import FedMosaicError

MEMBERS: Final = ("ada", "ben", "cid", "dee", "eva")
ROUNDS: Final = 3
_PATIENCE_SECONDS: Final = 120.0


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
        np.save(directory / "vector.npy", self._local)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        self._local = np.load(directory / "vector.npy", allow_pickle=False)


def open_session(
    directory: Path, name: str, seed: int, transport: Any
) -> tuple[Session, VectorLearner, Ledger, ClientState]:
    """A member's session with what it needs, opened in its kit."""
    kit = federation.open_kit(directory / "clients" / name)
    roster: Roster = kit.roster
    state = ClientState(kit.directory / "state", roster.federation, name)
    ledger = Ledger.open(state.ledger_path, name, 1e-5, 8.0, accountant="rdp", budgeted_channels=("profile",))
    learner = VectorLearner(seed, roster.terms)
    ids = tuple(f"{name}-{number}" for number in range(100))
    plan = AdapterPlan(0.0, 0.1)
    releases = Releases(ledger, roster.terms, state, ids, _profile(seed), SecureNoise(), plan)
    member = Participant(kit, transport, learner, state, ledger, plan, releases, Progress())
    return member.session, learner, ledger, state


def run_sessions(
    directory: Path, transport_of: Callable[[str], Any]
) -> tuple[dict[str, VectorLearner], list[str]]:
    """Run every member's session to its end, each in a thread of its own.

    Args:
        directory: of the federation.
        transport_of: a member's line to the server.

    Returns:
        The learners by member, and what went wrong, in words.
    """
    learners: dict[str, VectorLearner] = {}
    errors: list[str] = []
    threads, open_things = [], []
    for seed, name in enumerate(MEMBERS):
        session, learners[name], ledger, state = open_session(directory, name, seed, transport_of(name))
        open_things.append((ledger, state))

        def work(name: str = name, session: Session = session) -> None:
            try:
                session.run()
            except FedMosaicError as error:
                errors.append(f"{name}: {error}")

        threads.append(threading.Thread(target=work, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_SECONDS)
    for ledger, state in open_things:
        ledger.close()
        state.release()
    return learners, errors


def _profile(seed: int) -> Callable[[], ClippedSum]:
    def summed() -> ClippedSum:
        units = np.zeros(_MECHANISM.dimensions, dtype=np.int64)
        units[seed] = 100 * 2**24
        return ClippedSum(units, 0, 0, 100)

    return summed


_MECHANISM: Final = ProfileMechanism(
    probe="none",
    probe_sha256="0" * 64,
    reduction=Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=32),
    noise_multiplier=1.0,
)


def configuration(encryption: Parameters | None = None) -> federation.FederationConfig:
    """Terms of a small federation; with the back end `mask` if no other is given."""
    terms = Terms(
        adapter=AdapterTerms(rank=4, blocks=2, target_modules=("a", "b"), protection="encrypted"),
        profile=_MECHANISM,
        schedule=ScheduleTerms(
            rounds=ROUNDS,
            quorum=4,
            round_deadline_seconds=60,
            gathering_seconds=30,
            key_patience_seconds=30,
        ),
        encryption=encryption or MaskParameters(),
    )
    return federation.FederationConfig(
        federation="attempts",
        members=tuple(federation.MemberEntry(id=member) for member in MEMBERS),
        terms=terms,
    )
