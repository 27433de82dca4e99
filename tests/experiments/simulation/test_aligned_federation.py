"""Federations whose clients share aligned bases, at ranks of their own, in one process and as processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from fedmosaic.alignment.__main__ import Arguments
from fedmosaic.alignment.__main__ import run as align
from fedmosaic.alignment.settings import AlignmentSettings
from fedmosaic.client.colora import shared_layout
from fedmosaic.client.colora.aligned import basis_name, read_embedded
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.founding import agreed_adapter
from fedmosaic.experiments.scenario.terms import RunFailedError, Scenario
from fedmosaic.experiments.simulation.simulate import make_models
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ModelError

RANK, LOW = 3, 2
TERMS = {"rank": RANK, "blocks": 2, "protection": "none"}


def _silent(_name: str) -> Callable[[int, int], None]:
    return lambda _done, _total: None


@pytest.fixture(scope="module")
def bases(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two alignments of the same two models; `ours` has the small one as its anchor, `theirs` the large."""
    place = tmp_path_factory.mktemp("bases")
    for name, anchor, other in (("ours", "small", "large"), ("theirs", "large", "small")):
        arguments = Arguments(
            anchor=str(tiny_folder / anchor),
            model=(str(tiny_folder / other),),
            out=place / name,
            data=tiny_folder / "public.jsonl",
            settings=AlignmentSettings(rank=RANK, blocks=2, max_length=16),
        )
        align(arguments, _silent)
    return place


def _scenario(make: Any, bases: Path, *, stranger: int | None = None, **changes: Any) -> Scenario:
    """Four clients with aligned checkpoints, the first of a lower rank, `stranger` from another alignment."""
    made: Scenario = make(adapter=TERMS, **changes)
    clients = []
    for number, client in enumerate(made.clients):
        of = "theirs" if number == stranger else "ours"
        update: dict[str, Any] = {"aligned": str(bases / of / Path(client.model.path).name)}
        if number == 0:
            update["rank"] = LOW
        clients.append(client.model_copy(update={"model": client.model.model_copy(update=update)}))
    return made.model_copy(update={"clients": tuple(clients)})


