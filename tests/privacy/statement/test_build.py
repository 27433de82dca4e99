"""The statement: every promise of the threat model's tables, and none that the ledger does not support."""

import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console, RenderableType

from builders import DIGEST, EPOCH, charge
from fedmosaic.privacy.accounting import epsilon as accounting
from fedmosaic.privacy.accounting.epsilon import epsilon, person_epsilon
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.accounting.tradeoff import attack_bounds
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.ledger.rows import Channel, Unit
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement import render as report_text
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.costs import costs_at_epsilon
from fedmosaic.privacy.statement.rounding import round_down, round_up
from fedmosaic.protos.errors import AccountingError, BudgetExceededError, LedgerError

DELTA = 2.7e-5
PROFILE = GaussianEvent(8.0, 1.0, 1)
STEP = GaussianEvent(20.0, 1.0, 5)
READERS: tuple[models.Adversary, ...] = (
    "recipient",
    "colluding_recipients",
    "colluding_recipients_with_server",
)
SERVERS: tuple[models.Adversary, ...] = ("server_honest_but_curious", "server_malicious")
COVERED: dict[models.Protection, str] = {
    "none": "nothing",
    "encrypted": "cryptography",
    "dp": "dp",
    "dp+encrypted": "dp",
    "distributed-dp": "dp",
}
GROUP = {"name": "DP-SGD on P and Q", "minimum_contributors": 9, "colluders": 3}


def to_text(renderable: RenderableType, width: int = report_text.WIDTH) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def make_client(
    directory: Path,
    protection: models.Protection,
    *,
    name: str = "clinic-a",
    secure: bool = True,
    family: models.Protection | None = None,
    target: float | None = None,
    rounds: int = 3,
    step: GaussianEvent | None = None,
    unit: Unit = "example",
    **facts: Any,
) -> models.ClientInputs:
    private = COVERED[protection] == "dp"
    budgeted: tuple[Channel, ...] = ("profile", "adapter") if private else ("profile",)
    with Ledger.open(
        directory / f"{name}.sqlite", name, DELTA, target, budgeted_channels=budgeted, unit=unit
    ) as ledger:

        def release(channel: str, round: int, event: GaussianEvent, covered_by: str) -> None:
            options: dict[str, Any] = {"secure_noise": secure, "covered_by": covered_by, "clipping_norm": 0.5}
            if channel != "profile":
                about = GROUP if protection == "distributed-dp" else {"protection": protection}
                options |= {"mechanism": about, "context": "run-1"}
            charge(ledger, event, channel, round, digest=DIGEST, dimensions=256, **options)

        release("profile", 0, PROFILE, "dp")
        ledger.resent(1, DIGEST, 1)
        for round in range(rounds):
            release("adapter", round, (step or STEP) if private else UNPROTECTED, COVERED[protection])
            if family:
                release("family", round, STEP if COVERED[family] == "dp" else UNPROTECTED, COVERED[family])
        rows = tuple(ledger.export())
    return models.ClientInputs(
        ledger=rows,
        adapter_protection=protection,
        family_protection=family,
        **facts,
    )


def make(*clients: models.ClientInputs, **facts: Any) -> models.PrivacyStatement:
    return statement(models.StatementInputs(run_id="run-1", clients=clients, **facts))


def guarantee(
    client: models.ClientStatement, channel: models.StatementChannel, adversary: models.Adversary
) -> models.Guarantee:
    (found,) = [g for g in client.guarantees if (g.channel, g.adversary) == (channel, adversary)]
    return found


@pytest.fixture(scope="module")
def statements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, models.PrivacyStatement]:
    directory = tmp_path_factory.mktemp("ledgers")
    return {mode: make(make_client(directory, mode, name=f"c{i}")) for i, mode in enumerate(COVERED)}


