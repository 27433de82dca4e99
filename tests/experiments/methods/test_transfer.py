"""Knowledge that crosses architectures: told truly, carried across tokenizers, learnt, and added up right."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token
from fedmosaic.client.model.loss import example_losses
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.experiments.methods import fedmkt, knowledge, takfl
from fedmosaic.experiments.methods.distillation import answer_logits
from fedmosaic.experiments.methods.fedmd import FedMd, mean_knowledge
from fedmosaic.experiments.methods.fedmkt import FedMkt, better_known
from fedmosaic.experiments.methods.knowledge import (
    Knowledge,
    Lesson,
    Translator,
    cross_entropies,
    knowledge_of,
    learn,
)
from fedmosaic.experiments.methods.lora import load_with_lora, read_adapter, using, write_adapter
from fedmosaic.experiments.methods.strategy import SHARED, ServerSide
from fedmosaic.experiments.methods.takfl import Takfl
from fedmosaic.experiments.methods.vocabulary import VocabularyMap
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.participants import read_evaluations
from fedmosaic.protos.errors import ModelError

TRAINING = TrainingSettings(steps=2, per_device_train_batch_size=4, learning_rate=0.05, max_length=16)


_SPECIAL = ["<unk>", "</s>"]


def _letters(vocabulary: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer that cuts texts by a pattern."""
    tokens = [*_SPECIAL, *vocabulary]
    inner = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=_SPECIAL[0]))
    cut = Split(Regex(pattern), "isolated")
    inner.pre_tokenizer = cut
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=_SPECIAL[0], eos_token=_SPECIAL[1], pad_token=_SPECIAL[1]
    )


@pytest.fixture
def servers(tiny_scenario: Any) -> dict[str, ServerSide]:
    scenario = tiny_scenario()
    texts = [Example(str(i), f"w{i} w{i + 1}", ("yes", "no")[i % 2], ("yes", "no")) for i in range(12)]
    made = {}
    for number, name in ((1, "small"), (0, "large")):
        model, tokenizer = load_with_lora(
            scenario.clients[number].model, scenario.adapter, Takfl.adapters, rank=2, seed=0
        )
        made[name] = ServerSide(
            model,
            encode_examples(tokenizer, texts, 16),
            padding_token(tokenizer),
            TRAINING,
            {f"{name}-a": 2, f"{name}-b": 2},
            name,
            tokenizer,
            texts,
        )
    return made


def _uploads(servers: dict[str, ServerSide], scale: float = 0.3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.normal(0, scale, read_adapter(server.model, SHARED).size).astype(np.float32)
        for server in servers.values()
        for name in server.ranks
    }


# --- telling


def test_knowledge_is_the_models_own_distribution_and_loss(servers: dict[str, ServerSide]) -> None:
    server = servers["small"]
    vector = _uploads(servers)["small-a"]
    told = knowledge_of(server, [vector], 2.0)
    write_adapter(server.model, SHARED, vector)
    with using(server.model, [SHARED]), torch.no_grad():
        for number, item in enumerate(told):
            batch = collate([server.public[number]], server.pad_token_id)
            expected = (answer_logits(server.model, batch)[0] / 2.0).softmax(-1)
            dense = torch.zeros_like(expected).scatter_(1, item.tokens, item.probabilities)
            # Fewer words than are told at most: only what is below one in ten thousand is left out.
            torch.testing.assert_close(dense, expected, atol=1e-3, rtol=0)
            assert item.loss == pytest.approx(float(example_losses(server.model, batch)), rel=1e-4)


def test_the_mean_of_one_models_logits_twice_is_that_model(servers: dict[str, ServerSide]) -> None:
    server = servers["small"]
    vector = _uploads(servers)["small-a"]
    for one, two in zip(knowledge_of(server, [vector]), knowledge_of(server, [vector] * 2), strict=True):
        torch.testing.assert_close(one.probabilities, two.probabilities)
    with pytest.raises(ModelError, match="no model"):
        knowledge_of(server, [])


# --- carrying


def test_tokens_go_to_the_same_text_or_the_nearest() -> None:
    ours = _letters(["util", "ize", "cat"], ".")
    theirs = _letters(["utilize", "size", "cat"], ".")
    mapped = VocabularyMap(ours, theirs)(torch.tensor([[4, 2], [3, 1]]))
    texts = [theirs.convert_ids_to_tokens(row.tolist()) for row in mapped]
    assert texts == [["cat", "utilize"], ["size", "</s>"]]


