"""The statement that is handed over tells the number of examples to within its cell, and no closer."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest

from builders import DIGEST, charge, founding
from fedmosaic.client import statement as client_statement
from fedmosaic.client.planning import AdapterPlan, sampling_rate
from fedmosaic.client.statement import for_handing_over
from fedmosaic.privacy.accounting import calibrate
from fedmosaic.privacy.accounting.epsilon import default_delta, epsilon
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch, parameters_of
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import ClientInputs, PlannedChannel, PrivacyStatement, StatementInputs
from fedmosaic.privacy.statement.shareable import (
    CELL,
    _rounded,
    cell,
    rounded_delta,
    rounded_noise,
    rounded_rate,
    shareable,
)
from fedmosaic.privacy.statement.words import SERVERS

BATCH, STEPS, ROUNDS, TARGET = 32, 10, 2, 2.0
TERMS = founding(
    adapter=AdapterTerms(rank=4, blocks=2, target_modules=("a",), protection="dp"),
    adapter_privacy={"expected_batch_size": BATCH, "steps_per_round": STEPS, "target_epsilon": TARGET},
    schedule={"rounds": ROUNDS, "quorum": 1},
    encryption={"backend": "plain"},
    allow_plaintext=True,
).terms
PROFILE = GaussianEvent(TERMS.profile.noise_multiplier, 1.0, 1)


@functools.cache
def planned_sigma(target: float, delta: float, rate: float) -> float:
    """RDP plans as PRV does, with a little more noise, in milliseconds."""

    def events(sigma: float) -> list[GaussianEvent]:
        return [PROFILE, GaussianEvent(sigma, rate, STEPS * ROUNDS)]

    return calibrate._search(target, delta, [PROFILE], events, "rdp")


def facts(directory: Path, examples: int) -> StatementInputs:
    """A whole run of a client with so many examples, planned and charged as the client does it."""
    delta = default_delta(examples)
    rate = sampling_rate(TERMS, examples)
    sigma = planned_sigma(TARGET, delta, rate)
    with Ledger.open(
        directory / f"{examples}.sqlite",
        "north",
        delta,
        TARGET,
        "rdp",
        budgeted_channels=("profile", "adapter"),
    ) as ledger:
        epoch = data_epoch(str(index) for index in range(examples))
        events = [GaussianEvent(sigma, rate, STEPS)] * ROUNDS
        for number, event in enumerate((PROFILE, *events)):
            mechanism = {"expected_batch_size": BATCH} if number else {}
            channel = "adapter" if number else "profile"
            charge(ledger, event, channel, number, data_epoch=epoch, mechanism=mechanism, digest=DIGEST)
        rows = tuple(ledger.export())
    client = ClientInputs(
        ledger=rows,
        adapter_protection="dp",
        clipped_share={"adapter": 0.912},
        planned={"adapter": PlannedChannel(sampling_rate=rate, steps=STEPS * ROUNDS)},
        expected_batch_size=BATCH,
    )
    return StatementInputs(run_id="r", clients=(client,))


@pytest.fixture
def planned_with_rdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner with the accountant that takes milliseconds."""

    def plan(terms: Terms, examples: float, delta: float, target: float, _: int) -> AdapterPlan:
        rate = sampling_rate(terms, examples)
        return AdapterPlan(planned_sigma(target, delta, rate), rate)

    monkeypatch.setattr(client_statement, "plan_adapter", plan)


def numbers(inputs: StatementInputs, examples: int) -> tuple[object, ...]:
    """All that the shared statement is a function of, public terms apart."""
    (client,) = for_handing_over(inputs, TERMS, examples).clients
    rounded = _rounded(client)
    events = [row.event() for row in rounded.ledger if row.kind == "RESERVED"]
    return parameters_of(rounded.ledger), tuple(events), rounded.planned["adapter"], rounded.clipped_share