def test_a_statement_about_persons_says_so_and_has_no_other_figure_for_them(tmp_path: Path) -> None:
    made = make(make_client(tmp_path, "distributed-dp", unit="person"))
    (client,) = made.clients
    assert client.unit == "person"
    assert all(each.unit == "person" and not each.persons for each in client.guarantees)
    assert made.assumptions[0].startswith("The unit of privacy is one person of one client")
    assert not any("one example of one client" in text for text in made.assumptions)
    both = make(
        make_client(tmp_path, "dp", name="b"),
        make_client(tmp_path, "distributed-dp", name="c", unit="person"),
    )
    assert ["one person" in text for text in both.assumptions[:2]] == [False, True]


def test_every_client_channel_and_adversary_has_exactly_one_guarantee(
    statements: dict[str, models.PrivacyStatement],
) -> None:
    for found in statements.values():
        (client,) = found.clients
        pairs = [(g.channel, g.adversary) for g in client.guarantees]
        assert sorted(pairs) == sorted(itertools.product(("profile", "adapter", "joint"), models.ADVERSARIES))
        for each in client.guarantees:
            assert (each.unit, each.neighbouring_relation, each.delta) == (
                "example",
                "add or remove one",
                DELTA,
            )
            assert client.client_id in each.words


@pytest.mark.parametrize("mode", COVERED)
def test_the_profile_is_private_against_everybody(
    statements: dict[str, models.PrivacyStatement], mode: str
) -> None:
    (client,) = statements[mode].clients
    for adversary in models.ADVERSARIES:
        found = guarantee(client, "profile", adversary)
        assert found.epsilon == epsilon([PROFILE], DELTA)
        assert found.cover == ("dp_and_cryptography" if adversary == "network" else "dp")


@pytest.mark.parametrize(
    ("mode", "server", "reader"),
    [
        ("none", ("nothing", math.inf), ("nothing", math.inf)),
        ("encrypted", ("cryptography_only", None), ("nothing", math.inf)),
        ("dp", ("dp", 1.0), ("dp", 1.0)),
        ("dp+encrypted", ("dp_and_cryptography", 1.0), ("dp", 1.0)),
    ],
)
def test_the_adapters_table_of_the_threat_model(
    statements: dict[str, models.PrivacyStatement],
    mode: str,
    server: tuple[str, float],
    reader: tuple[str, float],
) -> None:
    (client,) = statements[mode].clients
    alone = epsilon([STEP] * 3, DELTA)
    for adversaries, (cover, value) in ((SERVERS, server), (READERS, reader)):
        for adversary in adversaries:
            found = guarantee(client, "adapter", adversary)
            assert found.cover == cover
            assert found.epsilon == (alone if value == 1.0 else value)
    network = guarantee(client, "adapter", "network")
    assert network.cover == ("dp_and_cryptography" if "dp" in mode else "cryptography_only")


def test_the_joint_guarantee_composes_what_each_adversary_can_read(
    statements: dict[str, models.PrivacyStatement],
) -> None:
    joint = epsilon([PROFILE, STEP, STEP, STEP], DELTA)
    (private,) = statements["dp"].clients
    assert guarantee(private, "joint", "recipient").epsilon == joint
    assert joint < epsilon([PROFILE], DELTA) + epsilon([STEP] * 3, DELTA)
    (encrypted,) = statements["encrypted"].clients
    server = guarantee(encrypted, "joint", "server_honest_but_curious")
    assert (server.cover, server.cryptography_only) == ("mixed", ("adapter",))
    assert server.epsilon == epsilon([PROFILE], DELTA)
    assert guarantee(encrypted, "joint", "recipient").epsilon == math.inf
    (clear,) = statements["none"].clients
    for adversary in (*SERVERS, *READERS):
        assert guarantee(clear, "joint", adversary).epsilon == math.inf


