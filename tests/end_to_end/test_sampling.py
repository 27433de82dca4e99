"""A federation larger than its rounds: those drawn take part, and nobody believes in anybody else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.protos.messages import Aggregate, WeightRow

ROUNDS = 6


def _founded(tmp_path: Path) -> tuple[Path, Any]:
    directory = fv.make_federation(tmp_path / "plain", fv.terms("plain", ROUNDS, sampled_clients=4))
    return directory, open_kit(directory / "server").roster


def test_those_drawn_give_and_the_next_ones_take(tmp_path: Path) -> None:
    directory, roster = _founded(tmp_path)
    clients, summary = fv.finish(directory)
    drawn = {n: roster.taking_part(summary["run_id"], n) for n in range(1, ROUNDS + 2)}
    assert len(set(drawn.values())) > 1, "a run in which always the same are drawn shows nothing"
    for result in summary["results"]:
        number = result["round"]
        assert set(result["uploaded"]) == drawn[number]
        rows = result["weights"]["shared"]
        assert set(rows) | set(result["refusals"]["shared"]) == drawn[number + 1]
        assert all(set(row) <= drawn[number] - {name} for name, row in rows.items())
        # Whoever was not in the round before receives too: its last profile is known.
        assert set(rows) - drawn[number] or drawn[number] == drawn[number + 1]
    for name, client in clients.items():
        assert client.learner.trained == [n for n in range(1, ROUNDS + 1) if name in drawn[n]]


class _Naming:
    """A server that names in every row a member that took no part."""

    def __init__(self, inner: Any, name: str, roster: Any, run_id: str) -> None:
        self._inner, self._name, self._roster, self._run_id = inner, name, roster, run_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def pull(self, round_number: int, on_wait: Any = None) -> Aggregate:
        found: Aggregate = self._inner.pull(round_number, on_wait)
        if found.round == 1:
            return found
        drawn = self._roster.taking_part(self._run_id, found.round - 1)
        (away,) = set(fv.MEMBERS) - drawn
        names = (away, *sorted(drawn - {self._name})[:2])
        if self._name in names:
            return found
        bits = 20
        third = (1 << bits) // 3
        row = WeightRow(names, ((1 << bits) - 2 * third, third, third), bits)
        sections = tuple(replace(section, row=row) for section in found.sections)
        return replace(found, sections=sections)


def test_a_row_that_names_a_member_who_took_no_part_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, roster = _founded(tmp_path)
    coordinator = fv.coordinator_of(directory)
    clients = fv.clients_of(directory)
    lines = {"ada": lambda line: _Naming(line, "ada", roster, coordinator.run_id)}
    assert fv.play(coordinator, clients, lines) == {}
    run_id = coordinator.run_id
    coordinator.close()
    mine = [n for n in range(2, ROUNDS + 1) if "ada" in roster.taking_part(run_id, n)]
    forged = [n for n in mine if "ada" in roster.taking_part(run_id, n - 1)]
    assert len(clients["ada"].learner.received) == len(mine) - len(forged)
    refused = [record for record in caplog.records if "who took no part in round" in record.getMessage()]
    assert len(refused) == len(forged)