@pytest.mark.usefixtures("planned_with_rdp")
def test_every_number_of_examples_of_a_cell_is_told_alike(tmp_path: Path) -> None:
    low, high = cell(600)
    inside = [int(low) + 1, 600, int(high)]
    assert inside[-1] / inside[0] == pytest.approx(CELL, rel=0.01)
    found = {n: numbers(facts(tmp_path, n), n) for n in (*inside, int(low), int(high) + 1)}
    assert all(found[n] == found[600] for n in inside), "who tries every n is left with the whole cell"
    assert found[int(low)] != found[600] != found[int(high) + 1]


@pytest.mark.slow
def test_what_is_told_is_an_upper_bound_and_within_the_budget(tmp_path: Path) -> None:
    inputs = facts(tmp_path, 600)
    exact, rounded = statement(inputs), shareable(for_handing_over(inputs, TERMS, 600))
    text = rounded.model_dump_json()
    (before,), (after,) = exact.clients, rounded.clients
    assert rounded.shareable
    assert PrivacyStatement.model_validate_json(text) == rounded
    for secret in (before.delta, before.spent_epsilon, 0.912):
        assert repr(secret) not in text
    assert before.spent_epsilon < after.spent_epsilon <= TARGET
    for ours, theirs in zip(before.guarantees, after.guarantees, strict=True):
        assert theirs.delta > ours.delta
        assert (ours.epsilon is None) == (theirs.epsilon is None)
        if ours.epsilon is not None and theirs.epsilon is not None and ours.channel != "profile":
            assert ours.epsilon < theirs.epsilon <= TARGET
            assert ours.attack is not None
            assert theirs.attack is not None
            assert ours.attack.advantage < theirs.attack.advantage
            pairs = zip(ours.persons, theirs.persons, strict=True)
            assert all(mine.epsilon < other.epsilon for mine, other in pairs)
    for ours_m, theirs_m in zip(before.channels[1].mechanisms, after.channels[1].mechanisms, strict=True):
        assert theirs_m.noise_multiplier < ours_m.noise_multiplier
        assert theirs_m.sampling_rate > ours_m.sampling_rate
        assert theirs_m.steps == ours_m.steps
    assert after.channels[0].mechanisms == before.channels[0].mechanisms, "the profile's are public terms"


def test_an_unspent_budget_is_not_said_to_be_spent_nor_a_passed_one_kept(tmp_path: Path) -> None:
    inputs = facts(tmp_path, 600)
    (client,) = inputs.clients
    reserved = [row for row in client.ledger if row.kind == "RESERVED"]
    only_profile = client.model_copy(update={"ledger": client.ledger[:3], "least_noise": 0.5})
    (found,) = shareable(inputs.model_copy(update={"clients": (only_profile,)})).clients
    assert found.spent_epsilon == found.channels[0].epsilon < 0.5
    assert len(reserved) == 1 + ROUNDS


def test_the_three_numbers_are_rounded_towards_more_loss_along_the_same_cells() -> None:
    for examples in (2, 7, 50, 300, 1000, 12345, 10**6):
        low, high = cell(examples)
        assert low <= examples < high == pytest.approx(low * CELL)
        delta, rate = default_delta(examples), min(1.0, 32 / examples)
        assert delta <= rounded_delta(delta) < 1.0
        assert rate <= rounded_rate(rate, 32) <= 1.0
        others = [n for n in range(int(low) + 1, min(int(high), int(low) + 50)) if n >= 2]
        assert {rounded_delta(default_delta(n)) for n in others} <= {rounded_delta(delta)}
        assert {rounded_rate(min(1.0, 32 / n), 32) for n in others} <= {rounded_rate(rate, 32)}
    for sigma, least in itertools.product((0.3, 0.9, 1.0, 8.0), (None, 0.5, 2.0)):
        assert 0.0 < rounded_noise(sigma, least) <= sigma
    assert rounded_noise(0.0, 0.5) == 0.0


def test_without_dp_the_schedule_is_rounded_as_well(tmp_path: Path) -> None:
    shared = []
    for examples in (450, 650):
        with Ledger.open(
            tmp_path / f"{examples}", "north", default_delta(examples), TARGET, budgeted_channels=("profile",)
        ) as ledger:
            rows = tuple(ledger.export())
        client = ClientInputs(
            ledger=rows,
            adapter_protection="none",
            planned={"adapter": PlannedChannel(sampling_rate=BATCH / examples, steps=8)},
            expected_batch_size=BATCH,
        )
        shared.append(shareable(StatementInputs(run_id="r", clients=(client,))).model_dump_json())
    assert shared[0] == shared[1]
    assert json.loads(shared[0])["clients"][0]["channels"][1]["epsilon"] == "infinity"