def test_figures_come_from_the_cross_checked_accountants_and_the_trade_off_curve(
    statements: dict[str, models.PrivacyStatement],
) -> None:
    (client,) = statements["dp"].clients
    profile, adapter, joint = client.channels
    for channel, events in ((profile, [PROFILE]), (adapter, [STEP] * 3), (joint, [PROFILE, *[STEP] * 3])):
        figures = channel.accountants
        assert figures is not None
        assert figures.prv == channel.epsilon == epsilon(events, DELTA)
        assert figures.pld is not None
        assert figures.pld <= figures.prv <= figures.rdp + 0.011
        assert channel.attack.gaussian_mu == attack_bounds(events, DELTA).gaussian_mu
    assert joint.attack.gaussian_mu == pytest.approx(math.sqrt(1 / 64 + 15 / 400))
    (mechanism,) = adapter.mechanisms
    assert (mechanism.noise_multiplier, mechanism.steps, mechanism.releases) == (20.0, 15, 3)
    assert (mechanism.clipping_norm, mechanism.dimensions) == (0.5, 256)
    assert (profile.resends, profile.reservations_never_released) == (1, 0)


def test_a_person_with_several_examples_is_told_against_everybody_who_reads(
    statements: dict[str, models.PrivacyStatement],
) -> None:
    for mode, found in statements.items():
        (client,) = found.clients
        for each in client.guarantees:
            stated = each.epsilon is not None and math.isfinite(each.epsilon)
            assert [figure.examples for figure in each.persons] == ([2, 5, 10] if stated else []), mode
    (client,) = statements["dp"].clients
    joint = guarantee(client, "joint", "server_honest_but_curious")
    assert [figure.epsilon for figure in joint.persons] == [
        person_epsilon([PROFILE, *[STEP] * 3], DELTA, count) for count in (2, 5, 10)
    ]
    assert joint.epsilon is not None
    assert joint.epsilon < joint.persons[0].epsilon
    (encrypted,) = statements["encrypted"].clients
    of_profile = guarantee(encrypted, "joint", "server_malicious").persons
    assert of_profile[0].epsilon == person_epsilon([PROFILE], DELTA, 2), "what is only encrypted is in no ε"
    text = to_text(report_text.render(statements["dp"]))
    assert "10 examples" in text
    assert f"{math.ceil(joint.persons[-1].epsilon * 1000) / 1000:.3f}" in text


