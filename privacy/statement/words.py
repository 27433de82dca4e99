"""The words of the privacy statement: who is covered by what, under which assumptions, what leaks anyway.

They are those of the project's threat model, and no stronger.
"""

from collections.abc import Iterable, Set

from fedmosaic.privacy.coalitions import counted_coalition
from fedmosaic.privacy.ledger.rows import Channel, Unit
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import Adversary

ADVERSARY_NAMES: dict[Adversary, str] = {
    "network": "the network",
    "server_honest_but_curious": "the server, honest but curious",
    "server_malicious": "the server, malicious",
    "recipient": "one recipient",
    "colluding_recipients": "colluding recipients",
    "colluding_recipients_with_server": "colluding recipients with the server",
}
CHANNEL_NAMES: dict[models.StatementChannel, str] = {
    "profile": "task profile",
    "adapter": "shared adapter (P, Q)",
    "family": "family's LoRA",
    "joint": "all channels together",
}
SERVERS: tuple[Adversary, ...] = ("server_honest_but_curious", "server_malicious")

UNITS: dict[Unit, str] = {
    "example": "The unit of privacy is one example of one client, added or removed. A person with several "
    "examples is protected less, as the table for 2, 5 and 10 says, and so is a picture in several. Copies "
    "of an example under another id are others.",
    "person": "The unit of privacy is one person of one client, added or removed with all its examples, as "
    "the column of persons in the client's data tells them apart: a person under two names is two. Where "
    "this statement speaks of an example, it is the sum of one person's.",
}
ASSUMPTIONS = (
    "The public map, clipping norm and probe model come from public data or public seeds, the same for all "
    "clients, and from no private data of any client.",
    "Noise multipliers, sampling rates and the number of steps were fixed before the run, not chosen after "
    "looking at private results. Tuning on private data is a release that is not in this statement.",
    "Sampling is really Poisson: every example enters each step independently with probability q.",
    "The number of examples counts as public: δ, the sampling rate and the adapter's noise are planned with "
    "it.",
    "An example's gradient depends on no other example: each goes through the model alone, and no layer "
    "keeps anything of it. Clipping and noise were computed in float32 or better. Noise came from a "
    "cryptographically secure generator, every draw a sum of several Gaussians, added on a grid of integers, "
    "against attacks on floating point.",
    "The ledger is the only record of releases: a copy of this data under another ledger, and everything "
    "released from it elsewhere, comes on top.",
    "The client's machine, its operating system's randomness and this software do what they should.",
)
SHARED_KEY_ASSUMPTION = (
    "The aggregation key is shared by the clients: one client together with the server reads every upload. "
    "Members check each other's signatures against pinned identities, so the server cannot add members."
)
APPROXIMATE_DECRYPTION_ASSUMPTION = (
    "A decrypted aggregate never leaves the client: with approximate homomorphic encryption it would reveal "
    "the key (Li and Micciancio 2021)."
)
GROUP_SUMS_ASSUMPTION = (
    "Of the contributors of every sum of a group, at most as many work together with the server as the terms "
    "allow for, and all the others add the noise that the terms ask of them; whoever adds none counts as one "
    "who works with the server. That nothing but sums is seen rests on cryptography: X25519, Ed25519, "
    "HKDF-SHA256, AES and Shamir's sharing."
)
NO_METRICS_ASSUMPTION = (
    "No metric, loss curve, number of examples or tuning decision that depends on private data left a client."
)

LEAKS = (
    "That a client takes part, when, for how long, and the sizes of its messages and of its model.",
    "What its task is about: the profile exists to tell the server which clients' tasks are alike. DP hides "
    "single examples, not the nature of the data.",
    "δ, sampling rate and noise follow from the number of the client's examples. Its own statement tells it; "
    "the one handed over, made from rounded numbers, to within a factor of 1.5, or closer where another "
    "run trained on them with DP.",
    "Whether a client has the examples that a profile needs at least, and how often its data changed: it "
    "then sends a new profile.",
    "How long a private step takes, which grows with the size of its random sample, and how long a task "
    "profile and an evaluation take, which grows with the number of examples. Where a round takes nearly as "
    "long as the terms' deadline, that decides who is in time, which all members see.",
    "Poisoning and free-riding are not a question of privacy and are not covered here.",
)
OTHER_RUNS_LEAK = (
    "Other runs released from the same data ({modes}), and every ε counts that. Who took part there, who "
    "served, what a recipient got and whether a witness checked it is not known here, and nothing that is "
    "said of recipients, sums and rows here is about them: the statements of those runs tell it."
)
UNCHECKED_ROWS_LEAK = (
    "With the encryption ckks a recipient cannot check that its sum was made with the weights that it is "
    "told: a malicious server can hand it a single adapter in place of a sum. Only DP bounds what that "
    "reveals; the encryption mask notices."
)
WITNESSED_ROWS_LEAK = (
    "With the encryption ckks a recipient alone cannot check that its sum was made with the weights that it "
    "is told. The witness {witness} recomputes every sum from the signed uploads, and a recipient opens none "
    "without its countersignature. A server and a witness that lie together can hand out a single adapter in "
    "place of a sum; only DP bounds what that reveals."
)
GROUP_SUMS_LEAK = (
    "The server and all members read every sum of a group, and who contributed to it. What an example does "
    "to a sum is hidden by the noise alone."
)

