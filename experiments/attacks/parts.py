"""The parts of `fedmosaic attack`: which data and sizes each attack gets, and in which order they stand."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Final

import numpy as np

from fedmosaic.client.dp.training import PrivateTrainingSettings
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import IGNORED, EncodedExample, Example, read_public_examples
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

_TASK_EXAMPLES: Final = 100
_TEXT_TOKENS: Final = 10
_ADAPTER_POOL: Final = 80


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
    """One client under attack; every part is a method, which may tell what it left out.

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
        mechanism, victim = self.prober.public_map.mechanism, self.victim
        released = victim.released_profile(mechanism.dimensions)
        if released is not None:
            if not victim.unseen:
                raise ConfigurationError(f"{victim.client_id} has no text that it does not train on")
            rows = self.prober.rows([*victim.train, *victim.unseen])
            members = np.arange(len(rows)) < len(victim.train)
            yield profile.own_release_result(released, rows, members, mechanism)

    def tasks(self, _: list[str]) -> Iterator[AttackResult]:
        """Every client's task, and every further model in the probe's place, in fewer settings."""
        own = re.sub(r"-[0-9a-f]{12}$", "", Path(self.target.scenario.probe.path).name)
        others = (
            (path.name, open_prober(self.target, ModelSettings(path=str(path)))) for path in self.further
        )
        for name, prober in chain([(own, self.prober)], others):
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
            rate=min(0.5, 36 / len(pool)),  # about 36 members in a release
            seed=self.sizes.seed,
            brief=brief,
        )

    def audit(self, _: list[str]) -> Iterator[AttackResult]:
        """Empirical ε of both channels."""
        rest, own = self.prober.rows(self.victim.train[:60]), self.prober.public_map.mechanism
        count = self.sizes.audited_releases
        for epsilon in profile.EPSILONS:
            noisy = own.model_copy(update={"noise_multiplier": profile.noise_multiplier(epsilon)})
            yield profile.audit_result(noisy, rest, SecureNoise(), releases=count, setting="variant")
        yield profile.audit_result(own, rest, SecureNoise(), releases=count)
        coins = np.random.default_rng(self.sizes.seed)
        for words, settings, setting in self._dp_settings(len(self.victim.train)):
            run = audit.one_run(self.sizes.canaries, settings, SecureNoise(), coins)
            yield audit.audit_result(run, setting=setting, words=words)

    def _dp_settings(self, examples: int) -> Iterator[tuple[str, PrivateTrainingSettings, Setting]]:
        """DP-SGD as this federation plans it, and a full-batch one, whose audit is far tighter."""
        scenario = self.target.scenario
        privacy, steps = scenario.adapter_privacy, self._steps
        rate = min(1.0, privacy.expected_batch_size / examples)
        # A profile without noise would leave nothing to plan with.
        spent = GaussianEvent(max(0.1, scenario.profile.noise_multiplier), 1.0, 1)
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
        words = f"planned for ε = {privacy.target_epsilon:g} at this client's own δ: σ = {planned:.3g}, "
        words += f"q = {rate:.3g}, {steps} steps"
        yield words, as_planned, "product" if scenario.adapter.private else "variant"
        sigma = math.sqrt(4) * profile.noise_multiplier(3.0)
        full = {"steps": 4, "sampling_rate": 1.0, "noise_multiplier": sigma}
        words = f"all examples in every step: σ = {sigma:.3g}, 4 steps"
        yield words, as_planned.model_copy(update=full), "variant"

    @property
    def _steps(self) -> int:
        scenario = self.target.scenario
        return scenario.private_steps(len(scenario.clients))

    def federation(self, skipped: list[str]) -> list[AttackResult]:
        """The group key, collusion, spoofing and task inference."""
        target, scenario, seed = self.target, self.target.scenario, self.sizes.seed
        names = sorted(victim.client_id for victim in target.victims)
        examples = min(len(victim.train) for victim in target.victims)
        rate = min(1.0, scenario.adapter_privacy.expected_batch_size / examples)
        size = scenario.adapter.shared_dimensions
        noise = federation.dp_noise_ratio(1.0, rate, self._steps, examples, size)
        policy, source = scenario.policy, "this run's own rows"
        weights = target.server_run.weights(names)[:-1]
        if not weights:
            source = "rows that the real planning makes of random profiles"
            weights = federation.simulated_weights(max(5, len(names)), 6, scenario.relevance, policy, seed)
        results = [group_key_result()]
        results += federation.collusion_results(weights, policy, source=source, dp_noise=noise, seed=seed)
        results.append(claimed_row_result(policy, seed))
        return results + self._spoofing(skipped) + self._task_inference(skipped)

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
        prober = self.prober
        return federation.task_results(
            {task: prober.rows(victim.train[: 2 * _TASK_EXAMPLES]) for task, victim in by_task.items()},
            {task: prober.rows(victim.test[:_TASK_EXAMPLES]) for task, victim in by_task.items()},
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
        pool = candidates(victim, _ADAPTER_POOL, seed)
        foreign = [e for v in target.victims if v is not victim for e in v.train]
        order = np.random.default_rng(seed).permutation(len(foreign))
        others = [foreign[index] for index in order[: 2 * _ADAPTER_POOL]]
        known = {example.prompt for example in victim.train}
        kin = [e for v in target.victims if v.task == victim.task for e in v.test if e.prompt not in known]
        rows = adapter.adapter_rows(
            victim.model,
            target.adapter,
            [pool, others or pool, kin[: 2 * _ADAPTER_POOL] or pool, list(victim.train[:_ADAPTER_POOL])],
            target.scenario.profile.max_length,
        )
        noise = SecureNoise()
        yield from adapter.membership_results(rows[0], rows[1], noise, releases=1000, rate=0.3, seed=seed)
        yield from adapter.word_results(rows[2], rows[3], noise, size=8, updates=40, seed=seed)

    def inversion(self, _: list[str]) -> Iterator[AttackResult]:
        """Texts from an update of P and Q."""
        target, victim, sizes = self.target, self.victim, self.sizes
        settings = victim.model.model_copy(update={"dtype": "float32"})
        model, tokenizer = load_adapted(settings, target.adapter.model_copy(update={"protection": "none"}))

        def long_enough(examples: Sequence[Example], count: int) -> tuple[EncodedExample, ...]:
            found = text.continuations(examples, tokenizer, len(examples), _TEXT_TOKENS)
            whole = (each for each in found if int((each.labels != IGNORED).sum()) == _TEXT_TOKENS)
            return tuple(islice(whole, count))

        public = read_public_examples(target.scenario.profile.public_data)[:64]
        texts = [f"{example.prompt} {example.answer}" for example in public]
        material = inversion.Material(
            texts=long_enough(victim.train, max(sizes.texts, 8)),
            others=long_enough([e for v in target.victims if v is not victim for e in v.train], 2),
            public=tuple(tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts),
            attacked=sizes.texts,
            training=target.scenario.training,
        )
        yield from inversion.inversion_results(model, tokenizer, material, SecureNoise(), sizes.seed)

    def received(self, _: list[str]) -> list[AttackResult]:
        """What an aggregate does and tells after a finished run."""
        return received_results(self.target, self.victim, examples=60)