def test_examples_of_a_person_may_lie_in_several_disjoint_epochs(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.sqlite", "a", DELTA, None, "rdp") as ledger:
        for number, ids in enumerate((["a", "b"], ["c", "d"])):
            charge(ledger, PROFILE, "profile", number, ids=ids)
        rows = tuple(ledger.export())
    (client,) = make(models.ClientInputs(ledger=rows, adapter_protection="dp")).clients
    found = guarantee(client, "profile", "recipient")
    assert found.epsilon == pytest.approx(epsilon([PROFILE], DELTA, "rdp"))
    assert found.persons[0].epsilon == person_epsilon([PROFILE, PROFILE], DELTA, 2)


def test_contradicting_accountants_make_no_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client(tmp_path, "dp")
    accounting._evaluate.cache_clear()
    monkeypatch.setattr(accounting, "_pld", lambda events, delta, finer=1: 50.0)
    with pytest.raises(AccountingError, match="below PLD"):
        make(client)
    accounting._evaluate.cache_clear()


def test_an_altered_ledger_makes_no_statement(tmp_path: Path) -> None:
    client = make_client(tmp_path, "dp")
    rows = list(client.ledger)
    rows[1] = rows[1].model_copy(update={"noise_multiplier": 80.0})
    with pytest.raises(LedgerError, match="row 1"):
        make(client.model_copy(update={"ledger": tuple(rows)}))
    with pytest.raises(LedgerError, match="row 1"):
        make(client.model_copy(update={"ledger": (rows[0], *rows[2:])}))


def test_the_worse_of_configuration_and_ledger_is_reported(tmp_path: Path) -> None:
    clear = make_client(tmp_path, "none", name="a")
    for claimed in ("encrypted", "dp", "dp+encrypted"):
        (client,) = make(clear.model_copy(update={"adapter_protection": claimed})).clients
        assert guarantee(client, "adapter", "server_honest_but_curious").epsilon == math.inf
        assert "the ledger shows releases" in client.warnings[0]
    hidden = make_client(tmp_path, "encrypted", name="b")
    (client,) = make(hidden.model_copy(update={"adapter_protection": "dp+encrypted"})).clients
    assert guarantee(client, "adapter", "recipient").epsilon == math.inf
    private = make_client(tmp_path, "dp", name="c")
    (client,) = make(private.model_copy(update={"adapter_protection": "none"})).clients
    assert guarantee(client, "adapter", "recipient").epsilon == math.inf


def test_an_unprotected_adapter_is_infinite_even_before_it_was_sent(tmp_path: Path) -> None:
    (client,) = make(make_client(tmp_path, "none", rounds=0)).clients
    assert guarantee(client, "adapter", "server_honest_but_curious").epsilon == math.inf
    (client,) = make(make_client(tmp_path, "dp", rounds=0, name="b")).clients
    assert guarantee(client, "adapter", "server_honest_but_curious").epsilon == 0.0


def test_a_family_without_dp_undoes_a_private_adapter(tmp_path: Path) -> None:
    (client,) = make(make_client(tmp_path, "dp", family="none")).clients
    assert [channel.channel for channel in client.channels] == ["profile", "adapter", "family", "joint"]
    assert guarantee(client, "adapter", "recipient").epsilon == epsilon([STEP] * 3, DELTA)
    assert guarantee(client, "family", "recipient").epsilon == math.inf
    assert guarantee(client, "joint", "recipient").epsilon == math.inf
    assert client.channels[-1].epsilon == math.inf


def test_test_noise_voids_every_guarantee(tmp_path: Path) -> None:
    found = make(make_client(tmp_path, "dp+encrypted", secure=False), make_client(tmp_path, "dp", name="b"))
    assert found.no_guarantee
    tested, real = found.clients
    assert (tested.test_noise, real.test_noise) == (True, False)
    for adversary in READERS:
        for channel in ("profile", "adapter", "joint"):
            voided = guarantee(tested, channel, adversary)
            assert (voided.epsilon, voided.test_noise) == (math.inf, True)
            assert "no guarantee" in voided.words
    assert tested.channels[0].epsilon == math.inf
    assert tested.channels[0].nominal_epsilon == epsilon([PROFILE], DELTA)
    assert guarantee(tested, "adapter", "server_malicious").cover == "cryptography_only"
    assert guarantee(real, "joint", "recipient").epsilon == epsilon([PROFILE, *[STEP] * 3], DELTA)


def test_budget_and_refusals_are_told(tmp_path: Path) -> None:
    target = epsilon([PROFILE, STEP, STEP], DELTA) + 1e-6
    with pytest.raises(BudgetExceededError):
        make_client(tmp_path, "dp", target=target)
    with Ledger.open(
        tmp_path / "clinic-a.sqlite", "clinic-a", DELTA, target, budgeted_channels=("profile", "adapter")
    ) as ledger:
        charge(ledger, GaussianEvent(1e4, 1.0, 1), round=7)
        rows = tuple(ledger.export())
    (client,) = make(models.ClientInputs(ledger=rows, adapter_protection="dp")).clients
    assert client.target_epsilon == target
    assert client.spent_epsilon == epsilon([PROFILE, STEP, STEP, GaussianEvent(1e4, 1.0, 1)], DELTA) <= target
    assert client.refusals == client.channels[1].refusals == 1
    assert client.channels[1].reservations_never_released == 1


def test_the_number_of_recipients_that_suffice_is_that_of_the_smallest_row(tmp_path: Path) -> None:
    client = make_client(tmp_path, "none")
    (told,) = [
        line for line in make(client, smallest_row=3, rounds=2).leaks if "put their sums together" in line
    ]
    assert "the smallest aggregate received here had 3, and 2 recipients can compute those" in told
    assert "hardly change" not in told
    assert "two are enough, whatever the number, if a malicious server chooses their weights" in told
    (told,) = [
        line for line in make(client, smallest_row=11, rounds=6).leaks if "put their sums together" in line
    ]
    assert (
        "had 11, and 6 recipients can compute those from one sum each, 2 recipients from the 5 sums" in told
    )
    assert "aggregates of others, not seen here, may have 3: then 2 recipients" in told
    (told,) = [line for line in make(client, smallest_row=None).leaks if "put their sums together" in line]
    assert "none was received here, the least allowed is 3, and 2 recipients" in told


def test_an_in_process_run_has_no_network(tmp_path: Path) -> None:
    (client,) = make(make_client(tmp_path, "dp"), transport="in_process").clients
    assert guarantee(client, "joint", "network").cover == "nothing_sent"
    assert guarantee(client, "joint", "network").epsilon is None


def test_assumptions_and_leaks_follow_the_run(tmp_path: Path) -> None:
    clear = make_client(tmp_path, "none", name="a")
    shared = make(make_client(tmp_path, "encrypted", name="b"))
    assert any("one client together with the server" in line for line in shared.assumptions)
    assert not any("key" in line for line in make(clear).assumptions)
    assert any("No metric" in line for line in make(clear).assumptions)


def test_only_ckks_leaves_the_sum_unbound_to_the_row(tmp_path: Path) -> None:
    client = make_client(tmp_path, "encrypted")
    words = {name: " ".join(make(client, encryption=name).leaks) for name in ("ckks, ring 2048", "mask", "")}
    assert "a malicious server can hand it a single adapter" in words.pop("ckks, ring 2048")
    assert not any("single adapter in place" in text for text in words.values())
    watched = " ".join(make(client, encryption="ckks, ring 2048", witness="notary").leaks)
    assert "The witness notary recomputes every sum" in watched
    assert "a malicious server can" not in watched


def test_json_is_versioned_fits_its_schema_and_reads_back(
    statements: dict[str, models.PrivacyStatement],
) -> None:
    for found in statements.values():
        text = found.model_dump_json()
        assert "null" not in json.dumps(
            [
                g["epsilon"]
                for c in json.loads(text)["clients"]
                for g in c["guarantees"]
                if g["cover"] in ("dp", "nothing")
            ]
        )
        assert "Infinity" not in text
        assert "NaN" not in text
        assert json.loads(text)["schema_version"] == 1
        assert models.PrivacyStatement.model_validate_json(text) == found
    schema = models.PrivacyStatement.model_json_schema(mode="serialization")
    assert schema["additionalProperties"] is False
    assert schema["properties"]["schema_version"]["const"] == 1
    channel_epsilon = schema["$defs"]["ChannelStatement"]["properties"]["epsilon"]
    assert {"const": "infinity"} in channel_epsilon["anyOf"]
    assert all(value.get("description") for value in schema["$defs"]["Guarantee"]["properties"].values())
    with pytest.raises(ValidationError):
        models.PrivacyStatement.model_validate_json('{"schema_version": 2}')


def test_no_private_hash_or_salt_is_in_a_statement(tmp_path: Path) -> None:
    client = make_client(tmp_path, "dp")
    text = make(client).model_dump_json()
    salt = json.loads(client.ledger[0].mechanism or "")["salt"]
    for secret in (EPOCH, salt, *(row.hash for row in client.ledger), "a" * 64):
        assert secret not in text


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(2.7e-5, 1, 3e-5), (3e-5, 1, 3e-5), (0.991, 2, 1.0), (2.4416, 2, 2.5), (0.0, 2, 0.0), (123.0, 1, 200.0)],
)
def test_rounding_up_keeps_upper_bounds(value: float, digits: int, expected: float) -> None:
    assert round_up(value, digits) == expected
    assert round_up(math.inf, 2) == math.inf