_GROUP_SUMS: dict[Adversary, str] = {
    "network": "sees TLS 1.3 records only",
    "server_honest_but_curious": "reads sums of a group, with all contributors' noise: at most this ε",
    "server_malicious": "reads sums of a group; ε is with the noise known to it of as many members as the "
    "terms allow for",
    "recipient": "receives sums of a group, and knows its own noise in them: at most this ε",
    "colluding_recipients": "know their own noise; ε is for more of them than the terms allow for, when only "
    "a member's own noise is left",
    "colluding_recipients_with_server": "know their own noise and can open the masks; ε is for more of them "
    "than the terms allow for, when only a member's own noise is left. With fewer, see the malicious server",
}
"""What each adversary sees of the sums of `distributed-dp`."""


def coverage(
    channel: Channel, protection: models.Protection, adversary: Adversary, inputs: models.StatementInputs
) -> tuple[models.Cover, str]:
    """What protects one channel against one adversary, and the sentence that says so."""
    private, encrypted = protection in models.PRIVATE, "encrypted" in protection
    if protection == "distributed-dp" and channel == "adapter":
        sees = _GROUP_SUMS[adversary]
    else:
        sees = _what_is_seen(channel, encrypted, adversary, inputs)
    if adversary == "network" and inputs.transport == "in_process":
        return "nothing_sent", "no network was used: the simulation ran in one process"
    hidden = adversary == "network" or (encrypted and adversary in SERVERS)
    if private and hidden:
        return "dp_and_cryptography", f"{sees}; what is inside is differentially private besides"
    if private and protection == "distributed-dp" and channel == "adapter":
        return "dp", sees
    if private:
        return "dp", f"{sees}, differentially private before it left the client"
    if hidden:
        return "cryptography_only", f"{sees}; cryptography only, so ε does not apply"
    return "nothing", f"{sees}, without differential privacy: ε = ∞"


def _what_is_seen(channel: str, encrypted: bool, adversary: Adversary, inputs: models.StatementInputs) -> str:
    if adversary == "network":
        return "sees TLS 1.3 records only"
    if channel == "profile":
        if adversary in SERVERS or adversary.endswith("with_server"):
            return "reads the noisy profile"
        return "sees weights and aggregates that derive from the noisy profile"
    if adversary in SERVERS:
        if not encrypted:
            return "reads the tensors"
        seen = "sees size and timing of ciphertexts"
        if adversary == "server_malicious":
            seen += (
                ", and choosing rows, replaying or dropping does not decrypt them while members check each "
                "other against pinned identities"
            )
        return seen
    if adversary == "recipient":
        return "receives a weighted sum of adapters"
    if adversary == "colluding_recipients":
        return "hold several weighted sums, and can solve for single adapters"
    if encrypted:
        return "share the key, so with the server they decrypt every upload"
    return "read the tensors"


def assumptions(units: Iterable[Unit], any_encrypted: bool, group_sums: bool) -> tuple[str, ...]:
    """Everything that the figures of this run rest on; `units` are those of its clients."""
    found = [*(UNITS[unit] for unit in sorted(set(units))), *ASSUMPTIONS]
    if any_encrypted:
        found += [SHARED_KEY_ASSUMPTION, APPROXIMATE_DECRYPTION_ASSUMPTION]
    if group_sums:
        found.append(GROUP_SUMS_ASSUMPTION)
    return (*found, NO_METRICS_ASSUMPTION)


def leaks(
    inputs: models.StatementInputs, own: Set[models.Protection], others: Set[models.Protection]
) -> tuple[str, ...]:
    """What this run discloses whatever its protection; `own` are this run's, `others` those of others."""
    found = list(LEAKS)
    if others:
        found.append(OTHER_RUNS_LEAK.format(modes=", ".join(sorted(others))))
    if "distributed-dp" in own:
        return (*found, GROUP_SUMS_LEAK)
    found.append(
        f"What a recipient gets is a sum of the adapters of at least {inputs.minimum_contributors} others, "
        f"each with a share of at most {inputs.weight_cap:g} (squared, the shares add up to at most "
        f"{inputs.squares_cap:g}). " + _collusion(inputs, bool(own & {"none", "encrypted"}))
    )
    if inputs.encryption.startswith("ckks"):
        witnessed = WITNESSED_ROWS_LEAK.format(witness=inputs.witness)
        found.append(witnessed if inputs.witness else UNCHECKED_ROWS_LEAK)
    return tuple(found)


def _collusion(inputs: models.StatementInputs, any_unprotected: bool) -> str:
    """The true number of recipients that suffices, from the smallest set of contributors that occurred."""
    fewest = inputs.minimum_contributors
    smallest = fewest if inputs.smallest_row is None else inputs.smallest_row
    aggregates = inputs.rounds - 1
    seen = f"the smallest aggregate received here had {smallest}"
    if inputs.smallest_row is None:
        seen = f"none was received here, the least allowed is {smallest}"
    words = (
        f"That hides no single adapter from recipients who put their sums together: {seen}, and "
        f"{_recipients(smallest, 1)} can compute those from one sum each"
    )
    if aggregates > 1:
        words += (
            f", {_recipients(smallest, aggregates)} from the {aggregates} sums of the run if adapters hardly "
            "change"
        )
    if smallest > fewest:
        words += f"; aggregates of others, not seen here, may have {fewest}: then {_recipients(fewest, 1)}"
    words += "; two are enough, whatever the number, if a malicious server chooses their weights"
    return words + (
        ". Nothing but DP on the adapter would help, and there is none."
        if any_unprotected
        else ". DP bounds it."
    )


def _recipients(contributors: int, sums: int) -> str:
    count = counted_coalition(contributors, sums)
    return f"{count} recipient{'s' if count > 1 else ''}"
