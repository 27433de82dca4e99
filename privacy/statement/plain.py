"""A statement in plain words, for who signs it: who is protected against whom, what ε says, who has what.

Everything follows from the statement alone.
"""

import math
from collections.abc import Sequence
from typing import Final

from fedmosaic.privacy.ledger.rows import NEIGHBOURING_RELATION
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import Adversary, ClientStatement, Guarantee, PrivacyStatement
from fedmosaic.privacy.statement.rounding import round_up
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES, CHANNEL_NAMES

TRUST: Final[dict[models.Protection, str]] = {
    "none": "You trust everybody who takes part: nothing protects what is sent.",
    "encrypted": "You trust the other members, and that none of them helps the server.",
    "distributed-dp": "You trust that no more members of a group work together than the terms allow for.",
    "dp+encrypted": "You trust nobody but your own machine and this software.",
    "dp": "You trust nobody but your own machine and this software.",
}
"""Whom a client trusts, the weakest protection first."""
_COVERED: Final[dict[models.Cover, str]] = {
    "nothing": "NOT protected against {who}: nothing limits what they can learn about one {unit}{value}.",
    "dp": "Protected by differential privacy against {who}{value}.",
    "dp_and_cryptography": "Protected by differential privacy and by encryption against {who}{value}.",
    "mixed": "Protected against {who}: releases of {only} by encryption alone, all others "
    "by differential privacy{value}.",
    "cryptography_only": "Protected by encryption alone against {who}.",
    "nothing_sent": "Nothing is sent where this could be seen: {who}.",
}
_LITTLE: Final = 10.0
"""Above this ε, differential privacy promises next to nothing."""
ROUNDING: Final = (
    "Every ε is rounded up to three decimals. In a statement that is handed over, δ, noise and sampling rate "
    "are rounded first, towards more loss, so that it does not tell the number of examples: its ε may be a "
    "little larger than the member's own for the same release."
)


def epsilon_text(value: float | None) -> str:
    """An ε, rounded up; what is protected by encryption alone has none."""
    if value is None:
        return "encryption alone"
    return "∞" if math.isinf(value) else f"{math.ceil(round(value * 1000, 6)) / 1000:.3f}"


def delta_text(value: float) -> str:
    """δ to one digit, rounded up, which stays true and does not tell the number of examples."""
    return f"{round_up(value, 1):.0e}"


def unit_words(client: ClientStatement) -> str:
    """What ε protects, and in which sense two data sets are compared."""
    usual = client.neighbouring_relation == NEIGHBOURING_RELATION
    return f"one {client.unit}, " + ("in the data or not" if usual else client.neighbouring_relation)


def joint(client: ClientStatement) -> dict[Adversary, Guarantee]:
    """What holds for everything that a client sent together, by adversary."""
    return {each.adversary: each for each in client.guarantees if each.channel == "joint"}


def worst_first(client: ClientStatement) -> list[Guarantee]:
    """What holds for everything that was sent, the largest ε first."""
    found = reversed(joint(client).values())
    return sorted(found, key=lambda each: 1.0 if each.epsilon is None else -each.epsilon)


def trust(client: ClientStatement) -> str:
    """Whom this client trusts, by the weakest of its channels."""
    if client.test_noise:
        return "NO GUARANTEE HOLDS: the noise came from a test generator, whose seed undoes it."
    found = {channel.protection for channel in client.channels[:-1] if channel.channel != "profile"}
    return next((words for mode, words in TRUST.items() if mode in found), TRUST["dp"])


def verdict(client: ClientStatement) -> tuple[str, ...]:
    """Against whom one client is protected, and by what; what is not protected comes first."""
    groups: dict[tuple[models.Cover, float | None, tuple[str, ...]], list[Guarantee]] = {}
    for each in worst_first(client):
        groups.setdefault((each.cover, each.epsilon, each.cryptography_only), []).append(each)
    lines = []
    for (cover, epsilon, _), found in groups.items():
        who = _listed([ADVERSARY_NAMES[each.adversary] for each in reversed(found)])
        only = _listed([CHANNEL_NAMES[name] for name in found[0].cryptography_only])
        value = f" (ε {'=' if epsilon == math.inf else 'at most'} {epsilon_text(epsilon)})"
        line = _COVERED[cover].format(who=who, unit=client.unit, value=value, only=only)
        little = epsilon is not None and _LITTLE < epsilon < math.inf
        lines.append(line.replace("Protected", "HARDLY protected", 1) if little else line)
    return tuple(lines)


