"""What can be attacked with the state directory alone that a real client or server leaves behind.

A server's holds profiles and every weight row: collusion and spoofing run on them. A client's holds its
claim, its ledger and a count of every accepted row: the claim is held against the ledger, the rows against
what the statement says of them. Neither holds texts or models, so all other attacks need a run or a scenario.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedmosaic.client.ledger import SEEN
from fedmosaic.client.state import read_record
from fedmosaic.client.statement import STATEMENT, coalition_rows
from fedmosaic.experiments.attacks.encryption import claimed_row_result, group_key_result
from fedmosaic.experiments.attacks.federation import COLLUSION, collusion_results, spoofing_results
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure
from fedmosaic.experiments.attacks.target import RUN, ServerRun, read_server_run
from fedmosaic.privacy.configuration import parse_json, read_configuration, read_own
from fedmosaic.privacy.ledger.ledger import LEDGER, parameters_of, read_ledger
from fedmosaic.privacy.ledger.rows import charges
from fedmosaic.privacy.ledger.rules import bound_of
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.server.storage.store import Store, default_url

CLAIM: Final = "The statement's claim against the client's own ledger"
ROWS: Final = "Weight rows that the client accepted"
_SESSION: Final = "session.json"


@dataclass(frozen=True)
class State:
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
        why = "needs texts and models, and a client's state holds neither; give a run or a scenario"
        return State(f"{record.federation}-{record.client}", lambda skipped: _client(path, skipped), why)
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
    with closing(Store(default_url(path), durable=True)) as store:
        profiles = store.profiles()
    if len(profiles) <= run.policy.minimum_contributors:
        skipped.append(f"federation: spoofing needs more profiles than {len(profiles)}")
        return results
    vectors = {name: profile.vector for name, profile in sorted(profiles.items())}
    variance = max(profile.noise_variance for profile in profiles.values())
    return [*results, spoofing_results(vectors, variance, run.relevance, run.policy)]


def _client(path: Path, skipped: list[str]) -> list[AttackResult]:
    if not (path / STATEMENT).is_file():
        skipped.append(f"federation: {path} holds no statement; a client writes it after the last round")
        return []
    statement = read_configuration(path / STATEMENT, PrivacyStatement)
    return [*_claim(path, statement, skipped), *_rows(path, statement, skipped)]


def _claim(path: Path, statement: PrivacyStatement, skipped: list[str]) -> list[AttackResult]:
    """Every ε of the statement against the one that the ledger's rows compose to, as they stand now."""
    # Beside the data at a real client.
    seen: Any = parse_json((path / SEEN).read_bytes()) if (path / SEEN).is_file() else {"ledger": str(path)}
    ledger = Path(str(seen["ledger"])) / LEDGER
    if not ledger.is_file():
        skipped.append(f"federation: the claim needs the ledger, and there is none at {ledger}")
        return []
    rows = read_ledger(ledger)
    delta = parameters_of(rows).delta
    channels = statement.clients[0].channels
    unclaimed = [channel.channel for channel in channels if math.isinf(channel.epsilon)]
    note = "a ledger that other runs on the same data have charged since is above the older claim"
    note += f"; no ε is claimed for {', '.join(unclaimed)}" if unclaimed else ""
    results = []
    for channel in channels:
        if channel.channel in unclaimed:
            continue
        wanted = None if channel.channel == "joint" else (channel.channel,)
        spent = bound_of(charges(rows, wanted), delta, channel.accountant).epsilon
        broken = spent > channel.epsilon * (1.0 + 1e-6)
        figure = Figure.exact("ε of the ledger's rows", min(spent, 1e6), channel.epsilon, broken)
        results.append(
            AttackResult(
                attack=CLAIM,
                adversary="nobody: the client's own check",
                sees="statement and ledger",
                statistic=f"composition by {channel.accountant} at δ = {delta:.2g}",
                release=channel.channel,
                setting="product",
                epsilon=channel.epsilon,
                delta=delta,
                figures=(figure,),
                note=note,
            )
        )
    return results


def _rows(path: Path, statement: PrivacyStatement, skipped: list[str]) -> list[AttackResult]:
    """What coalitions hold at most by the rows that were accepted, against what the statement says.

    StateError if the record of them is damaged.
    """
    accepted = path / "rows.json"
    counts = read_own(accepted, lambda kept: {k: int(n) for k, (_, n) in kept.items()}, "restore a backup")
    if not counts or not statement.coalition_rows:
        skipped.append("federation: collusion needs an accepted row, and this client received none")
        return []
    fewest, rounds = min(counts.values()), {int(label.partition("/")[0]) for label in counts}
    told = {row.colluding_recipients: row for row in statement.coalition_rows}
    figures = [Figure.exact("fewest other members in an accepted row", fewest)]
    for row in coalition_rows(fewest, len(rounds) + 1):
        claim = told.get(row.colluding_recipients)
        name = f"independent rows of {row.colluding_recipients} recipient(s), {row.contributors} unknown"
        bound = None if claim is None else float(claim.independent_rows)
        broken = claim is None or row.contributors < claim.contributors
        figures.append(Figure.exact(name, row.independent_rows, bound, broken))
    return [
        AttackResult(
            attack=COLLUSION,
            adversary="colluding recipients",
            sees="their own adapters, aggregates and weight rows: as many as this client's",
            statistic="most independent equations, against what the statement says",
            release=ROWS.lower(),
            setting="product",
            figures=tuple(figures),
            note="as many independent rows as unknown adapters solve for them. A client does not keep the "
            "rows' numbers, so errors are told by the server's state or by a run only",
        )
    ]
