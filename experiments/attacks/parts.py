"""The parts of `fedmosaic attack`: which data and sizes each attack gets, and in which order they stand."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from fedmosaic.client.dp.training import PrivateTrainingSettings
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import IGNORED, EncodedExample, Example
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.attacks import adapter, audit, federation, inversion, profile, sums, text
from fedmosaic.experiments.attacks.encryption import claimed_row_result, group_key_result
from fedmosaic.experiments.attacks.received import received_results
from fedmosaic.experiments.attacks.statistics.results import AttackResult, RefusalResult, Setting
from fedmosaic.experiments.attacks.target import Prober, Target, Victim, candidates, open_prober
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.epsilon import default_delta
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.protos.errors import ConfigurationError

_DIGEST: Final = re.compile(r"-[0-9a-f]{12}$")
_MEMBERS_PER_RELEASE: Final = 36
_REST_OF_DATA: Final = 60
_FULL_BATCH_STEPS: Final = 4
_LEAST_SIGMA: Final = 0.1
_LEAST_MEMBERS: Final = 5
_SIMULATED_ROUNDS: Final = 6
_TASK_EXAMPLES: Final = 100
_TEXT_TOKENS: Final = 10
_ADAPTER_POOL: Final = 80
_ADAPTER_RELEASES: Final = 1000
_WORD_BATCH: Final = 8
_INVERTED_BATCH: Final = 8
_PUBLIC_TEXTS: Final = 64
_SCORED: Final = 60


@dataclass(frozen=True)
class Sizes:
    """How large the attacks are; the defaults are the standard set."""

    pool: int = 160
    """Candidates of the membership attacks on the profile."""
    releases: int = 8000
    """Simulated releases per setting of those attacks."""
    audited_releases: int = 2000
    """Repetitions of the profile release for the empirical ε."""
    canaries: int = 2000
    """Canaries of the one-run audit of DP-SGD."""
    texts: int = 4
    """Texts in the release of the text recovery."""
    seed: int = 0
    """Of everything random but the product's own noise."""


def choose_victim(target: Target, name: str) -> Victim:
    """The named client, or the one with the longest texts."""
    found = {victim.client_id: victim for victim in target.victims}
    if name and name not in found:
        raise ConfigurationError(f"there is no client {name!r}; choose from {', '.join(sorted(found))}")
    return found[name] if name else max(target.victims, key=lambda v: sum(len(e.prompt) for e in v.train))


