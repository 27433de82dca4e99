"""What the clients of a scenario hold: examples, streams and test sets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.data.records import row_of
from fedmosaic.client.model.evaluation import choice_accuracy
from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.client.model.scoring import written_answers
from fedmosaic.experiments.scenario.scoring import mean_word_f1
from fedmosaic.experiments.scenario.streams import Stream, make_stream
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError

EVALUATIONS = "evaluations.json"
_BATCH = 32


def training_examples(client: ScenarioClient) -> tuple[tuple[Example, ...], ...]:
    """A client's training examples by task; with several tasks the ids carry the task's name."""
    of_task = [read_examples(task.train) for task in client.task_list]
    if len(of_task) == 1:
        return (of_task[0],)
    return tuple(
        tuple(replace(example, id=f"{task.name}/{example.id}") for example in examples)
        for task, examples in zip(client.task_list, of_task, strict=True)
    )


def client_stream(scenario: Scenario, index: int) -> Stream | None:
    """The stream of a client, or None where all its examples are there from the start."""
    if scenario.stream == "all":
        return None
    training = scenario.training
    return make_stream(
        training_examples(scenario.clients[index]),
        scenario.schedule.rounds,
        scenario.stream,
        training.steps * training.gradient_accumulation_steps,
        training.per_device_train_batch_size,
        client_seed(scenario, index),
    )


def client_seed(scenario: Scenario, index: int) -> int:
    """Seed of one client's training, different for every client and every seed of the scenario."""
    return scenario.training.seed + 100_003 * scenario.seed + index


def newcomer_seed(scenario: Scenario, number: int) -> int:
    """Seed of an unseen client's training, different from every member's."""
    return client_seed(scenario, len(scenario.clients) + number)


@dataclass(frozen=True)
class TestSet:
    """One task's test examples, and how an answer is scored."""

    owner: str
    task: str
    metric: Literal["accuracy", "f1"]
    examples: tuple[Example, ...]

    @property
    def label(self) -> str:
        """`owner/task`, as scores are filed."""
        return f"{self.owner}/{self.task}"


class Board:
    """All test sets of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        """Read the test sets and make sure that no test example is trained on.

        Raises:
            ConfigurationError: a set cannot be read, or a test prompt is among its client's training prompts.
        """
        self._own, self._others = scenario.evaluation_examples, scenario.others_examples
        self._score = scenario.score
        self._max_length = scenario.training.max_length
        self.sets = tuple(
            TestSet(client.id, task.name, task.metric, read_examples(task.test))
            for client in scenario.clients
            for task in client.task_list
        )
        self._newcomers = tuple(
            TestSet(client.id, task.name, task.metric, read_examples(task.test))
            for client in scenario.unseen
            for task in client.task_list
        )
        tested = {example.prompt for test in (*self.sets, *self._newcomers) for example in test.examples}
        for client in (*scenario.clients, *scenario.unseen):
            for examples in training_examples(client):
                both = sum(example.prompt in tested for example in examples)
                if both:
                    raise ConfigurationError(
                        f"client {client.id} trains on {both} prompts of test sets; split the data so that "
                        "no test prompt is trained on by anybody"
                    )

    def chosen(self, client: str) -> list[TestSet]:
        """What a client is scored on, cut to the scenario's numbers of examples."""
        wanted = {"all": self.sets, "own": [t for t in self.sets if t.owner == client], "nothing": []}
        return [
            replace(test, examples=test.examples[: limit or None])
            for test in wanted[self._score]
            for limit in [self._own if test.owner == client else self._others]
        ]

    def of_newcomer(self, client: str) -> list[TestSet]:
        """An unseen client's own test sets, cut like a member's."""
        return [
            replace(test, examples=test.examples[: self._own or None])
            for test in self._newcomers
            if test.owner == client
        ]

    def score(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, tests: Sequence[TestSet]
    ) -> dict[str, float]:
        """Score a model; see `TestSet.label` for the keys."""
        return {test.label: self._score_set(model, tokenizer, test) for test in tests}

    def _score_set(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, test: TestSet) -> float:
        if test.metric == "f1":
            if not isinstance(model, PeftModel):
                raise ConfigurationError(
                    f"task {test.label} is scored by what is written, and this method's model cannot write"
                )
            written = written_answers(model, tokenizer, test.examples, _BATCH, max_length=self._max_length)
            return mean_word_f1(written, test.examples)
        return choice_accuracy(model, tokenizer, test.examples, _BATCH, max_length=self._max_length)


def write_training_file(path: Path, tasks: Sequence[Sequence[Example]]) -> Path:
    """Write a client's examples of all tasks as one file that `read_examples` reads."""
    lines = (json.dumps(row_of(example), ensure_ascii=False) for examples in tasks for example in examples)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def add_evaluation(directory: Path, round_number: int, scores: Mapping[str, float]) -> None:
    """Add the scores of a round to a client's record, in place of earlier ones of that round."""
    rounds = {**read_evaluations(directory), round_number: dict(scores)}
    content = [{"round": number, "scores": rounds[number]} for number in sorted(rounds)]
    write_atomically(directory / EVALUATIONS, json.dumps(content, indent=1).encode())


def read_evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """Scores by round, and within a round by `owner/task`; empty if nothing was scored.

    Raises:
        ConfigurationError: the file is damaged.
    """
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
    return ({"self": sum(own) / len(own)} if own else {}) | others