def test_predictions_cross_where_both_cut_alike(servers: dict[str, ServerSide]) -> None:
    whole = _letters(["ab", "cd", "ax"], "ab|cd|ax")
    single = _letters(["a", "b", "c", "d", "x"], ".")
    example = Example("1", "p", "abcd")
    source = replace(servers["small"], tokenizer=whole, examples=[example], architecture="whole")
    target = replace(servers["small"], tokenizer=single, examples=[example], architecture="single")
    # Of "ab" it is sure by two thirds, else "ax"; of "cd" sure; of the end by half.
    told = Knowledge(
        torch.tensor([[2, 4], [3, 2], [1, 3]]), torch.tensor([[2 / 3, 1 / 3], [1.0, 0.0], [0.5, 0.5]]), 0.7
    )
    (carried,) = Translator()([told], source, target)
    dense = torch.zeros(5, len(single)).scatter_add_(1, carried.tokens, carried.probabilities)
    names = ["<unk>", "</s>", "a", "b", "c", "d", "x"]
    rows = [{names[i]: round(float(v), 3) for i, v in enumerate(row) if v > 0} for row in dense]
    # "ab" and "ax" are nearest to "a"; the rest of each span is what stands there.
    assert rows == [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"d": 1.0}, {"</s>": 0.5, "c": 0.5}]
    assert carried.loss == 0.7
    (back,) = Translator()([carried], target, source)
    assert len(back.tokens) == 3
    torch.testing.assert_close(back.probabilities.sum(-1), torch.ones(3))


def test_one_vocabulary_needs_no_translation(servers: dict[str, ServerSide]) -> None:
    told = knowledge_of(servers["small"], [_uploads(servers)["small-a"]])
    carried = Translator()(told, servers["small"], servers["large"])
    assert all(a is b for a, b in zip(told, carried, strict=True))


# --- learning


def test_the_loss_is_the_cross_entropy_with_the_targets(servers: dict[str, ServerSide]) -> None:
    server = servers["small"]
    batch = collate(server.public[:3], server.pad_token_id)
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 46)
    tokens = torch.arange(46).repeat(2, 1)
    probabilities = torch.rand(2, 46)
    probabilities /= probabilities.sum(-1, keepdim=True)
    target = Knowledge(tokens, probabilities, 0.0)
    losses = cross_entropies(logits, batch, [target, None, target], 3.0)
    expected = torch.nn.functional.cross_entropy(logits[0] / 3.0, probabilities) * 9.0
    torch.testing.assert_close(losses[0], expected)
    assert losses[1] == 0.0


def test_a_student_comes_to_say_what_it_is_taught(servers: dict[str, ServerSide]) -> None:
    student, teacher = servers["large"], servers["small"]
    uploads = _uploads(servers, 1.0)
    lesson = knowledge_of(teacher, [uploads["small-a"]])

    def distance(vector: np.ndarray) -> float:
        write_adapter(student.model, SHARED, vector)
        with using(student.model, [SHARED]), torch.no_grad():
            batch = collate(student.public, student.pad_token_id)
            return float(cross_entropies(answer_logits(student.model, batch), batch, lesson).mean())

    start = read_adapter(student.model, SHARED)
    before = distance(start)
    after = distance(learn(student, start, Lesson(lesson), steps=30))
    entropy = float(
        np.mean([-(k.probabilities * k.probabilities.clamp(min=1e-9).log()).sum(-1).mean() for k in lesson])
    )
    assert after - entropy < 0.5 * (before - entropy)


def test_a_student_that_is_held_stays_nearer_to_what_it_said(servers: dict[str, ServerSide]) -> None:
    slow = TRAINING.model_copy(update={"learning_rate": 0.001})
    student = replace(servers["large"], settings=slow)
    lesson = knowledge_of(servers["small"], [_uploads(servers, 1.0)["small-a"]])
    start = _uploads(servers)["large-a"]
    free = learn(student, start, Lesson(lesson), steps=20)
    held = learn(student, start, Lesson(lesson, anchor_weight=1.0, anchor_temperature=2.0), steps=20)

    def moved(vector: np.ndarray) -> float:
        told = []
        for adapter in (vector, start):
            write_adapter(student.model, SHARED, adapter)
            with using(student.model, [SHARED]), torch.no_grad():
                batch = collate(student.public, student.pad_token_id)
                told.append(answer_logits(student.model, batch).softmax(-1))
        return float((told[0] - told[1]).abs().sum())

    assert moved(held) < 0.7 * moved(free)


def test_nothing_to_learn_leaves_the_student_as_it_is(servers: dict[str, ServerSide]) -> None:
    start = _uploads(servers)["small-a"]
    assert learn(servers["small"], start, Lesson([None] * 12)) is start


def test_the_mean_of_opinions_is_their_mean() -> None:
    one = Knowledge(torch.tensor([[1, 2]]), torch.tensor([[0.75, 0.25]]), 1.0)
    other = Knowledge(torch.tensor([[2, 3]]), torch.tensor([[0.5, 0.5]]), 3.0)
    mean = mean_knowledge([one, other])
    dense = torch.zeros(1, 4).scatter_add_(1, mean.tokens, mean.probabilities)
    assert dense.tolist() == [[0.0, 0.375, 0.375, 0.25]]
    assert mean.loss == 2.0