@dataclass(frozen=True)
class Subject:
    """One client of a federation under attack; every part is a method, which may tell what it left out.

    `further` are models that the profile attacks are repeated with in the probe's place.
    """

    target: Target
    victim: Victim
    sizes: Sizes
    further: Sequence[Path] = ()

    @cached_property
    def prober(self) -> Prober:
        """The probe, loaded if a part needs it."""
        return open_prober(self.target)

    def profile(self, _: list[str]) -> Iterator[AttackResult]:
        """Membership in the victim's profile, in every setting, and in the run's own release."""
        yield from self._membership(self.prober, self.victim, self.sizes.releases)
        public_map, victim = self.prober.public_map, self.victim
        released = victim.released_profile(public_map.mechanism.dimensions)
        if released is not None:
            if not victim.unseen:
                raise ConfigurationError(f"{victim.client_id} has no text that it does not train on")
            everybody = [*victim.train, *victim.unseen]
            rows = public_map.rows(self.prober.factors(everybody))
            members = np.arange(len(everybody)) < len(victim.train)
            yield profile.own_release_result(released, rows, members, public_map.mechanism)

    def tasks(self, _: list[str]) -> Iterator[AttackResult]:
        """Every client's task, and every further model in the probe's place, in fewer settings."""
        probers = [(_DIGEST.sub("", Path(self.target.scenario.probe.path).name), self.prober)]
        for path in self.further:
            probers.append((path.name, open_prober(self.target, ModelSettings(path=str(path)))))
        for name, prober in probers:
            for victim in self.target.victims:
                brief = f"{victim.task}, probe {name}"
                yield from self._membership(prober, victim, max(1, self.sizes.releases // 2), brief)

    def _membership(
        self, prober: Prober, victim: Victim, releases: int, brief: str = ""
    ) -> Iterator[AttackResult]:
        pool = candidates(victim, self.sizes.pool, self.sizes.seed)
        yield from profile.membership_results(
            prober.factors(pool),
            prober.public_map,
            SecureNoise(),
            releases=releases,
            rate=min(0.5, _MEMBERS_PER_RELEASE / len(pool)),
            seed=self.sizes.seed,
            brief=brief,
        )

    def audit(self, _: list[str]) -> Iterator[AttackResult]:
        """Empirical ε of both channels."""
        others = self.prober.factors(self.victim.train[:_REST_OF_DATA])
        count = self.sizes.audited_releases
        for epsilon in profile.EPSILONS:
            noisy = self.prober.with_noise(profile.noise_multiplier(epsilon))
            yield profile.audit_result(noisy, others, SecureNoise(), releases=count, setting="variant")
        yield profile.audit_result(self.prober.public_map, others, SecureNoise(), releases=count)
        coins = np.random.default_rng(self.sizes.seed)
        for words, settings, setting in self._dp_settings(len(self.victim.train)):
            run = audit.one_run(self.sizes.canaries, settings, SecureNoise(), coins)
            yield audit.audit_result(run, setting=setting, words=words)

    def _dp_settings(self, examples: int) -> Iterator[tuple[str, PrivateTrainingSettings, Setting]]:
        """DP-SGD as this federation plans it, and a full-batch one, whose audit is far tighter."""
        scenario = self.target.scenario
        privacy, steps = scenario.adapter_privacy, self._steps
        rate = min(1.0, privacy.expected_batch_size / examples)
        spent = GaussianEvent(max(_LEAST_SIGMA, scenario.profile.noise_multiplier), 1.0, 1)
        delta = default_delta(examples, privacy.largest_delta)
        planned = noise_multiplier_for(privacy.target_epsilon, delta, [spent], rate, steps)
        as_planned = PrivateTrainingSettings(
            optimizer="sgd",
            steps=steps,
            sampling_rate=rate,
            expected_batch_size=privacy.expected_batch_size,
            max_grad_norm=privacy.clipping_norm,
            noise_multiplier=planned,
        )
        yield (
            f"planned for ε = {privacy.target_epsilon:g} at this client's own δ: σ = {planned:.3g}, "
            f"q = {rate:.3g}, {steps} steps",
            as_planned,
            "product" if scenario.adapter.private else "variant",
        )
        sigma = math.sqrt(_FULL_BATCH_STEPS) * profile.noise_multiplier(3.0)
        full = {"steps": _FULL_BATCH_STEPS, "sampling_rate": 1.0, "noise_multiplier": sigma}
        words = f"all examples in every step: σ = {sigma:.3g}, {_FULL_BATCH_STEPS} steps"
        yield words, as_planned.model_copy(update=full), "variant"

    @property
    def _steps(self) -> int:
        scenario = self.target.scenario
        return scenario.adapter_privacy.steps_per_round * scenario.schedule.rounds

    def federation(self, skipped: list[str]) -> list[AttackResult]:
        """The group key, collusion, spoofing and task inference."""
        target, scenario, seed = self.target, self.target.scenario, self.sizes.seed
        names = sorted(victim.client_id for victim in target.victims)
        examples = min(len(victim.train) for victim in target.victims)
        rate, size = min(1.0, scenario.adapter_privacy.expected_batch_size / examples), scenario.adapter
        noise = federation.dp_noise_ratio(1.0, rate, self._steps, examples, size.shared_dimensions)
        weights = target.server_run.weights(names)[:-1]
        source = "this run's own rows"
        if not weights:
            source = "rows that the real planning makes of random profiles"
            weights = federation.simulated_weights(
                max(_LEAST_MEMBERS, len(names)), _SIMULATED_ROUNDS, scenario.relevance, scenario.policy, seed
            )
        results = [group_key_result()]
        results += federation.collusion_results(
            weights, scenario.policy, source=source, dp_noise=noise, seed=seed
        )
        results.append(claimed_row_result(scenario.policy, seed))
        results += self._spoofing(skipped)
        return results + self._task_inference(skipped)

    def _spoofing(self, skipped: list[str]) -> list[AttackResult]:
        mechanism, target, scenario = self.prober.public_map.mechanism, self.target, self.target.scenario
        found = {victim.client_id: victim.released_profile(mechanism.dimensions) for victim in target.victims}
        profiles = {name: vector for name, vector in found.items() if vector is not None}
        if len(profiles) <= scenario.policy.minimum_contributors:
            skipped.append("relevance spoofing needs the released profiles of a finished run")
            return []
        tasks = {victim.client_id: victim.task for victim in target.victims}
        terms, clip = (scenario.relevance, scenario.policy, tasks), scenario.encryption.clip
        return [federation.spoofing_results(profiles, mechanism.noise_variance, *terms, clip)]

    def _task_inference(self, skipped: list[str]) -> list[AttackResult]:
        """One client per task; its test examples stand for what the attacker knows of the task."""
        by_task: dict[str, Victim] = {}
        for victim in self.target.victims:
            by_task.setdefault(victim.task, victim)
        if len(by_task) < 2:
            skipped.append("task inference needs at least two tasks")
            return []
        prober, own, reference = self.prober, {}, {}
        for task, victim in by_task.items():
            own[task] = prober.public_map.rows(prober.factors(victim.train[: 2 * _TASK_EXAMPLES]))
            reference[task] = prober.public_map.rows(prober.factors(victim.test[:_TASK_EXAMPLES]))
        return federation.task_results(
            own,
            reference,
            prober.public_map.mechanism,
            SecureNoise(),
            size=_TASK_EXAMPLES,
            releases=200,
            seed=self.sizes.seed,
        )

    def sums(self, _: list[str]) -> Iterator[AttackResult | RefusalResult]:
        """Coalitions of a server and members against one sum of a group, and what must be refused."""
        scenario, sigma = self.target.scenario, profile.noise_multiplier(8.0)
        yield from sums.sum_results(
            scenario.group_sums,
            sigma,
            SecureNoise(),
            np.random.default_rng(self.sizes.seed),
            canaries=2 * self.sizes.canaries,
            setting="product" if scenario.adapter.in_group_sums else "variant",
        )
        yield from sums.sum_refusals(scenario.group_sums)

    def text(self, _: list[str]) -> list[AttackResult]:
        """Text recovery from the profile."""
        prober, sizes = self.prober, self.sizes
        texts = text.continuations(self.victim.train, prober.tokenizer, sizes.texts, _TEXT_TOKENS)
        if not texts:
            raise ConfigurationError(f"the texts of {self.victim.client_id} are too short to be recovered")
        return text.text_results(
            prober.probe, texts, prober.public_map, prober.basis, SecureNoise(), sizes.seed
        )

    def adapter(self, _: list[str]) -> Iterator[AttackResult]:
        """Membership and words from an update of P and Q."""
        target, victim, seed = self.target, self.victim, self.sizes.seed
        generator = np.random.default_rng(seed)
        pool = candidates(victim, _ADAPTER_POOL, seed)
        foreign = [e for v in target.victims if v.client_id != victim.client_id for e in v.train]
        others = [foreign[index] for index in generator.permutation(len(foreign))[: 2 * _ADAPTER_POOL]]
        known = {example.prompt for example in victim.train}
        kin = [e for v in target.victims if v.task == victim.task for e in v.test if e.prompt not in known]
        rows = adapter.adapter_rows(
            victim.model,
            target.adapter,
            [pool, others or pool, kin[: 2 * _ADAPTER_POOL] or pool, list(victim.train[:_ADAPTER_POOL])],
            target.scenario.profile.max_length,
        )
        yield from adapter.membership_results(
            rows[0], rows[1], SecureNoise(), releases=_ADAPTER_RELEASES, rate=0.3, seed=seed
        )
        yield from adapter.word_results(
            rows[2], rows[3], SecureNoise(), size=_WORD_BATCH, updates=40, seed=seed
        )

    def inversion(self, _: list[str]) -> Iterator[AttackResult]:
        """Texts from an update of P and Q."""
        target, victim, sizes = self.target, self.victim, self.sizes
        settings = victim.model.model_copy(update={"dtype": "float32"})
        model, tokenizer = load_adapted(settings, target.adapter.model_copy(update={"protection": "none"}))

        def long_enough(examples: Sequence[Example], count: int) -> tuple[EncodedExample, ...]:
            found = text.continuations(examples, tokenizer, len(examples), _TEXT_TOKENS)
            whole = (each for each in found if int((each.labels != IGNORED).sum()) == _TEXT_TOKENS)
            return tuple(islice(whole, count))

        texts = [f"{example.prompt} {example.answer}" for example in target.public[:_PUBLIC_TEXTS]]
        material = inversion.Material(
            texts=long_enough(victim.train, max(sizes.texts, _INVERTED_BATCH)),
            others=long_enough([e for v in target.victims if v is not victim for e in v.train], 2),
            public=tuple(tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts),
            attacked=sizes.texts,
            training=target.scenario.training,
        )
        yield from inversion.inversion_results(model, tokenizer, material, SecureNoise(), sizes.seed)

    def received(self, _: list[str]) -> list[AttackResult]:
        """What an aggregate does and tells after a finished run."""
        return received_results(self.target, self.victim, _SCORED)
