"""A scenario: who is in a federation, with which model, data and privacy.

Paths in a scenario file are relative to the file; `$NAME` in them is taken from the environment.
"""

import os
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from fedmosaic.client.settings import ModelSettings, ProbeModelSettings, TrainingSettings
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.federation.names import Family, MemberId
from fedmosaic.privacy.federation.terms import CommonTerms
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError


class RunFailedError(FedMosaicError):
    """A process or a client of a run ended with an error, or did not start."""


class ScenarioProfile(Frozen):
    """The task profile, before the probe's fingerprint and the public basis are known."""

    public_data: Path
    kind: Literal["kronecker", "tensor_sketch", "coordinates"] = "kronecker"
    dimensions: int = Field(default=128, ge=1)
    left: int = Field(default=4, ge=1)
    noise_multiplier: float = Field(default=8.0, ge=0)
    max_length: int = Field(default=96, ge=8)
    minimum_examples: int = Field(default=50, ge=1)
    """A client with fewer releases no profile; below 50 it would be mostly noise, if there is any noise."""


class ScenarioTask(Frozen):
    """One task of a client, in the form of `fedmosaic.client.model.examples.read_examples`."""

    name: str = Field(min_length=1)
    train: Path
    test: Path


class ScenarioClient(Frozen):
    """One client: its model and its own tasks, either one (`task`, `train`, `test`) or several in order."""

    id: MemberId
    task: str = ""
    train: Path | None = None
    test: Path | None = None
    tasks: tuple[ScenarioTask, ...] = ()
    model: ModelSettings
    family: Family = ""
    group: str = ""
    """Clients of one group have tasks alike, as the experimenter knows; relevance is scored by it."""
    rank: int | None = Field(default=None, ge=1, le=1024)
    """Rank of this client's LoRA, for the methods whose ranks may differ; adapter.rank by default."""
    projector: Path | None = None
    """Folder of the projector that lets a language model read images; `fedmosaic tasks projector`."""

    @model_validator(mode="after")
    def _one_form(self) -> "ScenarioClient":
        single = (bool(self.task), self.train is not None, self.test is not None)
        if self.tasks and any(single):
            raise ValueError(f"client {self.id} names both tasks and a single task; choose one form")
        if not self.tasks and not all(single):
            raise ValueError(f"client {self.id} needs task, train and test, or a list of tasks")
        names = [task.name for task in self.task_list]
        if len(set(names)) != len(names):
            raise ValueError(f"client {self.id} names a task twice: {names}")
        return self

    @property
    def task_list(self) -> tuple[ScenarioTask, ...]:
        """The client's tasks in order."""
        if self.train is None or self.test is None:
            return self.tasks
        return (ScenarioTask(name=self.task, train=self.train, test=self.test),)

    @property
    def domain(self) -> str:
        """The client's tasks in one word or several."""
        return self.task or ", ".join(task.name for task in self.tasks)

    @property
    def architecture(self) -> str:
        """Clients with the same one can share a model in memory."""
        return f"{self.model.model_dump_json()} {self.projector or ''}"


class Scenario(CommonTerms):
    """Everything `fedmosaic run` needs to run a federation on one machine, beside its terms."""

    name: MemberId
    description: str = ""
    probe: ProbeModelSettings
    profile: ScenarioProfile
    training: TrainingSettings = TrainingSettings()
    clients: tuple[ScenarioClient, ...] = Field(min_length=1)
    evaluation_examples: int = Field(default=0, ge=0)
    """At most this many examples of each of a client's own test sets; 0 takes all."""
    others_examples: int = Field(default=0, ge=0)
    """The same for every other client's test sets."""
    evaluate_every: int = Field(default=0, ge=0)
    """Score after every so many rounds and after the last; 0 scores after the last only."""
    score: Literal["all", "own", "nothing"] = "all"
    """What a client's model is scored on: all test sets (N² of them), its own, or none."""
    stream: Literal["all", "static", "dynamic"] = "all"
    """When a client's examples arrive: all at the start, mixed in equal parts per round, or task by task."""
    method: str = "fedmosaic"
    """See `fedmosaic methods`; all but `fedmosaic` and its ablations are baselines without privacy."""
    family_sharing: bool = False
    """Clients of one family also share the LoRA of their other layers."""
    fixed_gate: float | None = Field(default=None, ge=0.0, le=1.0)
    """Weight of the received branch, in place of the learnt gate."""
    discard_received: bool = False
    """Go on as if the policy had refused every aggregate: what the same adapter does without the others."""
    equal_compute: bool = False
    """Take as many steps as cost what `training.steps` of local LoRA cost, by measured operations."""
    images: Path | None = None
    """Folder that the images which prompts name lie in."""
    question_only: bool = False
    """Leave every image out: what the questions alone give away."""
    variant: str = ""
    """Words for the tables that tell this run from others of the same method."""
    seed: int = Field(default=0, ge=0, le=2**31)
    """Of the order of the examples, the streams and the adapters' start. The noise is never seeded by it."""
    unsafe_test_noise_seed: int | None = None
    """Makes the noise predictable, for reruns bit by bit; the statement then says that no guarantee holds."""

    @model_validator(mode="before")
    @classmethod
    def _renamed_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        if "pictures" in content:
            raise ValueError("the key 'pictures' is now called 'images'; rename it")
        if content.get("unseen"):
            raise ValueError("unseen clients are no longer part of a scenario; leave the key out")
        # Runs of before have these keys, empty, in their `scenario.json`.
        return {key: value for key, value in content.items() if key not in ("unseen", "adaptation_steps")}

    @model_validator(mode="after")
    def _consistent(self) -> "Scenario":
        ids = [client.id for client in self.clients]
        if len(set(ids)) != len(ids):
            raise ValueError(f"client ids must differ, got {ids}")
        impossible = {f"stream {self.stream!r}": self.stream != "all", "equal_compute": self.equal_compute}
        for what, asked in impossible.items() if self.adapter.private else ():
            if asked:
                raise ValueError(
                    f"{what} with adapter.protection {self.adapter.protection!r}: the noise is planned for "
                    f"one set of examples and so many steps; leave {what} out, or choose protection 'none' "
                    "or 'encrypted'"
                )
        return self

    def rounds_to_score(self) -> tuple[int, ...]:
        """Rounds after which every client is scored, the last one among them."""
        if self.score == "nothing":
            return ()
        rounds = self.schedule.rounds
        every = self.evaluate_every or rounds
        return tuple(sorted({*range(every, rounds + 1, every), rounds}))

    def resolved(self, base: Path) -> "Scenario":
        """The same scenario with absolute paths, which start from the directory of the scenario file.

        A model path that is no folder there stays as it is: it may be the id of a model on a hub.
        `ConfigurationError` if a path needs an environment variable that is not set.
        """

        def place(value: Any) -> Any:
            if isinstance(value, Path):
                return (base / _expanded(str(value))).resolve()
            if isinstance(value, tuple):
                return tuple(map(place, value))
            if isinstance(value, ModelSettings):
                aligned = value.aligned and _expanded(value.aligned)
                changes = {"path": _expanded(value.path), "aligned": aligned}
                return value.model_copy(update=changes).located(base)
            if isinstance(value, Frozen):
                named = {name: place(getattr(value, name)) for name in value.model_fields_set}
                return value.model_copy(update=named)
            return value

        return cast("Scenario", place(self))


def _expanded(path: str) -> str:
    text = os.path.expandvars(path)
    if "$" in text:
        raise ConfigurationError(f"{path}: set the environment variable that this path begins with")
    return text