def test_the_budget_caps_no_figure_against_more_members_than_the_terms_allow_for(tmp_path: Path) -> None:
    """In sums of groups that is the noise of one member alone, of which the ledger's filter knows nothing."""
    delta, group = default_delta(500), {"minimum_contributors": 9, "colluders": 3}
    with Ledger.open(
        tmp_path / "a.sqlite", "north", delta, 2.0, "rdp", budgeted_channels=("profile", "adapter")
    ) as ledger:
        charge(ledger, GaussianEvent(3.0, 1.0, 1), digest=DIGEST, mechanism=group)
        rows = tuple(ledger.export())
    client = ClientInputs(ledger=rows, adapter_protection="distributed-dp", least_noise=3.0)
    inputs = StatementInputs(run_id="r", clients=(client,))
    (handed,) = shareable(inputs).clients
    told = {g.adversary: g.epsilon for g in handed.guarantees if g.channel == "joint"}
    of_one = GaussianEvent(3.0 / math.sqrt(6), 1.0, 1)
    assert told["server_malicious"] == pytest.approx(
        epsilon([GaussianEvent(3.0, 1.0, 1)], handed.delta, "rdp")
    )
    assert told["colluding_recipients"] == pytest.approx(epsilon([of_one], handed.delta, "rdp"))
    assert (told["colluding_recipients"] or 0.0) > 2.0, "more than the budget"


def test_what_went_out_under_dp_is_told_beside_what_was_encrypted(tmp_path: Path) -> None:
    """A ledger that begins with an encrypted federation goes on in one with DP, whose server reads it."""
    delta, dp = default_delta(500), GaussianEvent(1.0, 1.0, 1)
    with Ledger.open(tmp_path / "a.sqlite", "north", delta, 2.0, "rdp", budgeted_channels=("profile",)) as of:
        charge(of, GaussianEvent(8.0, 1.0, 1), "profile", digest=DIGEST)
        charge(of, dp, "adapter", 1, context="with DP", digest=DIGEST)
        charge(of, UNPROTECTED, "adapter", 1, context="encrypted", covered_by="cryptography", digest=DIGEST)
        rows = tuple(of.export())
    for configured in ("encrypted", "dp+encrypted"):
        client = ClientInputs(ledger=rows, adapter_protection=configured, least_noise=1.0)
        inputs = StatementInputs(run_id="r", clients=(client,))
        for made in (statement(inputs), shareable(inputs)):
            told = {(g.channel, g.adversary): g for g in made.clients[0].guarantees}
            both = epsilon([GaussianEvent(8.0, 1.0, 1), dp], made.clients[0].delta, "rdp")
            for server in SERVERS:
                assert told["adapter", server].cover == told["joint", server].cover == "mixed"
                assert told["adapter", server].epsilon == epsilon([dp], made.clients[0].delta, "rdp")
                assert told["joint", server].epsilon == both, "not cut off at the profile's budget"
            assert told["adapter", "network"].cover == "mixed"
            assert told["adapter", "recipient"].epsilon == math.inf


def test_a_bound_on_delta_is_told_as_it_is_and_tells_nothing_of_the_number() -> None:
    """δ of 400 examples and of 30,000 is the bound; around n^-1.1 = 1e-5 a cell still has one δ."""
    assert {rounded_delta(default_delta(n, 1e-5), 1e-5) for n in (50, 400, 30_000)} == {1e-5}
    low, high = cell(35_113)
    cell_of_the_bound = range(math.ceil(low), math.ceil(high), 97)
    assert {rounded_delta(default_delta(n, 1e-5), 1e-5) for n in cell_of_the_bound} == {1e-5}
    assert default_delta(10**6, 1e-5) <= rounded_delta(default_delta(10**6, 1e-5), 1e-5) < 1e-5
