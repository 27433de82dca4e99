"""A statement as a draft record of OpenDP's Differential Privacy Deployments Registry.

Fields and values are those of `schemas/deployments-schema.yaml` of opendp/deployments-registry-data on GitHub
as of 2026-07-15. What the software cannot know is marked and left to its author.
"""

import math
from typing import Any, Final

from fedmosaic import __version__
from fedmosaic.privacy.statement import plain
from fedmosaic.privacy.statement.models import ClientStatement, PrivacyStatement
from fedmosaic.privacy.statement.words import ASSUMPTIONS

TO_FILL_IN: Final = "TO BE FILLED IN"


def record(statement: PrivacyStatement, organisation: str = "", purpose: str = "") -> dict[str, Any]:
    """The registry's record of a statement that may be handed over, with the figures of the largest ε."""
    client = max(statement.clients, key=lambda each: plain.worst_first(each)[0].epsilon or 0.0)
    who, trust = organisation or TO_FILL_IN, plain.trust(client)
    mechanisms = " ".join(
        f"Gaussian: noise {each.noise_multiplier:.3g}, rate {each.sampling_rate:.3g}, {each.steps} steps."
        for channel in client.channels[:-1]
        for each in channel.mechanisms
        if each.noise_multiplier
    )
    parts = {
        "basic": {
            "name": f"Adapter of a language model, fine-tuned in federation run {statement.run_id}",
            "data_curators": [who],
            "intended_use": purpose or TO_FILL_IN,
            "data_product_type": "Machine learning model",
            "data_product_region": TO_FILL_IN,
            "description": f"Task profile and shared adapter of a federation. {trust}",
            "publication_date": statement.created[:10] or "1900-01-01",
        },
        "dp_variant": {
            "variant_name": "Approximate DP",
            "data_domain": "Sets of training examples of one client, of any size.",
            "unprotected_quantities": " ".join(statement.leaks),
        },
        "privacy_loss": _loss(client),
        "deployment_model": {
            "model_name": "Federated",
            "actors": " ".join((trust, *plain.verdict(client))),
            "release_type": "Many releases",
            "release_type_details": f"Budget ε = {client.target_epsilon}, never reset.",
            "data_source_type": "Static",
            "access_type": "Non-interactive",
        },
        "accounting": {
            "post_processing": "Moving average of profiles, cosine, weights, sums, training.",
            "composition": "All releases from the client's data in any run, composed numerically (PRV, "
            "checked with PLD and RDP); disjoint sets of data in parallel.",
        },
        "implementation": {
            "preprocessing_and_hyperparameter_tuning": ASSUMPTIONS[2],
            "mechanisms": f"fedmosaic {__version__}. {mechanisms} Noise on a grid of integers, from "
            "AES-256 in counter mode; gradients of one example at a time.",
            "justification": TO_FILL_IN,
        },
        "administrative": {"registry_authors": [who], "notes": " ".join(statement.assumptions)},
    }
    slug = f"fedmosaic-{statement.run_id[:12].lower()}"
    return {"url_slug": slug, "status": "Draft", "tier": 3, "deployment": parts}


def _loss(client: ClientStatement) -> dict[str, Any]:
    epsilon = plain.worst_first(client)[0].epsilon
    # The schema has numbers alone; where nothing bounds what is sent there is no ε to write.
    bounded = epsilon is not None and math.isfinite(epsilon)
    told = " ".join(f"ε = {plain.epsilon_text(each.epsilon)} for {each.words}." for each in client.guarantees)
    return {
        "privacy_unit": f"One {client.unit} of one client",
        "privacy_unit_details": f"Adjacent data sets differ by one {client.unit}, added or removed.",
        "privacy_parameters": {"delta": client.delta} | ({"epsilon": epsilon} if bounded else {}),
        "privacy_parameters_details": f"{told} {plain.delta_words(client.delta)}",
    }
