"""The sharing study: gradients through merged weights, contradicting tasks, cells that are measured once."""

import json
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.dp.engine import only_shared_branch
from fedmosaic.client.model.examples import Example, answer_tokens, collate, encode_examples, padding_token
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.model.loss import example_losses
from fedmosaic.experiments.studies import sharing
from fedmosaic.experiments.studies.sharing_figure import draw


@pytest.fixture
def settings(tmp_path: Path, tiny_folder: Path) -> sharing.Settings:
    """Two intents of few words each, and a random model."""
    rows = [[f"w{i % 7} w{i % 11} w{i % 3}", ("yes", "no")[i % 2]] for i in range(24)]
    (tmp_path / "clinc150").mkdir()
    content = {"train": rows, "val": [], "test": rows[:8]}
    (tmp_path / "clinc150" / "data_full.json").write_text(json.dumps(content), encoding="utf-8")
    return sharing.Settings(
        data=tmp_path,
        model=tiny_folder / "small",
        out=tmp_path / "out",
        seeds=(0,),
        members=(4,),
        epsilons=(math.inf, 8.0),
        examples=5,
        intents=2,
        rank=2,
        steps=2,
        tests=8,
    )


def test_gradients_through_merged_weights_are_those_of_each_example_alone(settings: sharing.Settings) -> None:
    bench = sharing._Bench(settings)
    model, tokenizer = bench._model, bench._tokenizer
    bench._start = np.random.default_rng(0).normal(size=len(bench._start))
    rows = sharing._rows(settings, 1, 0)[0][0]
    encoded, padding = encode_examples(tokenizer, rows, 32), padding_token(tokenizer)
    with only_shared_branch(model) as cores:
        bench._write([])
        merged = sharing._gradients(model, shared_modules(model), encoded, padding)
        model.unmerge_adapter()
        for row, example in zip(merged, encoded, strict=True):
            loss = example_losses(model, collate([example], padding)).sum()
            parts = torch.autograd.grad(
                loss, [p for core in cores.values() for p in (core.weight, core.bias)]
            )
            alone = torch.cat([part.flatten() for part in parts]).numpy()
            assert np.allclose(row, alone, rtol=1e-3, atol=1e-5 * np.abs(alone).max())


def test_a_model_cut_to_its_last_layer_computes_what_the_whole_one_does(settings: sharing.Settings) -> None:
    whole, tokenizer = load_base_model(settings.model)
    cut = sharing._Bench(replace(settings, layers=1))._model
    texts = [Example("", "w1 w2 w3 " * length, "yes", ("yes", "no")) for length in range(1, 6)]
    encoded = encode_examples(tokenizer, texts, 32)
    for _ in range(2):
        # The second time in other batches, from what was kept.
        for batch in (encoded[:3], encoded[3:], encoded):
            rows = collate(batch, padding_token(tokenizer))
            with torch.no_grad():
                expected, found = (example_losses(model, rows) for model in (whole, cut))
            assert torch.allclose(found, expected, rtol=1e-4)


def test_a_form_of_ones_own_has_the_answer_in_its_line(settings: sharing.Settings) -> None:
    bench = sharing._Bench(replace(settings, form="w1 {} w2"))
    example, tokenizer = sharing._rows(bench._settings, 1, 0)[0][0][0], bench._tokenizer
    assert (example.prompt[:3], example.prompt[-3:]) == ("w1 ", " w2")
    assert example.answer in (" yes", " no")
    found = encode_examples(tokenizer, [example], 32)[0].input_ids.tolist()
    parts = (answer_tokens(tokenizer, text) for text in (example.prompt, example.answer))
    assert found == [*chain(*parts), tokenizer.eos_token_id]


def test_every_second_member_of_contradicting_ones_answers_otherwise(settings: sharing.Settings) -> None:
    same, _ = sharing._rows(settings, 4, 0)
    other, tests = sharing._rows(replace(settings, task="contradicting"), 4, 0)
    assert [member == mine for member, mine in zip(same, other, strict=True)] == [True, False, True, False]
    for one, two in zip(same[1], other[1], strict=True):
        assert one.answer != two.answer
        assert one.prompt != two.prompt
    assert len({test.prompt.split()[0] for test in tests}) == 2


def test_a_cell_is_measured_once(settings: sharing.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Planning σ takes seconds, and has tests of its own.
    monkeypatch.setattr(sharing, "noise_multiplier_for", lambda *_: 1.0)
    cells = sharing.run(settings)
    assert sorted((cell.release, cell.members, cell.epsilon) for cell in cells) == [
        ("alone", 1, math.inf),
        ("own", 4, 8.0),
        ("sum", 4, 8.0),
        ("sum", 4, math.inf),
    ]
    monkeypatch.setattr(sharing, "_Bench", None)
    assert sharing.run(settings) == cells
    draw(sharing.gains(cells), settings.out / "figure.svg")
    assert "noise of each member" in (settings.out / "figure.svg").read_text(encoding="utf-8")
    assert "| no noise |" in sharing.markdown(cells)
