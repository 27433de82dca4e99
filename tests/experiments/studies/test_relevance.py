"""The relevance study counts what it says, marks what it must, and runs end to end on a tiny model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from builders import tiny_mechanism
from fedmosaic.client.model.examples import IGNORED, Example, encode_examples
from fedmosaic.client.profile.probe import gradient_factors, open_probe
from fedmosaic.experiments.studies.relevance import command as relevance
from fedmosaic.experiments.studies.relevance.command import measure, top_match
from fedmosaic.experiments.studies.relevance.designs import DESIGNS, Design, encode, fit_sides
from fedmosaic.experiments.studies.relevance.tables import Cell, draw, markdown
from fedmosaic.experiments.tasks.relevance_sets import CLINC_DOMAINS, load_public, load_task_set
from fedmosaic.privacy.mechanism.gaussian import GRID
from fedmosaic.privacy.mechanism.noise import IntArray
from fedmosaic.privacy.mechanism.profile import ProfileMechanism
from fedmosaic.protos.errors import ConfigurationError
from tiny import tiny_llama, word_tokenizer

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets of the study are not here")


def test_top_match_ignores_the_diagonal() -> None:
    similarity = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.8, 0.1, 1.0]])
    assert top_match(similarity, np.array([0, 0, 1])) == pytest.approx(2 / 3)


def mechanism(noise_multiplier: float) -> ProfileMechanism:
    return tiny_mechanism((4, 4, 16), noise_multiplier=noise_multiplier)


def task_units(tasks: int, rows: int) -> list[IntArray]:
    """Tasks along different axes, with scatter of the same size."""
    generator = np.random.default_rng(0)
    units = []
    for task in range(tasks):
        values = generator.standard_normal((rows, 16))
        values[:, task] += 4.0
        values /= np.linalg.norm(values, axis=1, keepdims=True) * (1 + 1e-9)
        units.append(np.trunc(values * GRID).astype(np.int64))
    return units


def test_recovery_falls_from_certainty_to_chance_with_the_noise() -> None:
    levels = [mechanism(sigma) for sigma in (0.0, 10.0, 1e5)]
    clear, blurred, lost = measure(task_units(8, 200), levels, n=60, trials=40, seed=0)
    assert clear == (1.0, 1.0, False)
    assert 0.6 < blurred[0] < 1.0
    assert lost[:2] == pytest.approx((0.5, 1 / 15), abs=0.06)


def test_drawing_with_replacement_is_marked() -> None:
    for n, expected in ((100, False), (101, True)):
        ((_, _, replaced),) = measure(task_units(2, 200), [mechanism(0.0)], n=n, trials=2, seed=0)
        assert replaced is expected


def test_the_study_can_be_repeated() -> None:
    first, again = (measure(task_units(3, 60), [mechanism(5.0)], 20, 3, seed=4) for _ in range(2))
    assert first == again
    assert measure(task_units(3, 60), [mechanism(5.0)], 20, 3, seed=5) != first


def cells() -> list[Cell]:
    return [
        Cell("tiny", "easy", design, 256, n, epsilon, auc, 0.5, n > 300)
        for design, auc in (("a", 0.75), ("b", 0.5))
        for n in (300, 1000)
        for epsilon in (math.inf, 1.0)
    ]


def test_table_shows_every_cell_and_marks_the_bootstrap() -> None:
    lines = markdown(cells()).splitlines()
    assert "| design | k | n=300 ε=∞ | n=300 ε=1 | n=1000 ε=∞ | n=1000 ε=1 |" in lines
    assert "| a | 256 | 0.750 / 0.50 | 0.750 / 0.50 | 0.750 / 0.50† | 0.750 / 0.50† |" in lines


def test_figure_is_drawn(tmp_path: Path) -> None:
    draw(cells(), tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_unknown_sets_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="easy, hard_news, hard_intents"):
        load_task_set("nonsense", tmp_path, 10, 0)
    with pytest.raises(ConfigurationError, match=r"gsm8k.train\.jsonl is missing"):
        load_task_set("easy", tmp_path, 10, 0)
    with pytest.raises(ConfigurationError, match="is missing"):
        load_public(tmp_path, 10, 0)


@needs_data
@pytest.mark.parametrize(("name", "tasks"), [("easy", 10), ("hard_news", 4), ("hard_intents", 10)])
def test_task_sets_have_distinct_examples_enough_for_n_1000_twice(name: str, tasks: int) -> None:
    found = load_task_set(name, DATA, 2000, 0)
    assert [len(examples) for examples in found.values()] == [2000] * tasks
    for examples in found.values():
        assert len({(example.prompt, example.answer) for example in examples}) == 2000


@needs_data
def test_public_data_shares_no_text_with_any_task() -> None:
    public = {example.prompt for example in load_public(DATA, 10_000, 0)}
    assert len(public) > 5000
    for name in ("easy", "hard_news", "hard_intents"):
        for examples in load_task_set(name, DATA, 10_000, 0).values():
            assert public.isdisjoint(example.prompt for example in examples)


def test_intents_are_in_one_domain_each() -> None:
    intents = [intent for domain in CLINC_DOMAINS.values() for intent in domain.split()]
    assert len(intents) == len(set(intents)) == 150
    assert all(len(domain.split()) == 15 for domain in CLINC_DOMAINS.values())


WORDS = [f"w{index}" for index in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(["<unk>", "</s>", *WORDS], eos_token="</s>", pad_token="</s>")  # noqa: S106


def tiny_model() -> LlamaForCausalLM:
    return tiny_llama(
        vocab_size=62,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )


def texts(count: int, start: int) -> list[Example]:
    generator = np.random.default_rng(start)
    return [
        Example(
            f"{start}-{i}", " ".join(generator.choice(WORDS[start : start + 20], 6)), WORDS[start + i % 3]
        )
        for i in range(count)
    ]


def test_encoding_is_the_products_where_nothing_is_cut() -> None:
    ours, theirs = encode(tokenizer(), texts(5, 0), 32), encode_examples(tokenizer(), texts(5, 0), 32)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
    long = Example("long", " ".join(WORDS), " ".join(WORDS))
    (cut,) = encode(tokenizer(), [long], 16)
    assert len(cut.input_ids) == 16
    assert int((cut.labels != IGNORED).sum()) == 8


def test_smaller_designs_use_the_leading_directions() -> None:
    probe = open_probe(tiny_model())
    public = list(gradient_factors(probe, encode(tokenizer(), texts(40, 0), 32)))
    wide = fit_sides(probe, public, (8, 12))
    narrow = Design("kronecker", 12, left=3).own_sides(wide)
    again = fit_sides(probe, public, (3, 4))
    for found, expected in ((narrow.left, again.left), (narrow.right, again.right)):
        assert found is not None
        assert expected is not None
        np.testing.assert_allclose(np.abs(found.T @ expected), np.eye(found.shape[1]), atol=1e-4)
    assert Design("tensor_sketch", 8).own_sides(wide).left is None


def test_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "probe")
    tokenizer().save_pretrained(tmp_path / "probe")
    monkeypatch.setattr(
        relevance, "load_public", lambda *_: [text for start in range(0, 41, 5) for text in texts(60, start)]
    )
    monkeypatch.setattr(
        relevance, "load_task_set", lambda *_: {str(start): texts(60, start) for start in (0, 15, 30, 40)}
    )
    settings = relevance.Settings(
        data=tmp_path,
        probes=(tmp_path / "probe",),
        output_dir=tmp_path / "out",
        task_sets=("easy",),
        epsilons=(math.inf, 1.0),
        sizes=(30,),
        trials=4,
        dtype="float32",
        threads=1,
    )
    found = relevance.run(settings)
    assert len(found) == 2 * len(DESIGNS)
    clear = {cell.design: cell.auc for cell in found if math.isinf(cell.epsilon)}
    noisy = {cell.design: cell.auc for cell in found if cell.epsilon == 1.0}
    assert clear["kronecker 16 × 16, whitened"] > 0.9
    assert sum(noisy.values()) < sum(clear.values())
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(record["cells"]) == len(found)
    assert record["settings"]["epsilons"] == [None, 1.0]
    assert (tmp_path / "out" / "table.md").read_text().startswith("### easy, probe probe")