@pytest.mark.parametrize(
    ("value", "expected"), [(0.6865, 0.6), (8.0, 8.0), (0.3, 0.3), (12.8, 10.0), (0.0, 0.0)]
)
def test_rounding_down_keeps_lower_bounds(value: float, expected: float) -> None:
    assert round_down(value, 1) == expected


def test_what_another_epsilon_would_have_cost(tmp_path: Path) -> None:
    planned = {"adapter": models.PlannedChannel(sampling_rate=1.0, steps=15)}
    found = make(
        make_client(tmp_path, "dp", name="a"),
        make_client(tmp_path, "none", name="b", planned=planned),
        make_client(tmp_path, "none", name="c"),
    )
    a, b, c = ([*costs_at_epsilon(client, 1.0)] for client in found.clients)
    assert [cost.channel.channel for cost in a] == ["profile", "adapter", "joint"]
    assert len(b) == len(c) == 3
    assert 0.98 <= epsilon([GaussianEvent(a[0].needed[0], 1.0, 1)], DELTA) <= 1.0
    for joint in (a[-1], b[-1]):
        assert 0.98 <= epsilon([PROFILE, GaussianEvent(joint.needed[0], 1.0, 15)], DELTA) <= 1.0
    assert a[-1].current == (20.0,)
    assert b[-1].current == (0.0,)
    assert "where there was no noise" in b[1].words
    assert c[1].needed == ()
    assert "no schedule is known" in c[-1].words
    tight = costs_at_epsilon(found.clients[0], 0.2)[-1]
    assert len(tight.needed) == 2, "below the profile's own ε both channels need more noise"
    for target in (0.0, math.nan, 101.0):
        with pytest.raises(AccountingError, match="target"):
            costs_at_epsilon(found.clients[0], target)
    text = to_text(report_text.render_costs([*a, *b, *c], 1.0))
    assert max(map(len, text.splitlines())) <= 100