def person_text(guarantee: Guarantee, examples: int) -> str:
    """ε of a person with so many examples; a dash where it was not computed or does not apply."""
    found = {each.examples: each.epsilon for each in guarantee.persons}
    if examples in found:
        return epsilon_text(found[examples])
    return "∞" if guarantee.cover == "nothing" else "-"


def protected_words(channel: models.ChannelStatement) -> str:
    """Which releases of a channel left under which protection, this run's and others'."""
    whose = {"this": "this run", "others": "other runs on the same data", "any": "all runs on the data"}
    return "; ".join(
        f"{whose[each.run]}: {each.releases} under {each.protection}" for each in channel.protected
    )


def reach(guarantee: Guarantee) -> str:
    """What an attacker gets at most who wrongly accuses one in a hundred, from the whole privacy curve."""
    if guarantee.attack is None:
        return "not applicable"
    share = 100 * guarantee.attack.true_positive_rate_at_1_percent
    return "all of them" if share > 99.95 else f"{math.ceil(round(share * 10, 6)) / 10:g} of 100"


def delta_words(delta: float) -> str:
    """What δ is and why it is small enough."""
    weak = " That is weak: one example of few stands out. Terms with a bound of 1e-5 cost more noise."
    return (
        f"δ = {delta_text(delta)} is the part of all outcomes, about 1 in {1 / round_up(delta, 1):,.0f}, for "
        "which ε promises nothing. It was fixed when the ledger was opened, as the smaller of n^-1.1 for n "
        "examples and the bound of the signed terms (adapter_privacy.largest_delta), and more examples than "
        "1/δ are refused: then no mechanism passes that publishes one example picked at random."
        + (weak if delta > 1e-4 else "")
    )


def coalition_words(rows: Sequence[models.CoalitionRows]) -> tuple[str, ...]:
    """How many recipients who put what they received together can compute a single member's adapter."""
    lines = []
    for each in rows:
        count = each.colluding_recipients
        who = "One recipient alone" if count == 1 else f"{count} recipients together"
        if each.independent_rows < each.contributors:
            # No stronger: a server that chooses the weights, or rows in a special position, change it.
            lines.append(f"{who} cannot in general compute a single adapter, while the server is honest.")
            continue
        at_once = count >= each.contributors
        when = "from one round" if at_once else "over several rounds, if adapters hardly change between them"
        lines.append(f"{who} can compute every adapter that went into what they received, {when}.")
    return tuple(dict.fromkeys(lines))


def keys(statement: PrivacyStatement) -> tuple[tuple[str, str, str], ...]:
    """Who holds which key: its name, what it does, who has it."""
    made = "the member, who made it (fedmosaic keys request); after keys init --for-demo the founder too"
    found = [
        ("identity key, one per member", "signs uploads and key agreement", made),
        ("TLS key, one per member", "opens the connection to the server", made),
        ("consortium keys", "sign the roster and all certificates", "the consortium, who founds"),
        ("the server's TLS key", "proves the server to the members", "the server's operator"),
        ("ledger's salt", "hides the ledger's rows from who keeps its anchor", "the member alone"),
    ]
    channels = [channel for client in statement.clients for channel in client.channels]
    modes = {channel.protection or "" for channel in channels}
    modes |= {part.protection for channel in channels for part in channel.protected}
    if any("encrypted" in mode for mode in modes):
        who = "every member, one key for all; not the server. Deleted at a member when its run is over"
        found.insert(0, ("group key", "decrypts adapters and their sums", who))
    if "distributed-dp" in modes:
        who = "each pair of members, for one round; the server opens those of a member who vanishes"
        found.insert(0, ("mask keys", "hide one member's part of a sum", who))
    return tuple(found)


RETENTION: Final = (
    (
        "the member",
        "adapters, the released profile, scores and this statement in the state directory, until "
        "the member deletes them; uploads of closed rounds are deleted at once",
    ),
    ("the member", "the ledger beside the data: keep it as long as the data, or what was spent is forgotten"),
    (
        "the server",
        "profiles, weights, statements and what was sent of the last round, until the operator "
        "deletes its state directory and database; uploads of earlier rounds are deleted when the next opens",
    ),
    ("the other members", "what they received, as part of their own models. It cannot be called back"),
)
"""Who keeps what, and for how long."""


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:-1]) + ("; and " if len(names) > 1 else "") + "".join(names[-1:])
