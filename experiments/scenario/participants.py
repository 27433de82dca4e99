"""What the clients of a scenario hold (examples, streams, test sets), and what their models score."""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedmosaic.client.data.records import Example, read_examples, row_of
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError

if TYPE_CHECKING:  # whoever only starts processes loads no model's library
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fedmosaic.experiments.scenario.streams import Stream

EVALUATIONS = "evaluations.json"
_BATCH = 32


def training_tasks(client: ScenarioClient) -> tuple[tuple[Example, ...], ...]:
    """A client's training examples by task; with several tasks the ids carry the task's name."""
    of_task = [read_examples(task.train) for task in client.task_list]
    if len(of_task) == 1:
        return tuple(of_task)
    return tuple(
        tuple(replace(example, id=f"{task.name}/{example.id}") for example in examples)
        for task, examples in zip(client.task_list, of_task, strict=True)
    )


def training_examples(client: ScenarioClient) -> list[Example]:
    """A client's training examples of all tasks, in order."""
    return [example for task in training_tasks(client) for example in task]


def client_stream(scenario: Scenario, index: int) -> "Stream | None":
    """The stream of a client, or None where all its examples are there from the start."""
    if scenario.stream == "all":
        return None
    from fedmosaic.experiments.scenario.streams import Stream, arrivals

    training, seed = scenario.training, client_seed(scenario, index)
    tasks = training_tasks(scenario.clients[index])
    slices = arrivals(tasks, scenario.schedule.rounds, scenario.stream, seed)
    batches = training.steps * training.gradient_accumulation_steps
    return Stream(slices, batches, training.per_device_train_batch_size, seed)


def client_seed(scenario: Scenario, index: int) -> int:
    """Seed of one client's training, different for every client and every seed of the scenario."""
    return scenario.training.seed + 100_003 * scenario.seed + index


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write JSON lines that `fedmosaic.client.model.examples.read_examples` reads back unchanged."""
    lines = (json.dumps(row_of(example), ensure_ascii=False) + "\n" for example in examples)
    write_atomically(path, "".join(lines).encode(), durable=False)


@dataclass(frozen=True)
class TestSet:
    """One client's test examples of one task."""

    owner: str
    task: str
    examples: tuple[Example, ...]

    @property
    def label(self) -> str:
        """`owner/task`, as scores are filed."""
        return f"{self.owner}/{self.task}"


class Evaluation:
    """All test sets of a scenario, and what models score on them."""

    def __init__(self, scenario: Scenario) -> None:
        """Read the test sets; `ConfigurationError` if a test prompt is among a client's training prompts."""
        self._scenario = scenario
        self._untrained: dict[tuple[Hashable, str, int], float] = {}
        read = cache(read_examples)  # many clients may have one file
        self._sets = [
            TestSet(client.id, task.name, read(task.test))
            for client in scenario.clients
            for task in client.task_list
        ]
        tests = {task.test for client in scenario.clients for task in client.task_list}
        tested = {example.prompt for path in tests for example in read(path)}

        @cache
        def tested_too(train: Path) -> int:
            return sum(example.prompt in tested for example in read_examples(train))

        for client in scenario.clients:
            both = sum(tested_too(task.train) for task in client.task_list)
            if both:
                raise ConfigurationError(
                    f"client {client.id} trains on {both} prompts of test sets; split the data so that "
                    "no test prompt is trained on by anybody"
                )

    def sets_of(self, client: str) -> list[TestSet]:
        """What a client is scored on, cut to the scenario's numbers of examples."""
        own, others = self._scenario.evaluation_examples, self._scenario.others_examples
        return [
            replace(test, examples=test.examples[: (own if test.owner == client else others) or None])
            for test in self._sets
            if self._scenario.score == "all" or (self._scenario.score == "own" and test.owner == client)
        ]

    def score(
        self, model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", client: str
    ) -> dict[str, float]:
        """Score a client's model; see `TestSet.label` for the keys."""
        return {test.label: self.score_set(model, tokenizer, test) for test in self.sets_of(client)}

    def score_set(self, model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", test: TestSet) -> float:
        """Share of right answers on one test set; by choices, or by what is written where there are none."""
        from fedmosaic.client.model.scoring import Examiner

        longest = self._scenario.training.max_length
        return Examiner(model, tokenizer, _BATCH, longest).score(test.examples).value

    def score_untrained(
        self, client: str, state: Path, alike: Hashable, score: Callable[[TestSet], float]
    ) -> None:
        """Score round 0, unless that is done, once per test set for all clients with the same `alike`."""
        known, tests = self._untrained, {(alike, t.label, len(t.examples)): t for t in self.sets_of(client)}
        if tests and 0 not in read_evaluations(state):
            known |= {key: score(test) for key, test in tests.items() if key not in known}
            add_evaluation(state, 0, {test.label: known[key] for key, test in tests.items()})


def add_evaluation(directory: Path, round_number: int, scores: Mapping[str, float]) -> None:
    """Add the scores of a round to a client's record, in place of earlier ones of that round."""
    rounds = {**read_evaluations(directory), round_number: dict(scores)}
    content = [{"round": number, "scores": rounds[number]} for number in sorted(rounds)]
    write_atomically(directory / EVALUATIONS, json.dumps(content, indent=1).encode())


def read_evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """Scores by round and `owner/task`, empty if there are none; `ConfigurationError` if damaged."""
    path = directory / EVALUATIONS
    if not path.exists():
        return {}
    try:
        content = parse_json(path.read_bytes())
        return {
            int(record["round"]): {str(label): float(score) for label, score in record["scores"].items()}
            for record in content
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); restore it, or delete the run") from None


def as_result(client: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores in the form of a client process's `result.json`: "self", and the others' by name."""
    own = [value for label, value in scores.items() if label.startswith(f"{client}/")]
    others = {label: value for label, value in scores.items() if not label.startswith(f"{client}/")}
    return ({"self": fmean(own)} if own else {}) | others


def before_and_after(client: str, directory: Path) -> dict[str, object]:
    """What a client's `result.json` says of its scores; nothing if nothing was scored."""
    found = read_evaluations(directory)
    if not found:
        return {}
    return {"before": as_result(client, found[0]), "after": as_result(client, found[max(found)])}