def _blocks(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = vector.reshape(-1, RANK**2 + RANK)
    return rows[:, : RANK**2].reshape(-1, RANK, RANK), rows[:, RANK**2 :]


def test_clients_of_different_ranks_share_one_basis(
    tmp_path: Path, tiny_scenario: Any, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[tuple[int, np.ndarray, np.ndarray]] = []
    load = ModelLearner.load_global

    def load_and_note(self: ModelLearner, section: str, vector: np.ndarray) -> None:
        load(self, section, vector)
        own = shared_layout(self._model).rank
        if section == "shared":
            received.append((own, vector, read_embedded(self._model, RANK, "global")))

    monkeypatch.setattr(ModelLearner, "load_global", load_and_note)
    directory = runner.run_here(_scenario(tiny_scenario, bases), tmp_path, tmp_path, Console(quiet=True))
    record = read_run(directory)
    assert all("after" in result for result in record.clients.values())
    terms = open_kit(directory / "federation" / "server").roster.terms.adapter
    assert terms.basis == basis_name(bases / "ours" / "small") == basis_name(bases / "ours" / "large")
    assert sorted(own for own, _, _ in received) == [LOW, RANK, RANK, RANK]
    for own, given, kept in received:
        # All four averages hold what clients of the full rank learnt in the last dimension.
        cores, biases = _blocks(given)
        assert np.abs(cores[:, LOW:]).max() > 0
        expected_P, expected_Q = cores.copy(), biases.copy()
        expected_P[:, own:], expected_P[:, :, own:], expected_Q[:, own:] = 0, 0, 0
        np.testing.assert_array_equal(_blocks(kept)[0], expected_P.astype(np.float32))
        np.testing.assert_array_equal(_blocks(kept)[1], expected_Q.astype(np.float32))


def test_a_client_of_a_lower_rank_shares_its_leading_block(tiny_scenario: Any, bases: Path) -> None:
    scenario = _scenario(tiny_scenario, bases)
    hosts, terms = make_models(scenario)
    assert len(hosts) == 3  # two architectures, one of them at two ranks
    ranks = set()
    for host in hosts.values():
        vector = read_embedded(host.model, RANK)
        assert vector.size == terms.shared_dimensions
        ranks.add(shared_layout(host.model).rank)
    assert ranks == {LOW, RANK}


def test_a_client_aligned_to_another_anchor_is_refused(tiny_scenario: Any, bases: Path) -> None:
    with pytest.raises(ModelError, match=r"theirs/large has the basis aligned:.*the roster's is aligned:"):
        make_models(_scenario(tiny_scenario, bases, stranger=2))


def test_the_hash_of_the_layout_names_the_basis(tiny_scenario: Any, bases: Path) -> None:
    agreed = agreed_adapter(_scenario(tiny_scenario, bases))
    seeded = agreed.model_copy(update={"basis": ""})
    other = agreed.model_copy(update={"basis": basis_name(bases / "theirs" / "small")})
    assert len({terms.spec_hash for terms in (agreed, seeded, other)}) == 3
    with pytest.raises(ValidationError, match="basis"):
        AdapterTerms(basis="seed:0")


@pytest.mark.parametrize(("rank", "alpha"), [(3, 32.0), (3, 7.3), (2, 32.0), (1, 0.1), (2, 1e-3)])
def test_the_hash_is_the_rosters_at_every_rank(
    tiny_folder: Path, bases: Path, rank: int, alpha: float
) -> None:
    folder = bases / "ours" / "large"
    terms = AdapterTerms(rank=RANK, alpha=alpha, blocks=2, protection="none", basis=basis_name(folder))
    settings = ModelSettings(path=str(tiny_folder / "large"), aligned=str(folder), rank=rank)
    learner = ModelLearner.__new__(ModelLearner)
    learner._terms = type("T", (), {"adapter": terms})()  # all that the hash reads
    learner._model, _ = load_adapted(settings, terms)
    assert learner.adapter_spec_hash == terms.spec_hash
    layer = shared_layout(learner._model)
    assert layer.rank == rank
    assert layer.alpha / rank == pytest.approx(alpha / RANK)


@pytest.mark.parametrize(
    ("model", "terms", "message"),
    [
        ({}, {}, "no aligned checkpoint is named"),
        ({"aligned": "ours/small"}, {"basis": ""}, "the roster's is seed:0"),
        ({"aligned": "ours/small", "rank": 4}, {}, "model.rank is 4, the federation's is 3"),
        ({"aligned": "ours/large"}, {}, "decoder layers"),
        ({"aligned": "ours/small"}, {"rank": 4}, "has rank 3"),
        ({"aligned": "ours/small"}, {"blocks": 1}, "the roster says 84; it lacks some"),
        ({"aligned": "ours"}, {}, "no aligned checkpoint"),
        ({"aligned": "/nowhere/to be found"}, {}, "no aligned checkpoint"),
    ],
)
def test_what_does_not_fit_the_roster_is_refused(
    tiny_folder: Path, bases: Path, model: dict[str, Any], terms: dict[str, Any], message: str
) -> None:
    located = model | ({"aligned": str(bases / model["aligned"])} if "aligned" in model else {})
    agreed = AdapterTerms(**({**TERMS, "basis": basis_name(bases / "ours" / "small")} | terms))
    with pytest.raises(ModelError, match=message):
        load_adapted(ModelSettings(path=str(tiny_folder / "small"), **located), agreed)


def test_a_damaged_checkpoint_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        basis_name(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "COLORA", "basis_label": "seed:0"}')
    with pytest.raises(ModelError, match="not aligned"):
        basis_name(tmp_path)


def test_a_hub_id_is_downloaded(
    tiny_folder: Path, bases: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fedmosaic.client.colora.aligned as aligned

    asked: list[str] = []

    def fetch(name: str, **_options: Any) -> str:
        asked.append(name)
        if name == "somebody/nothing":
            raise FileNotFoundError(name)
        return str(bases / "ours" / "small")

    monkeypatch.setattr(aligned, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    terms = AdapterTerms(**TERMS, basis=basis_name("somebody/small-aligned"))
    load_adapted(ModelSettings(path=str(tiny_folder / "small"), aligned="somebody/small-aligned"), terms)
    assert set(asked) == {"somebody/small-aligned"}
    with pytest.raises(ModelError, match="neither a folder"):
        basis_name("somebody/nothing")


def test_settings_that_make_no_sense_are_named(tiny_scenario: Any) -> None:
    with pytest.raises(ValidationError, match="rank is 8 without an aligned checkpoint"):
        ModelSettings(path="x", rank=8)
    with pytest.raises(ValidationError, match="the probe has no adapter"):
        tiny_scenario(probe={"path": "small", "aligned": "x"})


@pytest.mark.slow
def test_processes_share_an_aligned_basis(tmp_path: Path, tiny_scenario: Any, bases: Path) -> None:
    scenario = _scenario(tiny_scenario, bases)
    record = read_run(runner.run(scenario, tmp_path, tmp_path, Console(quiet=True)))
    assert all("after" in result for result in record.clients.values())
    with pytest.raises(RunFailedError, match="has the basis"):
        runner.run(_scenario(tiny_scenario, bases, stranger=1), tmp_path, tmp_path, Console(quiet=True))
