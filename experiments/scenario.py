"""A scenario: who is in a federation, with which model, data and privacy.

Paths in a scenario file are relative to the file. A path that begins with `asset:` names something
that `fedmosaic.experiments.assets` provides.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fedmosaic.client.settings import ModelSettings
from fedmosaic.client.training import TrainingSettings
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.encryption.parameters import CkksParameters, Parameters
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.privacy.roster import (
    AdapterPrivacyTerms,
    AdapterTerms,
    MemberId,
    RelevanceTerms,
    ScheduleTerms,
)


class ScenarioProfile(Frozen):
    """The task profile, before the probe's fingerprint and the public basis are known."""

    public_data: Path
    kind: str = "kronecker"
    side: int = Field(default=16, ge=1)
    noise_multiplier: float = Field(default=8.0, ge=0)
    max_length: int = Field(default=96, ge=8)


class ScenarioClient(Frozen):
    """One client: its model and its own task."""

    id: MemberId
    task: str
    model: ModelSettings
    train: Path
    test: Path
    family: str = ""


class Scenario(Frozen):
    """Everything `fedmosaic run` needs to run a federation on one machine."""

    name: MemberId
    description: str = ""
    probe: ModelSettings
    profile: ScenarioProfile
    adapter: AdapterTerms = AdapterTerms()
    adapter_privacy: AdapterPrivacyTerms = AdapterPrivacyTerms()
    policy: AggregationPolicy = AggregationPolicy()
    relevance: RelevanceTerms = RelevanceTerms()
    schedule: ScheduleTerms = ScheduleTerms()
    encryption: Annotated[Parameters, Field(discriminator="backend")] = CkksParameters()
    allow_plaintext: bool = False
    training: TrainingSettings = TrainingSettings()
    clients: tuple[ScenarioClient, ...] = Field(min_length=1)
    evaluation_examples: int = Field(default=0, ge=0)
    """At most this many examples of a client's own test set; 0 takes all."""
    others_examples: int = Field(default=0, ge=0)
    """The same for every other task's test set."""

    @model_validator(mode="after")
    def _distinct_clients(self) -> "Scenario":
        ids = [client.id for client in self.clients]
        if len(set(ids)) != len(ids):
            raise ValueError(f"client ids must differ, got {ids}")
        return self
