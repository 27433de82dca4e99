"""Before a client enrols: what is wrong is found, by the client and by the doctor, and nothing is changed."""

import datetime as dt
import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from builders import charge
from end_to_end.federation_of_vectors import run_all
from fedmosaic.client import client, command
from fedmosaic.client.learner import SAMPLER
from fedmosaic.client.ledger import SEEN
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.preflight import doctor
from fedmosaic.client.preflight.checks import Preflight
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.client.progress import Progress
from fedmosaic.client.result.saved import Opening
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import ClientState, SessionRecord
from fedmosaic.experiments.comparison import report
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation import consortium, identity
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.terms import AdapterPrivacyTerms, AdapterTerms, ScheduleTerms, Terms
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger, read_ledger
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit
from tiny import save_tiny_model

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [*(f"w{i}" for i in range(40)), "yes", "no"]
MEMBERS = ("a", "b", "c", "d")


def rows(count: int, start: int = 0, **changes: Any) -> list[dict[str, Any]]:
    fixed = {"answer": "yes", "choices": ["yes", "no"], **changes}
    return [{"id": f"e{i}", "prompt": f"w{i % 40} w{i // 40}", **fixed} for i in range(start, start + count)]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def server_of(kit: Path) -> Server:
    return Server(settings_from_kit(kit).model_copy(update={"durable": False}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    for seed, name in enumerate(("model", "other")):
        save_tiny_model(folder / name, WORDS, SPECIAL, seed=seed, bos_token_id=1)
    write(folder / "train.jsonl", rows(60))
    write(folder / "test.jsonl", rows(8, 200))
    return folder


def found(model: Path, directory: Path, protection: str = "none", **schedule: int) -> Path:
    """A federation whose probe is a tiny model."""
    probe = open_probe(load_base_model(model)[0])
    mechanism = ProfileMechanism(
        probe="tiny",
        probe_sha256=probe.sha256,
        reduction=Reduction(hidden_size=16, intermediate_size=24, projection_dimensions=32),
    )
    terms = Terms(
        adapter=AdapterTerms(rank=2, blocks=2, protection=protection),
        # Every example in the one step of a round: what the accountant is quickest with.
        adapter_privacy=AdapterPrivacyTerms(expected_batch_size=100, steps_per_round=1),
        profile=mechanism,
        schedule=ScheduleTerms(**{"rounds": 2, "quorum": 4, **schedule}),
        encryption={"backend": "plain"},
        allow_plaintext=True,
    )
    config = FederationConfig(federation="f", members=tuple(MemberEntry(id=m) for m in MEMBERS), terms=terms)
    consortium.create(config, directory)
    (directory / "server" / "server.toml").write_text('listen = "127.0.0.1:0"\nstate_dir = "state"\n')
    return directory


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[tuple[Path, int]]:
    directory = found(place / "model", place / "federation")
    with server_of(directory / "server").background() as port:
        yield directory, port


@pytest.fixture
def config(served: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client.toml with everything right."""
    directory, port = served
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = directory.parent
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(place / name, tmp_path)
    text = f"""
kit = "{directory / "clients" / "a"}"
server = "127.0.0.1:{port}"
state_dir = "state"
profile_max_length = 32
[model]
path = "{place / "model"}"
[probe]
path = "{place / "model"}"
[data]
train = "train.jsonl"
test = "test.jsonl"
[training]
steps = 1
max_length = 32
"""
    path = tmp_path / "client.toml"
    path.write_text(text)
    return path


def preflight(config: Path) -> Preflight:
    settings = read_configuration(config, ClientSettings).located(config.parent)
    return Preflight(settings, Progress(), server_patience_seconds=1.0)


def required(config: Path) -> list[str]:
    warnings: list[str] = []
    checked = preflight(config)
    try:
        checked.require(warnings.append)
    finally:
        checked.close()
    return warnings


def change(config: Path, before: str, after: str) -> None:
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, after))


def test_all_is_well_and_nothing_was_changed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(config.parent.rglob("*"))
    assert doctor.main([str(config)]) == 0
    shown = capsys.readouterr().out
    assert sorted(config.parent.rglob("*")) == before
    assert all(len(line) <= 80 for line in shown.splitlines() if "/" not in line)
    for name in "kit certificate state disk data texts server budget probe model".split():
        assert re.search(rf"^{name} +ok\s", shown, re.MULTILINE), shown
    assert "memory" in shown
    assert "transformers" in shown
    assert required(config) == []


def test_the_question_to_the_server_enrols_nobody(config: Path, served: tuple[Path, int]) -> None:
    required(config)
    with sqlite3.connect(served[0] / "server" / "state" / "server.db") as store:
        tables = {row[0] for row in store.execute("select name from sqlite_master where type='table'")}
        (name,) = (table for table in tables if "client" in table or "member" in table or "enrol" in table)
        assert store.execute(f"select count(*) from {name}").fetchone() == (0,)  # noqa: S608  # a table's name


Damage = Callable[[Path], None]


def other_probe(config: Path) -> None:
    change(config, '[probe]\npath = "', '[probe]\npath = "other')
    text = config.read_text()
    config.write_text(re.sub(r'path = "other(.*)/model"', r'path = "\1/other"', text))


def changed(before: str, after: str) -> Damage:
    return lambda config: change(config, before, after)


def no_probe(config: Path) -> None:
    config.write_text(re.sub(r'(\[probe\]\npath = ").*/model"', r'\1../nowhere/probe"', config.read_text()))


def long_answers(config: Path) -> None:
    change(config, "max_length = 32\n[model]", "max_length = 8\n[model]")
    write(config.parent / "train.jsonl", rows(60, answer="w1 " * 9, choices=[]))


def one_choice(config: Path) -> None:
    write(config.parent / "test.jsonl", rows(2, 200, choices=["yes"]))


def no_server(config: Path) -> None:
    config.write_text(re.sub(r'server = "127.0.0.1:\d+"', 'server = "127.0.0.1:9"', config.read_text()))


def state_of(federation: str) -> Damage:
    def damage(config: Path) -> None:
        state = ClientState(config.parent / "state", federation, "a")
        state.join_run("0" * 32)
        state.release()

    return damage


def other_key(config: Path) -> None:
    kit = Path(re.search(r'kit = "(.*)"', config.read_text()).group(1))  # type: ignore[union-attr]
    mixed = shutil.copytree(kit, config.parent / "kit")
    shutil.copy(kit.parent / "b" / "identity.key", mixed)
    config.write_text(re.sub(r'kit = ".*"', 'kit = "kit"', config.read_text()))


def ledger_of(name: str, delta: float, target: float) -> Damage:
    def damage(config: Path) -> None:
        path = config.parent / "train.jsonl.ledger" / LEDGER
        Ledger.open(path, name, delta, target, budgeted_channels=("profile",)).close()

    return damage


def lost_ledger(config: Path) -> None:
    """The state has seen a ledger that is not there."""
    ledger_of("a", 1e-3, 8.0)(config)
    checked = preflight(config)
    with Ledger.open(checked._ledger, "a", 1e-3, 8.0, budgeted_channels=("profile",)) as ledger:
        (config.parent / "state").mkdir()
        checked._books.remember(ledger)
    shutil.rmtree(checked._ledger.parent)


def older_ledger(config: Path) -> None:
    """The state has seen a later row than the ledger has."""
    ledger_of("a", 1e-3, 8.0)(config)
    (config.parent / "state").mkdir()
    (config.parent / "state" / SEEN).write_text(json.dumps({"ledger": "there", "anchor": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "check", "reason"),
    [
        (lost_ledger, "budget", "holds no privacy ledger, and what a has released"),
        (older_ledger, "budget", "LEDGER_BEHIND.* that the state directory"),
        (other_key, "kit", "identity key"),
        (state_of("elsewhere"), "state", "'elsewhere'"),
        (changed('test = "test.jsonl"', 'test = "train.jsonl"'), "data", "all 60 examples"),
        (one_choice, "data", "example 1 has 1 choice"),
        (long_answers, "texts", "raise profile_max_length to 11"),
        (no_probe, "texts", "There is no folder '../nowhere/probe'"),
        (no_server, "server", "could not be reached"),
        (state_of("f"), "server", "but the server is on run"),
        (
            changed("profile_max_length", "target_epsilon = 100\nprofile_max_length"),
            "budget",
            "a client may be stricter, not looser",
        ),
        (ledger_of("somebody", 1e-3, 4.0), "budget", "opened with other parameters"),
        (ledger_of("a", 0.1, 8.0), "budget", "at most 10 examples"),
        (other_probe, "probe", "profiles of different probes cannot be compared"),
        (
            changed("profile_max_length = 32", "profile_max_length = 65"),
            "probe",
            "profile_max_length is 65.*64 positions",
        ),
        (
            changed("steps = 1\nmax_length = 32", "steps = 1\nmax_length = 65"),
            "model",
            "training.max_length is 65.*64 positions",
        ),
    ],
)
def test_what_is_wrong_is_found_before_enrolment(
    config: Path, damage: Damage, check: str, reason: str
) -> None:
    damage(config)
    checked = preflight(config)
    names = [each.name for each in checked.checks()]
    with closing(checked):
        *sound, wrong = checked.checks()[: names.index(check) + 1]
        for each in sound:
            each.run()
        with pytest.raises(FedMosaicError, match=reason):
            wrong.run()


def test_what_the_server_knows_better_is_found_before_enrolment(
    config: Path, served: tuple[Path, int]
) -> None:
    with closing(sqlite3.connect(served[0] / "server" / "state" / "server.db")) as store:
        (run,) = store.execute("select value from meta where key = 'run'").fetchone()
    state = ClientState(config.parent / "state", "f", "a")
    state.join_run(json.loads(run)["id"])
    state.see(2, bytes(32))
    state.release()
    checked = preflight(config)
    with closing(checked), pytest.raises(FedMosaicError, match="is at round 1, but was at round 2 before"):
        checked._check_server()
    shutil.rmtree(config.parent / "state")
    for damage, reason in ((ledger_of("a", 1e-3, 8.0), "LEDGER_BEHIND.*the server has"), (None, "knows of")):
        if damage is not None:
            damage(config)
        checked = preflight(config)
        checked._kept = bytes(32)
        with pytest.raises(FedMosaicError, match=reason):
            checked._check_budget()
        shutil.rmtree(checked._ledger.parent, ignore_errors=True)


def test_the_client_itself_stops_before_it_loads_trains_or_charges(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_probe(config)
    monkeypatch.setattr(client, "Session", None)
    with pytest.raises(FedMosaicError, match="different probes"):
        command.main([str(config)])
    assert not list(config.parent.rglob(LEDGER))


def test_the_doctor_goes_on_with_what_can_still_be_checked(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_SERVER_PATIENCE_SECONDS", 0.5)
    no_server(config)
    one_choice(config)
    assert doctor.main([str(config)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^kit +ok ", shown, re.MULTILINE)
    assert re.search(r"^data +WRONG\s", shown, re.MULTILINE)
    assert re.search(r"^server +WRONG\s", shown, re.MULTILINE)
    assert re.search(r"^model +- +not checked, because of data", shown, re.MULTILINE)
    assert "a client could not start" in shown


def test_a_certificate_in_its_last_days_is_announced(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = preflight(config)
    checked._check_certificate()
    assert checked.warnings == []
    monkeypatch.setattr(identity, "ANNOUNCED_BEFORE", dt.timedelta(days=91))
    checked._check_certificate()
    assert "the certificate expires in 89 days" in checked.warnings[0]


def test_the_doctor_explains_a_wrong_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(config, "steps = 1", "stepz = 1")
    assert doctor.main([str(config)]) == 1
    assert "did you mean 'steps'" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_saved_state_of_fewer_examples_goes_on_with_the_next_epoch(config: Path) -> None:
    checked = preflight(config)
    learner = checked.learner
    learner._sampler.take(30)
    saved = config.parent / "saved"
    saved.mkdir()
    learner.save(saved)
    write(config.parent / "train.jsonl", rows(61))
    later = preflight(config).learner
    later.load(saved)
    assert later._sampler.state_dict() == {"size": 61, "seed": 0, "epoch": 1, "position": 0}
    (saved / SAMPLER).write_text("{}")
    with pytest.raises(FedMosaicError, match=rf"{SAMPLER}.*delete that file"):
        later.load(saved)
    (saved / SAMPLER).unlink()
    later.load(saved)


def test_a_private_client_is_told_its_plan(place: Path, config: Path, served: tuple[Path, int]) -> None:
    directory = found(place / "model", place / "private", "dp")
    config.write_text(config.read_text().replace(str(served[0]), str(directory)))
    checked = preflight(config)
    told = dict((check.name, check.run()) for check in checked.checks() if check.name in ("kit", "budget"))
    assert checked.warnings == []
    assert "protection 'dp'" in told["kit"]
    assert re.search(r"planned σ = \d", told["budget"])
    assert not (config.parent / "state").exists()
    # An earlier run has had all of it. That of the run that goes on is in the plan already.
    wanted, plan = checked._parameters(8.0), checked.plan
    channels, event = wanted.budgeted_channels, GaussianEvent(plan.noise_multiplier, plan.sampling_rate, 2)
    with Ledger.open(checked._ledger, "a", wanted.delta, 8.0, budgeted_channels=channels) as ledger:
        charge(ledger, event, "adapter", 1, context="1" * 32)
    for run, said in (("2" * 32, 1), ("1" * 32, 0)):
        checked = preflight(config)
        checked.record = SessionRecord(federation="f", client="a", run_id=run)
        checked._check_budget()
        assert len(checked.warnings) == said
        assert all(re.search(r"ε would be [\d.]+, above 8", line) for line in checked.warnings)


def test_a_whole_run_tells_how_it_was_scored(config: Path, served: tuple[Path, int], place: Path) -> None:
    directory = found(place / "model", place / "whole", rounds=1)
    write(config.parent / "test.jsonl", rows(4, 200, choices=[]))
    settings = read_configuration(config, ClientSettings).located(config.parent)
    results: dict[str, client.ClientResult] = {}

    def take_part(number: int, member: str, port: int) -> None:
        # Data of its own: on one ledger, the draws of two members would be two draws of one release.
        train = config.parent / f"{member}.jsonl"
        write(train, rows(60, 1000 * (1 + number)))
        own = settings.model_copy(
            update={
                "kit": directory / "clients" / member,
                "server": f"127.0.0.1:{port}",
                "state_dir": config.parent / member,
                "data": settings.data.model_copy(update={"train": train}),
            }
        )
        results[member] = client.Client(own).run()

    with server_of(directory / "server").background() as port:
        parts = {m: SimpleNamespace(run=partial(take_part, n, m, port)) for n, m in enumerate(MEMBERS)}
        assert run_all(parts) == {}
    result = json.loads((config.parent / "a" / "result.json").read_text())
    assert result["measures"] == {"self": "written answer, same words"}
    assert 0.0 <= result["after"]["self"] <= 1.0
    own = results["a"]
    assert (own.before, own.after) == (result["before"], result["after"])
    assert (own.traffic, own.received_rounds) == (result["traffic"], 0)
    assert own.statement.model_dump_json(indent=2) == (config.parent / "a" / "statement.json").read_text()
    assert own.adapter is not None
    assert (own.adapter / "adapter_model.safetensors").exists()
    assert own.comparison is not None
    assert own.comparison.scores == {"base": own.before["self"], "federated": own.after["self"]}
    assert result["comparison"]["verdict"] == own.comparison.verdict()
    ids = torch.arange(3, 11)[None]
    assert torch.equal(own.model(ids).logits, Opening(state=own.state).open().model(ids).logits)
    assert report.main([str(own.state), "--html", str(config.parent / "page.html")]) == 0
    page = (config.parent / "page.html").read_text()
    assert "cannot tell" in page
    assert "Privacy statement" in page
    ledgers = list(config.parent.rglob(LEDGER))
    assert len(ledgers) == len(MEMBERS)
    assert all(read_ledger(ledger) for ledger in ledgers)
