"""Whether sharing helps: intervals, words, and training alone beside what was trained together."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedmosaic.client.model import training as training_module
from fedmosaic.client.model.scoring import Score
from fedmosaic.client.result.comparison import compare, paired_difference
from fedmosaic.client.result.ending import last_lines

Leave = Callable[..., Any]


def score(right: list[bool], commonest: float | None = 0.5) -> Score:
    return Score(tuple(right), "most likely choice", commonest)


def test_an_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    draw = random.Random(4)
    held = 0
    for _ in range(200):
        pairs = [(draw.random() < 0.7, draw.random() < 0.6) for _ in range(80)]
        found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        held += found.low <= 0.1 <= found.high
    assert 180 <= held <= 199


def test_pairs_decide_where_single_scores_could_not() -> None:
    base = [True] * 30 + [False] * 30
    better = [True] * 38 + [False] * 22
    assert paired_difference(better, base).decided
    shuffled = [True] * 15 + [False] * 22 + [True] * 23
    found = paired_difference(shuffled, base)
    assert found.mean == paired_difference(better, base).mean
    assert not found.decided


def test_three_rows_decide_nothing_however_they_fall() -> None:
    found = paired_difference([True] * 3, [False] * 3)
    assert found.low == found.high == 1.0
    assert not found.decided


def test_the_verdict_says_what_helps_what_hurts_and_what_cannot_be_told() -> None:
    base, good, bad = score([False] * 40), score([True] * 40), score([False] * 39 + [True])
    same = compare({"base": base, "alone": bad, "federated": bad})
    assert "cannot tell sharing from training alone" in same.verdict()
    helped = compare({"base": base, "alone": bad, "federated": good})
    assert helped.verdict().startswith("Sharing helps you: +0.97 (95 % interval")
    hurt = compare({"base": base, "alone": good, "federated": bad})
    assert hurt.verdict().startswith("Sharing hurts you: -")
    without = compare({"base": base, "federated": good})
    assert "compare_alone = true" in without.verdict()
    assert without.warning() == ""
    warned = compare({"base": base, "federated": bad}).warning()
    assert "always giving the commonest answer, which scores 0.50" in warned


@pytest.mark.parametrize("protection", ["none", "dp"])
def test_training_alone_repeats_and_leaves_the_client_as_it_was(leave: Leave, protection: str) -> None:
    left = leave("llama", protection)
    learner = left.learner
    before = {k: v.clone() for k, v in get_peft_model_state_dict(left.model).items()}
    order = learner._sampler.state_dict()
    alone = learner.score_alone(2)
    assert len(alone.right) == 9
    assert alone.commonest == pytest.approx(6 / 9)
    assert learner.score_alone(2) == alone
    after = get_peft_model_state_dict(left.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert learner._sampler.state_dict() == order


def test_alone_the_first_round_is_not_trained_again_and_no_bit_differs(
    leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = leave("llama", "none", gate_learning_rate=1e-5, blend_received=0.5).learner
    rates = rates_of(learner, monkeypatch)
    ends: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(learner, "_score", lambda *_: ends.append(learner._adapter_tensors()))
    learner.score_alone(3)
    set_peft_model_state_dict(learner._model, learner._alone[0], adapter_name="default")
    for section in learner.sections():
        learner.keep_own(section)
    learner.train(1, None, lambda: None)
    learner.score_alone(3)
    assert len(rates) == 3 + 1 + 2
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def rates_of(learner: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a learner under a linear schedule trains at from now on, as shares of its own rate."""
    rates: list[float] = []
    training = learner._settings.training.model_copy(update={"lr_scheduler_type": "linear"})
    learner._settings = learner._settings.model_copy(update={"training": training})
    train = training_module.train_local

    def watched(model: Any, examples: Any, settings: Any, **options: Any) -> Any:
        rates.append(settings.learning_rate / training.learning_rate)
        return train(model, examples, settings, **options)

    monkeypatch.setattr("fedmosaic.client.learner.train_local", watched)
    return rates


def test_rounds_of_a_linear_schedule_train_with_falling_rates(
    leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = leave("llama", "none").learner
    rates, rounds = rates_of(learner, monkeypatch), learner._terms.schedule.rounds
    learner.score_alone(rounds)
    assert rates == pytest.approx([(rounds - number) / rounds for number in range(rounds)])


def test_after_group_sums_the_personal_part_is_trained_at_the_full_rate(
    leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = leave("llama", "dp").learner
    rates = rates_of(learner, monkeypatch)
    sums = learner._terms.adapter.model_copy(update={"protection": "distributed-dp"})
    learner._terms = learner._terms.model_copy(update={"adapter": sums})
    learner.train_personal(learner._terms.schedule.rounds)
    assert rates == [1.0]


def test_under_dp_training_alone_charges_nothing_and_touches_no_shared_core(
    leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave("llama", "dp")
    learner, seen = left.learner, []
    train = learner._train_locally

    def watched(*arguments: Any, **options: Any) -> None:
        train(*arguments, **options)
        tensors = get_peft_model_state_dict(learner._model)
        seen.append({name: bool(t.any()) for name, t in tensors.items() if "colora_core" in name})

    monkeypatch.setattr(learner, "_train_locally", watched)
    learner.score_alone(2)
    (_, last) = seen
    assert not any(moved for name, moved in last.items() if "personal" not in name)
    assert any(last.values())


def test_the_last_lines_fit_80_columns_and_name_the_next_commands(leave: Leave) -> None:
    from fedmosaic.privacy.statement.models import PrivacyStatement

    left = leave("llama", "encrypted")
    statement = PrivacyStatement.model_validate_json((left.state / "statement.json").read_bytes())
    found = compare(
        {"base": score([False] * 40), "alone": score([False] * 40), "federated": score([True] * 40)}
    )
    place = left.state.relative_to(left.state.parent)
    shown = last_lines(place, place / "adapter" / "round-0003", found, statement)
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    for words in (
        "federated    1.00",
        "Sharing helps you: +1.00",
        "∞ towards recipients",
        "state/adapter/round-0003",
        "fedmosaic export state",
        "fedmosaic chat state",
        "fedmosaic report state",
    ):
        assert words in shown
