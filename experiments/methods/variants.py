"""FedMosaic with something changed: its ablations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.configuration import validate
from fedmosaic.protos.errors import ConfigurationError

UNIFORM_TEMPERATURE: Final = 1e9
"""A softmax over similarities in [-1, 1] at this temperature is uniform to nine digits."""


@dataclass(frozen=True)
class Variant:
    """FedMosaic with some changes, given as nested tables of the scenario.

    Aligned checkpoints stay ("as_named"), go ("left_out"; the scenario must name some), or are "refused"
    where they would undo the change.
    """

    description: str
    changes: Mapping[str, object]
    aligned: Literal["as_named", "left_out", "refused"] = "as_named"


VARIANTS: Final[dict[str, Variant]] = {
    "fedmosaic": Variant("Co-LoRA and relevance weights, as the scenario says", {}),
    "fedmosaic-uniform": Variant(
        "without relevance: every other client has the same weight",
        {"relevance": {"temperature": UNIFORM_TEMPERATURE}},
    ),
    "fedmosaic-fixed-gate": Variant("the received branch always has weight 1/2", {"fixed_gate": 0.5}),
    "fedmosaic-family": Variant(
        "clients of one architecture also share LoRA of other layers", {"family_sharing": True}
    ),
    "fedmosaic-cosine": Variant(
        "the paper's cosine of noisy profiles, not corrected", {"relevance": {"similarity": "cosine"}}
    ),
    "fedmosaic-first-layers": Variant(
        "without block alignment: the first layers share, whatever the model's depth",
        {"adapter": {"layer_rule": "first"}},
        aligned="refused",
    ),
    "fedmosaic-unaligned": Variant(
        "without weight alignment: random bases in place of the aligned checkpoints",
        {"adapter": {"basis": ""}},
        aligned="left_out",
    ),
    "fedmosaic-blend": Variant(
        "the local branch begins every round half way to what is received (not in the paper)",
        {"training": {"blend_received": 0.5}},
    ),
    "fedmosaic-family-blend": Variant(
        "the same with family sharing", {"family_sharing": True, "training": {"blend_received": 0.5}}
    ),
    "fedmosaic-alone": Variant(
        "the same adapter and training, but what is received is not used", {"discard_received": True}
    ),
}


def with_variant(scenario: Scenario) -> Scenario:
    """The scenario with the changes of the variant that it names."""
    variant = VARIANTS[scenario.method]
    content = scenario.model_dump(mode="json")
    named = [client["model"] for client in content["clients"] if client["model"]["aligned"]]
    if variant.aligned == "refused" and named:
        raise ConfigurationError(
            f"{scenario.method} with aligned checkpoints: they fix which layers share; leave them out"
        )
    if variant.aligned == "left_out":
        if not named:
            raise ConfigurationError(
                f"{scenario.method} leaves aligned checkpoints out, and scenario {scenario.name} names none"
            )
        for model in named:
            model |= {"aligned": None, "rank": None}
    for key, change in variant.changes.items():
        content[key] = {**content[key], **change} if isinstance(change, dict) else change
    return validate(content, Scenario, f"scenario {scenario.name} as {scenario.method}")
