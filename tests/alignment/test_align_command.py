"""The whole command on tiny random models: checkpoints, resuming, refusals, and what loads them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedmosaic.alignment import evaluate
from fedmosaic.alignment.__main__ import Arguments, run
from fedmosaic.alignment.activations import METHODS, Method, collect, open_side, shared_words
from fedmosaic.alignment.checkpoint import Manifest, read_manifest
from fedmosaic.alignment.pairing import Reading
from fedmosaic.alignment.public_text import generate_text, random_token_text, read_public_text
from fedmosaic.alignment.settings import AlignmentSettings
from fedmosaic.alignment.sources import parse_source
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.alignment.transfer import (
    FEW,
    MOVED,
    RANDOM_BASES,
    RANDOM_CORE,
    RETRAINED,
    TUNED,
    ZERO_SHOT,
)
from fedmosaic.client.colora import get_basis, read_shared, shared_layout, write_shared
from fedmosaic.client.colora.aligned import (
    aligned_config,
    embedded_layout,
    load_basis,
    read_embedded,
    write_embedded,
)
from fedmosaic.client.colora.linear import orthonormality_error
from fedmosaic.client.model.examples import collate, encode_examples, padding_token
from fedmosaic.client.model.load import adapt, load_base_model
from fedmosaic.client.model.loss import example_losses
from fedmosaic.protos.errors import ConfigurationError, ModelError, StateError
from tiny import save_tiny_model

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [*"abcdefghijklmnopqrst", "yes", "no", "?"]
SETTINGS = AlignmentSettings(rank=3, blocks=2, max_length=24, batch_size=8)


def silent(_name: str) -> Callable[[int, int], None]:
    return lambda _done, _total: None


def save_model(folder: Path, words: list[str], *, hidden: int, depth: int, seed: int) -> Path:
    return save_tiny_model(
        folder,
        words,
        SPECIAL,
        seed=seed,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.02,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of other sizes and with other token ids, and public text."""
    place = tmp_path_factory.mktemp("alignment")
    save_model(place / "anchor", WORDS, hidden=16, depth=3, seed=0)
    save_model(place / "wide", WORDS[::-1], hidden=24, depth=5, seed=1)
    generator = np.random.default_rng(0)
    lines = [
        {
            "prompt": " ".join(generator.choice(WORDS[:20], 8)) + " ?",
            "answer": str(generator.choice(["yes", "no"])),
        }
        for _ in range(60)
    ]
    (place / "public.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def arguments(place: Path, out: Path, *others: str, **changes: Any) -> Arguments:
    chosen: dict[str, Any] = {
        "anchor": str(place / "anchor"),
        "model": tuple(str(place / other) for other in others),
        "out": out,
        "data": place / "public.jsonl",
        "samples": 60,
        "settings": SETTINGS,
    }
    return Arguments(**(chosen | changes))


@pytest.fixture(scope="module")
def aligned(place: Path) -> tuple[Path, Manifest]:
    out = place / "aligned"
    return out, run(arguments(place, out, "wide"), silent)


def loaded(place: Path, out: Path, name: str) -> PeftModel:
    base, _ = load_base_model(place / name)
    return PeftModel.from_pretrained(base, str(out / name))


@pytest.mark.parametrize("name", ["anchor", "wide"])
def test_checkpoints_load_by_path_and_change_nothing_yet(
    place: Path, aligned: tuple[Path, Manifest], name: str
) -> None:
    model = loaded(place, aligned[0], name)
    assert shared_layout(model).basis_label == aligned[1].label
    for a, b in get_basis(model).values():
        assert orthonormality_error(a.half().T) < 1e-3
        assert orthonormality_error(b.half()) < 1e-3
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            torch.testing.assert_close(adapted, model(tokens).logits, rtol=0, atol=0)


def test_aligned_models_have_one_layout(place: Path, aligned: tuple[Path, Manifest]) -> None:
    layouts = {shared_layout(loaded(place, aligned[0], name)).spec_hash for name in ("anchor", "wide")}
    assert len(layouts) == 1
    report = aligned[1].models[0].report
    assert report["texts"] == 60
    assert report["positions"] > 60
    assert len(report["cka_of_pairs"]) == SETTINGS.blocks
    assert (aligned[0] / "cka-wide.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_aligned_with_itself_gets_the_anchors_bases(
    place: Path, tmp_path: Path, method: Method
) -> None:
    settings = AlignmentSettings(rank=3, blocks=2, max_length=24, method=method)
    twin = f"twin={place / 'anchor'}"
    manifest = run(arguments(place, tmp_path, settings=settings, model=(twin,)), silent)
    for part in ("inputs", "outputs"):
        assert min(manifest.models[0].report[f"{part}_squared_correlation"]) > 0.99
    anchor = get_basis(loaded(place, tmp_path, "anchor"))
    twin_model = PeftModel.from_pretrained(load_base_model(place / "anchor")[0], str(tmp_path / "twin"))
    for name, (a, b) in get_basis(twin_model).items():
        for rows in (anchor[name][0], a, anchor[name][1].T, b.T):
            assert orthonormality_error(rows.half().T) < 1e-3
        # Not exact: the ridge shrinks directions of small variance; an A that knows no text has some.
        if method not in ("random", "weights"):
            assert float((a * anchor[name][0]).sum()) > 0.97 * 3
        assert float((b * anchor[name][1]).sum()) > 0.9 * 3


def test_the_anchor_alone_gets_the_leading_singular_vectors_of_its_weights(
    place: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, layer_rule="late", method="weights")
    manifest = run(arguments(place, tmp_path, settings=settings), silent)
    assert (manifest.anchor.layers, manifest.models) == ((1, 2), ())
    base, _ = load_base_model(place / "anchor")
    for name, (a, b) in get_basis(loaded(place, tmp_path, "anchor")).items():
        weight = base.get_parameter(f"{name}.weight").detach()
        # The best approximation of rank r: its squared error is the sum of the other squared singular values.
        left = ((weight - b @ (b.T @ weight @ a.T) @ a) ** 2).sum()
        torch.testing.assert_close(left, (torch.linalg.svdvals(weight)[3:] ** 2).sum())
    more = run(arguments(place, tmp_path, "wide", settings=settings), silent)
    assert more.label == manifest.label
    assert [done.folder for done in more.models] == ["wide"]


def test_what_is_finished_is_kept_and_models_can_be_added(
    place: Path, aligned: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "more"
    shutil.copytree(aligned[0], out)
    before = (out / "wide" / "adapter_model.safetensors").stat().st_mtime_ns
    save_model(place / "third", WORDS, hidden=16, depth=2, seed=5)
    manifest = run(arguments(place, out, "wide", "third"), silent)
    assert (out / "wide" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert manifest.label == aligned[1].label
    assert [model.folder for model in manifest.models] == ["wide", "third"]
    labels = {shared_layout(loaded(place, out, name)).spec_hash for name in ("anchor", "wide", "third")}
    assert len(labels) == 1


def test_a_run_that_was_cut_off_can_be_started_again(
    place: Path, aligned: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedmosaic.alignment.procedure as procedure

    out = tmp_path / "cut"

    def stop(*_given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(procedure, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            run(arguments(place, out, "wide"), silent)
    manifest = run(arguments(place, out, "wide"), silent)
    assert manifest.label == aligned[1].label
    assert manifest.models[0].report["positions"] == aligned[1].models[0].report["positions"]


def test_other_inputs_are_refused_in_the_same_place(
    place: Path, aligned: tuple[Path, Manifest], tmp_path: Path
) -> None:
    with pytest.raises(StateError, match="other settings"):
        run(arguments(place, aligned[0], "wide", settings=AlignmentSettings(rank=2, blocks=2)), silent)
    with pytest.raises(StateError, match="another anchor"):
        run(arguments(place, aligned[0], "wide", samples=30), silent)
    shutil.copytree(aligned[0], tmp_path, dirs_exist_ok=True)
    bases = tmp_path / "anchor" / "adapter_model.safetensors"
    save_file({name: tensor[:2].clone() for name, tensor in load_file(bases).items()}, bases)
    with pytest.raises(StateError, match="another shape"):
        run(arguments(place, tmp_path, "wide"), silent)
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(StateError, match="not a manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "Give either"),
        ({"synthetic": "generated"}, "Give either"),
        ({"data": Path("absent.txt")}, "cannot be read"),
        ({"samples": 0}, "at least 1"),
        ({"samples": 0, "data": None, "synthetic": "random_tokens"}, "samples is 0"),
        ({"settings": AlignmentSettings(rank=0)}, "rank is 0"),
        ({"settings": AlignmentSettings(alpha=float("nan"))}, "alpha is nan"),
        ({"settings": AlignmentSettings(layer_rule="deepest")}, "layer_rule is 'deepest'"),
        ({"settings": AlignmentSettings(method=cast(Method, "cca"))}, "method is 'cca'"),
    ],
)
def test_wrong_options_are_named(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run(arguments(place, tmp_path / "x", "wide", **changes), silent)


def test_the_same_model_twice_or_too_high_a_rank_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="NAME=MODEL"):
        run(arguments(place, tmp_path / "x", "anchor"), silent)
    settings = AlignmentSettings(rank=12, blocks=2)
    with pytest.raises(ModelError, match="Rank 12"):
        run(arguments(place, tmp_path / "y", "wide", settings=settings), silent)


def test_a_base_model_is_never_overwritten(place: Path) -> None:
    before = sorted(entry.name for entry in (place / "anchor").iterdir())
    with pytest.raises(StateError, match="another --out"):
        run(arguments(place, place, "wide"), silent)
    assert sorted(entry.name for entry in (place / "anchor").iterdir()) == before


def test_streamed_moments_are_those_of_hooks_on_single_texts(place: Path) -> None:
    """An independent path: one text at a time, no padding."""
    model, words = load_base_model(place / "anchor")
    side = open_side(model, words, (1, 2))
    texts = read_public_text(place / "public.jsonl", 6)
    found = collect(side, side, texts, Reading(24, 4), None)
    key, name = next(iter(side.names.items()))
    rows = []
    for text in texts:
        context = words(text.prompt + "\n")["input_ids"]
        tokens = torch.tensor([[*context, *words(text.text, add_special_tokens=False)["input_ids"]]])
        kept: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _m, x, _y, kept=kept: kept.append(x[0])
        )
        model(tokens)
        handle.remove()
        visible = [*range(1, tokens.shape[1]), len(context) - 1]  # the answer's place counts twice
        rows.append(kept[0][0, visible].detach())
    x = torch.cat(rows).double()
    assert found.inputs[key].count == len(x)
    expected = x.T @ x / len(x)
    # Float32 activations: the error of an entry is of the size of the largest, not of its own.
    torch.testing.assert_close(
        found.inputs[key].cross_DE, expected, rtol=0, atol=float(1e-5 * expected.abs().max())
    )


def test_the_same_signals_come_back_in_a_twin(place: Path) -> None:
    """A twin with other token ids: the same words, so the same contrasts, and equal cotangents."""
    (first, words), (second, _) = (load_base_model(place / "anchor") for _ in range(2))
    _, others = load_base_model(place / "wide")
    order = torch.tensor([0, 1, 2, *range(len(WORDS) + 2, 2, -1)])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        second.get_parameter(name).data = first.get_parameter(name).data[order]
    sides = open_side(first, words, (1, 2)), open_side(second, others, (1, 2))
    texts = [PublicText(" ".join(WORDS[i : i + 6])) for i in range(14)]
    found = collect(*sides, texts, Reading(24, 4), "cotangents")
    for moments in found.effects.values():
        assert float(moments.anchor_DD.abs().max()) > 0
        torch.testing.assert_close(moments.cross_DE, moments.anchor_DD, rtol=1e-3, atol=1e-7)
    left, right = shared_words(words, others, texts)
    assert [words.decode([i]) for i in left] == [others.decode([i]) for i in right]
    with pytest.raises(ModelError, match="one token each"):
        shared_words(words, others, [PublicText("abc")])


def test_synthetic_text_needs_only_the_anchor(place: Path, tmp_path: Path) -> None:
    model, words = load_base_model(place / "anchor")
    random = random_token_text(words, 5, seed=1)
    assert random == random_token_text(words, 5, seed=1) != random_token_text(words, 5, seed=2)
    assert len(random) == 5
    written = generate_text(model, words, 40, max_length=30, seed=3)
    assert written == generate_text(model, words, 40, max_length=30, seed=3)
    assert 10 < len(written) <= 40
    # What a model's folder says of sampling is not how the text is drawn.
    model.generation_config.temperature, model.generation_config.top_p = 0.01, 0.05
    model.generation_config.repetition_penalty = 9.0
    assert written == generate_text(model, words, 40, max_length=30, seed=3)
    words.bos_token = words.eos_token = None
    with pytest.raises(ConfigurationError, match="no token to begin"):
        generate_text(model, words, 2, max_length=30, seed=3)
    manifest = run(arguments(place, tmp_path / "s", "wide", data=None, synthetic="random_tokens"), silent)
    assert manifest.models[0].report["texts"] == 60


def test_public_text_is_chosen_by_content(tmp_path: Path) -> None:
    lines = [f"a line of public text, number {i}" for i in range(30)]
    (tmp_path / "a.txt").write_text("\n".join([*lines, "short", lines[0]]))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))
    assert read_public_text(tmp_path / "a.txt", 10) == read_public_text(tmp_path / "b.txt", 10)
    assert len(read_public_text(tmp_path / "a.txt", 99)) == 30
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigurationError, match="line 1"):
        read_public_text(tmp_path / "bad.jsonl", 10)


def test_sources_are_parsed_or_refused() -> None:
    source = parse_source("small=/models/smol@8")
    assert (source.name, source.path, source.keep_layers) == ("small", "/models/smol", 8)
    assert parse_source("org/model").name == "model"
    assert parse_source("a@b/model").keep_layers is None
    for wrong in ("", "x=", "../=m", "manifest.json=m"):
        with pytest.raises(ConfigurationError):
            parse_source(wrong)


@pytest.fixture(scope="module")
def task(place: Path) -> str:
    generator = np.random.default_rng(1)
    for part, rows in (("train", 40), ("test", 20)):
        lines = []
        for index in range(rows):
            answer = str(generator.choice(["yes", "no"]))
            first = "a" if answer == "yes" else "b"
            prompt = " ".join([*generator.choice(WORDS[2:20], 5), first])
            lines.append({"id": str(index), "prompt": prompt, "answer": answer, "choices": ["yes", "no"]})
        (place / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"letters={place / 'train.jsonl'},{place / 'test.jsonl'}"


def test_a_core_moved_to_a_twin_does_what_it_did_at_home(place: Path, tmp_path: Path, task: str) -> None:
    out = tmp_path / "twins"
    settings = AlignmentSettings(rank=3, blocks=2, max_length=24)
    run(arguments(place, out, model=(f"twin={place / 'anchor'}",), settings=settings), silent)
    scores, (agreement,) = evaluate.evaluate(
        evaluate.Arguments(
            bases=(f"ours={out}",), task=(task,), pair=("anchor", "twin"), seeds=2, steps=60, few_labels=8,
            compared=6, learning_rate=0.03, out=tmp_path / "scores.json", one_way=True,
        ),
        Console(quiet=True),
    )  # fmt: skip
    there = [score for score in scores if score.target == "twin"]
    losses = {name: fmean(s.loss for s in there if s.variant == name) for name in (s.variant for s in there)}
    gained = losses[ZERO_SHOT] - losses[RETRAINED]
    assert gained > 0.05
    assert losses[ZERO_SHOT] - losses[MOVED] == pytest.approx(gained, rel=0.1)
    assert min(losses[RANDOM_CORE], losses[RANDOM_BASES]) > losses[MOVED]
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert len(kept["scores"]) == len(scores) == 2 * (7 + 2)
    assert [row["variant"] for row in kept["ratios"]] == [MOVED, RANDOM_CORE, RANDOM_BASES, FEW, TUNED]
    assert kept["agreements"] == [agreement]
    assert min(agreement[name] for name in ("reading", "writing", "gradient", "gradient per example")) > 0.9
    assert len(agreement["the same by layer"]) == settings.blocks
    assert fmean(agreement["the same by layer"]) == pytest.approx(agreement["gradient per example"])
    assert agreement["size"] == pytest.approx(1.0, abs=0.05)
    assert abs(agreement["gradient, random bases"]) < 0.6


def test_the_gradient_is_the_slope_of_the_loss_of_choosing(aligned: tuple[Path, Manifest], task: str) -> None:
    model = evaluate.LoadedModel("wide", aligned[1])
    example = evaluate.read_task(task, 1).train[0]
    with model.mounted(aligned[0] / "wide") as adapted:
        # The end of text counts too, as in training.
        spoken = [replace(example, answer=choice) for choice in example.choices]
        batch = collate(encode_examples(model.tokenizer, spoken, 24), padding_token(model.tokenizer))

        def loss(core: np.ndarray) -> float:
            write_shared(adapted, core.astype(np.float32), "local")
            with torch.no_grad():
                logs = (-example_losses(adapted, batch)).log_softmax(0)
            return -float(logs[example.choices.index(example.answer)])

        write_shared(adapted, np.zeros(2 * 7 * 12, np.float32), "local")
        gradient = model.core_gradients(adapted, [example], 24)[0].flatten().numpy()
        assert gradient.shape == (2 * 7 * 12,)
        step = 2e-3 * gradient / np.linalg.norm(gradient)
        assert loss(step) > loss(-step)


def test_runs_are_on_disk_as_soon_as_they_are_done(
    place: Path, aligned: tuple[Path, Manifest], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = evaluate.LoadedModel.train
    chosen = evaluate.Arguments(
        bases=(f"ours={aligned[0]}",), task=(task,), pair=("anchor", "wide"), seeds=2, steps=2, few_labels=8,
        compared=2, out=tmp_path / "scores.json",
    )  # fmt: skip

    def stop(*given: Any) -> np.ndarray:
        if given[-1].seed == 1:
            raise KeyboardInterrupt
        return trained(*given)

    monkeypatch.setattr(evaluate.LoadedModel, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(chosen, Console(quiet=True))
    kept = json.loads((tmp_path / "scores.json").read_text())["scores"]
    variants = [ZERO_SHOT, RETRAINED, MOVED, RANDOM_CORE, FEW, TUNED, RANDOM_BASES]
    assert [score["variant"] for score in kept] == 2 * variants
    assert [(score["source"], score["seed"]) for score in kept[::7]] == [("anchor", 0), ("wide", 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": ("anchor", "deep")}, "no aligned model 'deep'"),
        ({"bases": ("x=nowhere",)}, "holds no alignment"),
        ({"seeds": 0}, "seeds is 0"),
        ({"few_labels": 40}, "letters has 40 training examples"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"bases": ("x",)}, "LABEL=VALUE"),
        ({"task": ("x=y",)}, r"TRAIN\.jsonl,TEST\.jsonl"),
    ],
)
def test_evaluation_refuses_what_does_not_exist(
    aligned: tuple[Path, Manifest], task: str, changes: dict[str, Any], message: str
) -> None:
    chosen: dict[str, Any] = {"bases": (f"x={aligned[0]}",), "task": (task,), "seeds": 1}
    chosen |= {"pair": ("anchor", "wide")}
    with pytest.raises(ConfigurationError, match=message):
        evaluate.evaluate(evaluate.Arguments(**(chosen | changes)), Console(quiet=True))


def test_clients_take_the_basis_at_their_own_rank(place: Path, aligned: tuple[Path, Manifest]) -> None:
    folder = aligned[0] / "wide"
    models = {}
    for rank in (3, 2):
        base, _ = load_base_model(place / "wide")
        models[rank] = adapt(base, aligned_config(folder, rank=rank, other_layers="lora"))
        load_basis(models[rank], folder)
    whole, small = models[3], models[2]
    assert shared_layout(whole).spec_hash == shared_layout(loaded(place, aligned[0], "anchor")).spec_hash
    assert embedded_layout(shared_layout(small), 3).spec_hash == shared_layout(whole).spec_hash
    core = np.random.default_rng(0).normal(size=shared_layout(small).size).astype(np.float32)
    write_shared(small, core, "local")
    embedded = read_embedded(small, 3)
    write_shared(whole, embedded, "local")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-5)
    # What comes back is the leading block of the federation's average.
    write_embedded(small, 0.5 * embedded, 3, "global")
    np.testing.assert_allclose(read_shared(small, "global"), 0.5 * core, rtol=1e-6)


def test_ranks_that_do_not_fit_are_refused(place: Path, aligned: tuple[Path, Manifest]) -> None:
    folder = aligned[0] / "wide"
    for rank in (0, 4):
        with pytest.raises(ModelError, match="choose 1 to that"):
            aligned_config(folder, rank=rank)
    with pytest.raises(ModelError, match="no aligned checkpoint"):
        aligned_config(place)
    model = loaded(place, aligned[0], "wide")
    with pytest.raises(ModelError, match="at most that"):
        read_embedded(model, 2)
    with pytest.raises(ModelError, match="needs"):
        write_embedded(model, np.zeros(3), 3)
    with pytest.raises(ModelError, match="another model"):
        load_basis(model, aligned[0] / "anchor")