# --- the methods


def test_takfl_adds_the_mean_of_its_task_vectors_and_none_is_zero(
    servers: dict[str, ServerSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = _uploads(servers)
    real, starts, ends = learn, [], []

    def watched(server: ServerSide, start: np.ndarray, lesson: Lesson, steps: int = 3) -> np.ndarray:
        result = real(server, start, lesson, 3)
        starts.append(start)
        ends.append(result)
        return result

    monkeypatch.setattr(takfl, "learn", watched)
    exchanged = Takfl().exchange(uploads, servers)
    mean = np.mean([uploads["small-a"], uploads["small-b"]], axis=0)
    # Two teachers for each of two students, every lesson from the student's mean.
    assert len(ends) == 4
    for start in starts[:2]:
        np.testing.assert_allclose(start, mean, rtol=1e-6)
    assert all(np.abs(end - start).max() > 1e-4 for start, end in zip(starts, ends, strict=True))
    expected = mean + np.mean([ends[0] - mean, ends[1] - mean], axis=0)
    np.testing.assert_allclose(exchanged.received["small-a"], expected, atol=1e-6)
    assert np.array_equal(exchanged.received["small-a"], exchanged.received["small-b"])
    assert exchanged.sent["small-a"] == uploads["small-a"].nbytes


def test_fedmd_sends_what_is_said_and_no_weights(servers: dict[str, ServerSide]) -> None:
    uploads = _uploads(servers)
    exchanged = FedMd().exchange(uploads, servers)
    assert set(exchanged.received) == set(uploads)
    # 12 answers of two tokens, 46 words each with a probability, and a loss.
    assert exchanged.sent["small-a"] == 12 * (2 * 46 * 8 + 4)
    assert exchanged.got["small-a"] == 12 * (4 * 2 * 46 * 8 + 4)
    assert not np.array_equal(exchanged.received["small-a"], exchanged.received["small-b"])


def test_fedmkt_learns_only_what_is_known_better() -> None:
    def known(loss: float) -> Knowledge:
        return Knowledge(torch.tensor([[1]]), torch.tensor([[1.0]]), loss)

    others, own = [known(1.0), known(2.0), known(3.0)], [known(2.0), known(2.0), known(1.0)]
    assert better_known(others, own) == [others[0], None, None]


def test_fedmkt_keeps_a_model_per_architecture_and_never_averages(servers: dict[str, ServerSide]) -> None:
    method = FedMkt()
    uploads = _uploads(servers)
    first = method.exchange(uploads, servers)
    assert set(method.server_state) == {"small", "large"}
    kept = {name: vector.copy() for name, vector in method.server_state.items()}
    method.exchange(uploads, servers)
    assert all(not np.array_equal(kept[name], method.server_state[name]) for name in kept)
    distances = [float(np.abs(first.received[name] - uploads[name]).max()) for name in uploads]
    assert max(distances) < float(np.abs(uploads["small-a"] - uploads["small-b"]).max())


@pytest.mark.slow
def test_a_server_that_remembers_goes_on_where_it_stopped(
    tmp_path: Path, tiny_scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (fedmkt, knowledge):
        monkeypatch.setattr(place, "learn", partial(learn, steps=2))
    scenario = tiny_scenario(method="fedmkt", schedule={"rounds": 2, "quorum": 4}, score="own")
    scenario = scenario.model_copy(update={"clients": scenario.clients[1:3]})
    whole = runner.run_here(scenario, tmp_path, tmp_path / "a", Console(quiet=True))
    short = scenario.model_copy(update={"schedule": scenario.schedule.model_copy(update={"rounds": 1})})
    parted = runner.run_here(short, tmp_path, tmp_path / "b", Console(quiet=True))
    (parted / "scenario.json").write_text(scenario.model_dump_json())
    runner.resume(parted, Console(quiet=True))
    for client in scenario.clients:
        place = Path("federation") / "clients" / client.id / "state"
        assert read_evaluations(whole / place)[2] == read_evaluations(parted / place)[2]
    stores = [next((run / "baseline").glob("round-*")) / "server.safetensors" for run in (whole, parted)]
    assert stores[0].read_bytes() == stores[1].read_bytes()


def test_even_opinions_of_a_large_vocabulary_are_told(servers: dict[str, ServerSide]) -> None:
    server = servers["small"]
    vector = _uploads(servers)["small-a"]
    for item in knowledge_of(server, [vector], 1e6):
        torch.testing.assert_close(item.probabilities.sum(-1), torch.ones(len(item.probabilities)))
        assert float(item.probabilities.max()) == pytest.approx(1 / 46, rel=1e-3)