def test_the_text_fits_100_columns_and_names_everybody(tmp_path: Path) -> None:
    found = make(
        make_client(tmp_path, "dp", name="a", family="dp", target=8.0, clipped_share={"profile": 0.9}),
        make_client(tmp_path, "dp+encrypted", name="a-client-with-quite-a-long-name-of-its-own-0123456789"),
        make_client(tmp_path, "encrypted", name="c"),
        make_client(tmp_path, "dp", name="d", secure=False),
        coalition_rows=(models.CoalitionRows(colluding_recipients=2, independent_rows=6, contributors=4),),
        encryption="CKKS",
        created="2026-05-04T10:30:00Z",
    )
    text = to_text(report_text.render(found))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "\x1b" not in text
    for words in ("server, honest but curious", "server, malicious", "recipients + server", "the network"):
        assert text.count(words) >= 4
    assert "2 recipients together can compute every adapter that went into what they received" in text
    assert "clipped" not in text, "a share that alarms and that no ε depends on"
    narrow = to_text(report_text.client_grid(found.clients[1]), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert len(re.findall(r"\bencrypted\b", narrow)) >= 4, "a word is broken"
    assert text.count("You trust nobody but your own machine") == 2
    assert text.count("You trust the other members, and that none of them helps the server.") == 1
    assert "NOT protected against" in text
    assert "NO GUARANTEE HOLDS" in text
    for line in (*found.assumptions, *found.leaks):
        assert line.split()[0] in text


def test_in_the_clear_cannot_be_missed(tmp_path: Path) -> None:
    found = make(make_client(tmp_path, "none"))
    text = to_text(report_text.render(found))
    assert (
        "IN THE CLEAR: the shared adapter is not protected from the server or the recipients: ε = ∞." in text
    )
    assert text.count("ε = ∞ IN THE CLEAR") == 5
    private = to_text(report_text.render(make(make_client(tmp_path, "dp", name="b"))))
    assert "IN THE CLEAR" not in private
    assert "∞" not in private


def test_a_printed_statement_does_not_tell_delta_exactly(tmp_path: Path) -> None:
    text = to_text(report_text.render(make(make_client(tmp_path, "dp"))))
    assert "δ = 3e-05" in text
    assert "2.7e-05" not in text


def test_subsampled_adapter_and_parallel_composition(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.sqlite", "a", DELTA, None, "rdp") as ledger:
        for round, ids in enumerate((["a", "b"], ["c"])):
            for channel, event in (("profile", PROFILE), ("adapter", GaussianEvent(1.0, 0.016, 50))):
                charge(ledger, event, channel, round, ids=ids)
        rows = tuple(ledger.export())
    (client,) = make(models.ClientInputs(ledger=rows, adapter_protection="dp")).clients
    joint = client.channels[-1]
    events = [PROFILE, GaussianEvent(1.0, 0.016, 50)]
    assert joint.parallel_composition
    assert joint.epsilon == epsilon(events, DELTA, "rdp")
    assert joint.accountant == "rdp"
    assert joint.attack.advantage == attack_bounds(events, DELTA).advantage
    assert 0 < joint.attack.gaussian_mu < 1


def test_noise_of_a_group_protects_less_the_more_members_are_against_one(tmp_path: Path) -> None:
    (client,) = make(make_client(tmp_path, "distributed-dp")).clients
    # At least 9 contributors, 3 of whom the claim allows to help the server: σ = s·√6.
    beyond = ("colluding_recipients", "colluding_recipients_with_server")
    for adversary in models.ADVERSARIES:
        left = 1 if adversary in beyond else 6
        event = GaussianEvent(STEP.noise_multiplier * math.sqrt(left / 6), 1.0, 5)
        told = guarantee(client, "adapter", adversary).epsilon
        assert told == pytest.approx(epsilon([event] * 3, DELTA), rel=1e-9)
        joint = guarantee(client, "joint", adversary).epsilon
        assert joint == pytest.approx(epsilon([PROFILE, *[event] * 3], DELTA), rel=1e-9)
    whole = make(make_client(tmp_path, "distributed-dp", name="b"))
    assert any("whoever adds none" in each for each in whole.assumptions)
    assert "every sum of a group" in whole.leaks[-1]
    assert not any("What a recipient gets is" in each for each in whole.leaks), "there are no weight rows"
    assert "more of them than the terms allow" in guarantee(client, "adapter", "colluding_recipients").words


def test_every_release_of_a_ledger_has_the_noise_of_its_own_terms(tmp_path: Path) -> None:
    """Runs of other terms on the same data: alone, in groups of nine, in groups of twelve."""
    terms = (None, GROUP, {**GROUP, "minimum_contributors": 12, "colluders": 1})
    with Ledger.open(tmp_path / "a.sqlite", "a", DELTA, None, budgeted_channels=("adapter",)) as ledger:
        for number, mechanism in enumerate(terms):
            charge(ledger, STEP, "adapter", number, digest=DIGEST, mechanism=mechanism)
        rows = tuple(ledger.export())
    for protection in ("dp", "distributed-dp"):
        whole = make(models.ClientInputs(ledger=rows, adapter_protection=protection))
        # What the noise of the groups rests on, also in a run that forms none.
        assert any("whoever adds none" in each for each in whole.assumptions)
        (client,) = whole.clients
        for adversary, left in {"server_malicious": (1, 1, 1), "colluding_recipients": (1, 6, 11)}.items():
            events = [GaussianEvent(STEP.noise_multiplier / math.sqrt(part), 1.0, 5) for part in left]
            told = guarantee(client, "adapter", adversary).epsilon  # type: ignore[arg-type]  # as above
            assert told == pytest.approx(epsilon(events, DELTA), rel=1e-9)
