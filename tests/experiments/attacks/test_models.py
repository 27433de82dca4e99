"""Attacks that need a model, on tiny ones: text, adapter, and the whole command on a scenario."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from builders import tiny_mechanism
from fedmosaic.client.colora import CoLoraConfig, read_shared, write_shared
from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.load import adapt, load_base_model
from fedmosaic.client.profile.probe import gradient_factors, open_probe
from fedmosaic.experiments.attacks import command as attacks
from fedmosaic.experiments.attacks import parts as attack_parts
from fedmosaic.experiments.attacks import report as attack_report
from fedmosaic.experiments.attacks.adapter import AdapterRows, membership_results, word_results
from fedmosaic.experiments.attacks.profile import membership_results as profile_membership
from fedmosaic.experiments.attacks.received import shared_vector
from fedmosaic.experiments.attacks.statistics.membership import gram_matrix
from fedmosaic.experiments.attacks.target import candidates, open_prober, read_target
from fedmosaic.experiments.attacks.text import evidence, spans_of, text_results
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicMap
from fedmosaic.protos.errors import ConfigurationError
from tiny import random_texts, tiny_llama, word_tokenizer

WORDS = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(9) for j in range(9)]


def tiny_model(hidden: int = 64) -> LlamaForCausalLM:
    return tiny_llama(
        vocab_size=len(WORDS) + 3,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )


def test_spans_hold_every_token_and_hardly_anything_else() -> None:
    generator = np.random.default_rng(0)
    delta, inputs = generator.standard_normal((6, 40)), generator.standard_normal((6, 90))
    spans = spans_of(delta.T @ inputs, 0.0, 20)
    assert spans.left.shape == (40, 6)
    assert evidence(delta, spans.left, 1e-3).min() > 6.5
    assert evidence(generator.standard_normal((50, 40)), spans.left, 1e-3).max() < 1.0
    assert evidence(np.zeros((1, 40)), spans.left, 1e-3)[0] == 0.0


def test_noise_alone_leaves_one_direction() -> None:
    noise = 0.3 * np.random.default_rng(1).standard_normal((60, 80))
    assert spans_of(noise, 0.3, 20).left.shape == (60, 1)


def test_texts_are_recovered_from_the_authors_sanitiser_and_not_under_dp() -> None:
    probe, texts = open_probe(tiny_model()), random_texts([9] * 2, answer=6)
    reduction = Reduction(hidden_size=64, intermediate_size=96, projection_dimensions=64, kind="coordinates")
    mechanism = ProfileMechanism(probe="tiny", probe_sha256=probe.sha256, reduction=reduction)
    results = text_results(probe, texts, PublicMap(mechanism), None, SeededTestNoise(0), 0)
    authors, private, guess = results
    assert authors.setting == "authors"
    assert authors.figures[0].value > 0.9
    assert private.epsilon == 8.0
    assert private.figures[0].value < 0.5
    assert guess.figures[0].value < 0.5


def test_gram_matrices_of_factors_are_those_of_the_gradients() -> None:
    generator = np.random.default_rng(2)
    factors = [
        GradientFactors(
            generator.standard_normal((tokens, 10)).astype(np.float32),
            generator.standard_normal((tokens, 7)).astype(np.float32),
        )
        for tokens in (1, 4, 2)
    ]
    for share, rows in ((1.0, 10), (0.4, 4)):
        flat = np.stack([(f.delta[:, :rows].T @ f.inputs).ravel() for f in factors]).astype(np.float64)
        np.testing.assert_allclose(gram_matrix(factors, share), flat @ flat.T, rtol=1e-5, atol=1e-5)


def test_membership_is_certain_without_protection_and_at_its_ceiling_with_it() -> None:
    probe = open_probe(tiny_model())
    factors = list(gradient_factors(probe, random_texts([9] * 60, answer=6)))
    mechanism = tiny_mechanism((64, 96, 128), probe_sha256=probe.sha256)
    results = profile_membership(
        factors, PublicMap(mechanism), SeededTestNoise(0), releases=150, rate=0.2, seed=0
    )
    for result in results:
        assert not result.broken, result
        area = result.figures[0]
        if result.statistic == "plain correlation":
            continue
        if result.setting in ("no_sanitiser", "authors"):
            assert area.value > 0.999
        if result.statistic == "likelihood ratio" and result.setting == "variant":
            assert area.value == pytest.approx(area.bound, abs=0.04)


def adapter(count: int, seed: int) -> AdapterRows:
    """Gradients that are sums of directions of their words, with some noise."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((len(WORDS), 300))
    chosen = [generator.choice(len(WORDS), 4, replace=False) for _ in range(count)]
    rows = np.stack([directions[c].sum(axis=0) + generator.standard_normal(300) for c in chosen])
    return AdapterRows(rows.astype(np.float32), tuple(" ".join(WORDS[w] for w in c) for c in chosen))


