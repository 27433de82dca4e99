"""What can be attacked with the state directory alone that a real client or server leaves behind.

A server's holds profiles and every weight row, for collusion and spoofing; neither holds texts or models.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from fedmosaic.client.state import read_record
from fedmosaic.experiments.attacks.encryption import claimed_row_result, group_key_result
from fedmosaic.experiments.attacks.federation import collusion_results, spoofing_results
from fedmosaic.experiments.attacks.statistics.results import AttackResult
from fedmosaic.experiments.attacks.target import RUN, ServerRun, read_server_run
from fedmosaic.server.storage.store import Store, default_url

_SESSION: Final = "session.json"


class State(NamedTuple):
    """A state directory under attack: what can be carried out, and why nothing else can."""

    name: str
    attack: Callable[[list[str]], list[AttackResult]]
    why_not: str


def is_state(path: Path) -> bool:
    """Whether this is the state directory of a client or server."""
    return (path / _SESSION).is_file() or ((path / RUN).is_file() and not (path / "scenario.json").is_file())


def open_state(path: Path, seed: int) -> State:
    """Read what a server or client left behind; `ConfigurationError` or `StateError` if it is damaged."""
    record = read_record(path)
    if record is not None:
        why = "needs what others released, and a client's state holds none of it; give a server's, or a run"

        def nothing(skipped: list[str]) -> list[AttackResult]:
            skipped.append(f"federation: {why}")
            return []

        return State(f"{record.federation}-{record.client}", nothing, why)
    run = read_server_run(path / RUN)
    why = "needs the members' texts and models, and no server has them; give a run or a scenario"
    return State(run.federation, lambda skipped: _server(path, run, seed, skipped), why)


def _server(path: Path, run: ServerRun, seed: int, skipped: list[str]) -> list[AttackResult]:
    results = [group_key_result(), claimed_row_result(run.policy, seed)]
    weights = run.weights(run.members)[:-1]
    if weights:
        source = "the rows that this server gave"
        results += collusion_results(weights, run.policy, source=source, dp_noise=None, seed=seed)
    else:
        skipped.append("federation: collusion needs two closed rounds; nobody receives the last one's rows")
    if not (path / "server.db").is_file():
        skipped.append(f"federation: spoofing needs the profiles, and their database is not in {path}")
        return results
    store = Store(default_url(path), durable=True)
    try:
        profiles = store.profiles()
    finally:
        store.close()
    if len(profiles) <= run.policy.minimum_contributors:
        skipped.append(f"federation: spoofing needs more profiles than {len(profiles)}")
        return results
    vectors = {name: profile.vector for name, profile in sorted(profiles.items())}
    variance = max(profile.noise_variance for profile in profiles.values())
    return [*results, spoofing_results(vectors, variance, run.relevance, run.policy)]
