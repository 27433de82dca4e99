"""A statement as a record of OpenDP's Differential Privacy Deployments Registry.

Fields and values are those of `schemas/deployments-schema.yaml` of opendp/deployments-registry-data on GitHub
as of 2026-07-15. A record is a draft: what the software cannot know is marked and left to its author.
"""

import math
from typing import Any, Final

from fedmosaic import __version__
from fedmosaic.privacy.statement import plain
from fedmosaic.privacy.statement.models import ClientStatement, PrivacyStatement
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES, CHANNEL_NAMES

TO_FILL_IN: Final = "TO BE FILLED IN"


def record(statement: PrivacyStatement, organisation: str = "", purpose: str = "") -> dict[str, Any]:
    """The registry's record of a statement; the figures are those of the client with the largest ε.

    Args:
        statement: one that may be handed over: a registry is public.
        organisation: data curator and author of the record.
        purpose: intended use of the model.
    """
    client = max(statement.clients, key=lambda each: plain.worst_first(each)[0].epsilon or 0.0)
    who = organisation or TO_FILL_IN
    slug = f"fedmosaic-{statement.run_id[:12].lower()}"
    return {
        "url_slug": slug,
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": {
                "name": f"Adapter of a language model, fine-tuned in federation run {statement.run_id}",
                "data_curators": [who],
                "intended_use": purpose or TO_FILL_IN,
                "data_product_type": "Machine learning model",
                "data_product_region": TO_FILL_IN,
                "description": f"Task profile and shared adapter of a federation. {plain.trust(client)}",
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
                "actors": " ".join((plain.trust(client), *plain.verdict(client))),
                "release_type": "Many releases",
                "release_type_details": f"Budget ε = {client.target_epsilon}, never reset. A release that "
                "would exceed it is refused before its noise is drawn.",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "accounting": {
                "post_processing": "Moving average of profiles, cosine, weights, aggregation, training.",
                "composition": "All releases of a client from its data, any run, composed numerically (PRV), "
                "cross-checked with PLD and RDP; disjoint data epochs in parallel.",
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": statement.assumptions[2],
                "mechanisms": f"{_mechanisms(client)} fedmosaic {__version__}: noise on a grid of integers, "
                "against attacks on floating point, from AES-256 in counter mode; gradients of one example "
                "at a time.",
                "justification": TO_FILL_IN,
            },
            "administrative": {"registry_authors": [who], "notes": " ".join(statement.assumptions)},
        },
    }


def _loss(client: ClientStatement) -> dict[str, Any]:
    worst = plain.worst_first(client)[0]
    epsilon = math.inf if worst.epsilon is None else worst.epsilon
    # The schema has numbers alone; where nothing bounds what is sent there is no ε to write.
    parameters = {"delta": client.delta} | ({} if math.isinf(epsilon) else {"epsilon": epsilon})
    told = [
        f"{CHANNEL_NAMES[g.channel]}, {ADVERSARY_NAMES[g.adversary]}: {plain.epsilon_text(g.epsilon)}"
        for g in client.guarantees
    ]
    return {
        "privacy_unit": f"One {client.unit} of one client",
        "privacy_unit_details": f"Adjacent data sets differ by one {client.unit}, added or removed.",
        "privacy_parameters": parameters,
        "privacy_parameters_details": f"ε by channel and adversary: {'; '.join(told)}. "
        + plain.delta_words(client.delta),
    }


def _mechanisms(client: ClientStatement) -> str:
    return " ".join(
        f"{CHANNEL_NAMES[channel.channel]}: "
        + (
            f"Gaussian, noise multiplier {each.noise_multiplier:.3g}, "
            f"sampling rate {each.sampling_rate:.3g}, {each.steps} steps."
            if each.noise_multiplier
            else "no noise."
        )
        for channel in client.channels[:-1]
        for each in channel.mechanisms
    )