def test_an_unprotected_update_tells_its_members_and_an_aggregate_tells_less() -> None:
    results = membership_results(
        adapter(60, 0), adapter(80, 1), SeededTestNoise(2), releases=60, rate=0.3, epsilons=(3.0,), seed=0
    )
    update, aggregate, private = (result.figures[0] for result in results)
    assert update.value > 0.999
    assert 0.5 < aggregate.value < 0.98
    assert private.value == pytest.approx(private.bound, abs=0.04)
    assert not any(result.broken for result in results)


def test_words_are_read_from_an_update_and_not_under_dp() -> None:
    update, private, prior = word_results(
        adapter(400, 3), adapter(60, 4), SeededTestNoise(5), size=4, updates=20, seed=0
    )
    assert update.figures[0].value > 0.9
    assert private.figures[0].value < 0.8
    assert abs(prior.figures[0].value - 0.5) < 0.1


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("scenario")
    words = ["<s>", "</s>", "<unk>", *WORDS]
    tiny_model(32).save_pretrained(tmp_path / "model")
    word_tokenizer(words, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")  # noqa: S106
    generator = np.random.default_rng(0)

    def write(name: str, count: int, low: int, high: int) -> None:
        examples = []
        for number in range(count):
            drawn = [WORDS[i] for i in generator.integers(low, high, 9)]
            examples.append(Example(f"{name}-{number}", " ".join(drawn), drawn[0], (drawn[0], "zebra")))
        write_examples(tmp_path / f"{name}.jsonl", examples)

    write("public", 120, 0, 81)
    clients = []
    for number in range(5):
        low, high = ((0, 40), (40, 81))[number % 2]
        write(f"train{number}", 70, low, high)
        write(f"test{number}", 40, low, high)
        clients.append(
            f'[[clients]]\nid = "client-{number}"\ntask = "{"ab"[number % 2]}"\n'
            f'model = {{ path = "{tmp_path / "model"}" }}\n'
            f'train = "train{number}.jsonl"\ntest = "test{number}.jsonl"\n'
        )
    text = (
        f'name = "tiny"\nprobe = {{ path = "{tmp_path / "model"}" }}\n'
        '[profile]\npublic_data = "public.jsonl"\ndimensions = 16\nmax_length = 16\n'
        "[adapter]\nrank = 4\nblocks = 2\n" + "\n".join(clients)
    )
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_the_command_attacks_a_scenario_and_writes_its_section(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = "--pool 40 --releases 40 --audited-releases 200 --canaries 200 --texts 1"
    parts = "--parts profile audit federation text adapter"
    status = attacks.main([str(scenario), "--output-dir", str(out), *sizes.split(), *parts.split()])
    assert status == 0
    report = attack_report.read(out)
    assert report is not None
    assert report.alarms == ()
    assert {result.attack for result in report.results} >= {
        "Membership in the task profile",
        "Empirical ε of the task profile",
        "Empirical ε of the adapter's DP-SGD, one run",
        "Collusion: solving for another member's adapter",
        "Task inference from the profile",
        "Text recovery from the profile",
        "Membership in a P, Q update",
    }
    page = (out / attack_report.MARKDOWN).read_text()
    assert "No bound is broken" in page
    assert (out / attack_report.ROC).read_text().startswith("<?xml")
    assert "relevance spoofing needs the released profiles" in page


def test_a_broken_bound_ends_the_command_with_an_error(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile release that forgets nine tenths of its noise."""
    from fedmosaic.experiments.attacks import profile as attack_profile
    from fedmosaic.privacy.mechanism.profile import release

    def quiet(total: object, mechanism: ProfileMechanism, noise: object) -> object:
        sigma = mechanism.noise_multiplier / 10
        return release(total, mechanism.model_copy(update={"noise_multiplier": sigma}), noise)  # type: ignore[arg-type]

    monkeypatch.setattr(attack_profile, "release", quiet)
    arguments = [str(scenario), "--output-dir", str(tmp_path / "o"), "--parts", "profile"]
    assert attacks.main([*arguments, "--pool", "40", "--releases", "60"]) == 1
    assert "BROKEN" in (tmp_path / "o" / attack_report.MARKDOWN).read_text()


def finished_run(scenario: Path, place: Path) -> Path:
    """The directory of a run that ended: adapters, weights, released profiles."""
    target = read_target(scenario)
    place.mkdir()
    (place / "scenario.json").write_text(target.scenario.model_dump_json())
    names = [victim.client_id for victim in target.victims]
    base, _ = load_base_model(target.victims[0].model.path, "float32")
    model = adapt(base, CoLoraConfig(r=4, alpha=32.0, blocks=2))
    size = len(read_shared(model))
    for number, name in enumerate(names):
        draw = np.random.default_rng(number).normal(0, 0.02, size).astype(np.float32)
        write_shared(model, draw, "local")
        state = place / "federation/clients" / name / "state"
        model.save_pretrained(str(state / "adapter/round-0002"))
        np.save(
            state / "profile-0123456789abcdef.npy",
            50 * np.random.default_rng(number % 2).normal(size=16).astype(np.float32),
        )
    share = {name: {other: 0.25 for other in names if other != name} for name in names}
    run = {"results": [{"weights": {"shared": share}}, {"weights": {"shared": share}}]}
    server = place / "federation/server/state"
    server.mkdir(parents=True)
    (server / "run.json").write_text(json.dumps(run))
    return place


def test_saved_adapters_are_read_in_the_order_of_the_shared_vector(scenario: Path, tmp_path: Path) -> None:
    run = finished_run(scenario, tmp_path / "run")
    (saved,) = (run / "federation/clients/client-3/state/adapter").glob("round-*/adapter_model.safetensors")
    found = shared_vector(saved)
    np.testing.assert_allclose(found, np.random.default_rng(3).normal(0, 0.02, found.size), atol=1e-6)


def test_a_finished_run_is_attacked_through_its_aggregates_and_releases(
    scenario: Path, tmp_path: Path
) -> None:
    run = finished_run(scenario, tmp_path / "run")
    status = attacks.main([str(run), "--parts", "received", "federation", "--client", "client-2"])
    assert status == 0
    report = attack_report.read(run / "attacks")
    assert report is not None
    found = {result.attack: result for result in report.results}
    assert report.skipped == ()
    loss = found["Membership by loss in a received aggregate"].figures[0]
    assert 0.3 < loss.value < 0.7, "random adapters know nothing of anybody's examples"
    assert "Relevance spoofing: pulling or poisoning a victim's aggregate" in found
    assert read_target(run).victims[0].released_profile(16) is not None
    page = (run / "attacks" / attack_report.MARKDOWN).read_text()
    assert "this run's own rows" in page


def test_the_inversion_part_takes_texts_of_one_length_or_says_that_there_are_none(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = read_target(scenario)
    sizes = attack_parts.Sizes(texts=2)
    with pytest.raises(ConfigurationError, match="there are 0 and 0"):
        list(attack_parts.Subject(target, target.victims[0], sizes).inversion([]))
    monkeypatch.setattr(attack_parts, "_TEXT_TOKENS", 6)
    results = list(attack_parts.Subject(target, target.victims[0], sizes).inversion([]))
    assert len(results) == 8
    assert {result.setting for result in results} == {"no_sanitiser", "product", "variant"}
    assert all(0.0 <= figure.value <= 1.0 for result in results for figure in result.figures)


def test_half_of_the_candidates_are_trained_on_and_all_are_distinct(scenario: Path) -> None:
    victim = read_target(scenario).victims[0]
    pool = candidates(victim, 40)
    assert len(pool) == 40 == len({example.prompt for example in pool})
    known = {example.prompt for example in victim.train}
    assert sum(example.prompt in known for example in pool) == 20
    assert victim.released_profile(16) is None


def test_a_target_without_that_client_is_refused(scenario: Path) -> None:
    target = read_target(scenario)
    with pytest.raises(ConfigurationError, match="no client 'zoe'"):
        attack_parts.choose_victim(target, "zoe")
    assert math.isclose(open_prober(target).public_map.mechanism.noise_multiplier, 8.0)
