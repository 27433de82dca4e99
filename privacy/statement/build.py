"""Build the privacy statement of a run from its clients' ledgers.

The ledger says what happened, and where it and the configuration disagree the worse of the two is
reported. A statement whose accountants contradict each other is not made: `AccountingError`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedmosaic.privacy.accounting import epsilon as accounting
from fedmosaic.privacy.accounting.epsilon import (
    EpsilonBound,
    cross_checked_epsilon,
    epsilon_bound,
    person_epsilon,
)
from fedmosaic.privacy.accounting.events import AttackBounds, GaussianEvent
from fedmosaic.privacy.accounting.leverage import effective_noise_multiplier
from fedmosaic.privacy.accounting.tradeoff import UNBOUNDED, attack_bounds
from fedmosaic.privacy.ledger import rows as ledger
from fedmosaic.privacy.ledger.rows import Channel, Charge, LedgerRow, compositions
from fedmosaic.privacy.ledger.rules import LedgerParameters, bound_of, parameters_of
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import Adversary, ClientStatement, Guarantee, PrivacyStatement
from fedmosaic.privacy.statement.words import (
    ADVERSARY_NAMES,
    CHANNEL_NAMES,
    SERVERS,
    assumptions,
    coverage,
    leaks,
)

_BEYOND_THE_CLAIM: frozenset[Adversary] = frozenset(
    {"colluding_recipients", "colluding_recipients_with_server"}
)
"""Adversaries of any number of members: against them only a member's own noise is left in a sum."""
_WITH_NOISE: frozenset[models.Cover] = frozenset({"dp", "dp_and_cryptography", "mixed"})
"""Covers of a channel that an ε is stated for."""
_TELLING = 20.0
"""Largest ε of one example beside which that of several is worth its minutes."""
_NO_GUARANTEE = "no guarantee: the noise came from a seeded test generator"


@dataclass(frozen=True, slots=True)
class _Channel:
    """One channel of one client, as the ledger and the configuration tell it."""

    name: Channel
    protection: models.Protection
    rows: tuple[LedgerRow, ...]
    test_noise: bool


@dataclass(frozen=True, slots=True)
class _Client:
    """What is needed again and again while one client's part is made."""

    parameters: LedgerParameters
    inputs: models.ClientInputs
    run: models.StatementInputs
    channels: tuple[_Channel, ...]

    def charges(self, names: Iterable[str], adversary: Adversary = "server_malicious") -> list[Charge]:
        """What was charged on these channels, with the noise that is left against an adversary."""
        wanted = frozenset(names)
        found = []
        for row in self.inputs.ledger:
            for charge in ledger.charges([row], wanted):
                sigma = charge.event.noise_multiplier * noise_left(row, adversary)
                found.append(replace(charge, event=replace(charge.event, noise_multiplier=sigma)))
        return found

    def bound(self, charged: Sequence[Charge], *, private: bool = True) -> EpsilonBound:
        """ε of what was charged; ∞ where something besides is not private."""
        if not private:
            return EpsilonBound(math.inf, self.parameters.accountant)
        return bound_of(charged, self.parameters.delta, self.parameters.accountant)


def noise_left(row: LedgerRow, adversary: Adversary) -> float:
    """Noise of one release against an adversary, over that of the row; other than 1 in sums of groups alone.

    The row holds σ = s·√(m − t), against the server with t members (`privacy.accounting.leverage`). Every
    release has the m and t of its own run's terms: a ledger outlives runs.
    """
    group = json.loads(row.mechanism or "{}") if row.channel == "adapter" else {}
    if adversary not in _BEYOND_THE_CLAIM or "minimum_contributors" not in group:
        # Against fewer than the claim is made for, a little more is left; the claim's ε bounds that too.
        return 1.0
    least, colluders = int(group["minimum_contributors"]), int(group["colluders"])
    return 1.0 / effective_noise_multiplier(1.0, least, colluders)


def statement(inputs: models.StatementInputs) -> PrivacyStatement:
    """Make the privacy statement of a run; from an altered ledger or without a sound ε there is none."""
    clients = tuple(_client(client, inputs) for client in inputs.clients)
    modes = {c.protection for client in clients for c in client.channels if c.protection is not None}
    return PrivacyStatement(
        run_id=inputs.run_id,
        created=inputs.created,
        roster_sha256=inputs.roster_sha256,
        transport=inputs.transport,
        encryption=inputs.encryption,
        no_guarantee=any(client.test_noise for client in clients),
        clients=clients,
        coalition_rows=inputs.coalition_rows,
        assumptions=assumptions(
            (client.unit for client in clients),
            any("encrypted" in mode for mode in modes),
            # Releases of an earlier run stay in the ledger, and so does what their noise rests on.
            "distributed-dp" in modes
            or any(noise_left(row, "colluding_recipients") < 1.0 for c in inputs.clients for row in c.ledger),
        ),
        leaks=leaks(inputs, bool(modes & {"none", "encrypted"}), "distributed-dp" in modes),
    )


def _client(inputs: models.ClientInputs, run: models.StatementInputs) -> ClientStatement:
    ledger.check_chain(inputs.ledger)
    parameters = parameters_of(inputs.ledger)
    if inputs.client_id:
        parameters = replace(parameters, client_id=inputs.client_id)
    channels, warnings = _channels(inputs)
    client = _Client(parameters, inputs, run, channels)
    spent = client.bound(client.charges(parameters.budgeted_channels)).epsilon
    target = parameters.target_epsilon
    joint = _channel("joint", channels, inputs.ledger, client)
    return ClientStatement(
        client_id=parameters.client_id,
        delta=parameters.delta,
        unit=parameters.unit,
        neighbouring_relation=ledger.NEIGHBOURING_RELATION,
        target_epsilon=target,
        budgeted_channels=parameters.budgeted_channels,
        spent_epsilon=spent,
        remaining_epsilon=None if target is None else max(0.0, target - spent),
        refusals=sum(row.kind == "REFUSED" for row in inputs.ledger),
        test_noise=any(channel.test_noise for channel in channels),
        channels=(*(_channel(each.name, (each,), each.rows, client) for each in channels), joint),
        guarantees=tuple(_guarantees(client)),
        warnings=tuple(warnings),
    )


def _channels(inputs: models.ClientInputs) -> tuple[tuple[_Channel, ...], list[str]]:
    configured: dict[Channel, models.Protection | None] = {
        "profile": "dp",
        "adapter": inputs.adapter_protection,
        "family": inputs.family_protection,
    }
    found, warnings = [], []
    for name, mode in configured.items():
        rows = tuple(row for row in inputs.ledger if row.channel == name)
        reserved = [row for row in rows if row.kind == "RESERVED"]
        if mode is None and not reserved:
            continue
        actual = _actual_protection(mode, reserved)
        if actual != mode:
            warnings.append(
                f"{CHANNEL_NAMES[name]}: configured as {mode or 'not sent'!r}, but the ledger shows "
                f"releases that were protected by {actual!r} only; the latter is reported"
            )
        found.append(_Channel(name, actual, rows, any(row.secure_noise is False for row in reserved)))
    return tuple(found), warnings


def _actual_protection(
    configured: models.Protection | None, reserved: Sequence[LedgerRow]
) -> models.Protection:
    covers = {row.covered_by for row in reserved}
    if configured is None:
        configured = "dp"
    private = configured in models.PRIVATE and covers <= {"dp"}
    encrypted = "encrypted" in configured and "nothing" not in covers
    encrypted |= not private and covers == {"cryptography"} and configured == "dp"
    if private:
        return configured if configured == "distributed-dp" else "dp+encrypted" if encrypted else "dp"
    return "encrypted" if encrypted else "none"


def _channel(
    name: models.StatementChannel, channels: Sequence[_Channel], rows: Sequence[LedgerRow], client: _Client
) -> models.ChannelStatement:
    """What was released on one channel, or jointly on several; `rows` are the ledger's about them."""
    charged = client.charges([channel.name for channel in channels])
    private = all(channel.protection in models.PRIVATE for channel in channels)
    test_noise = any(channel.test_noise for channel in channels)
    bound = client.bound(charged, private=private)
    events = compositions(charged)
    kinds = [row.kind for row in rows]
    released = {row.reference for row in rows if row.kind == "RELEASED"}
    lost = sum(row.kind == "RESERVED" and row.sequence not in released for row in rows)
    return models.ChannelStatement(
        channel=name,
        protection=None if name == "joint" else channels[0].protection,
        epsilon=math.inf if test_noise else bound.epsilon,
        nominal_epsilon=bound.epsilon,
        accountant=bound.accountant,
        accountants=_accountants(events, client.parameters.delta, bound),
        attack=_attack(events, client.parameters.delta, private and not test_noise),
        mechanisms=_mechanisms(rows),
        parallel_composition=len(events) > 1,
        reservations_never_released=lost,
        resends=kinds.count("RESENT"),
        refusals=kinds.count("REFUSED"),
        clipped_share=None if name == "joint" else client.inputs.clipped_share.get(name),
        planned=None if name == "joint" else client.inputs.planned.get(name),
    )


def _accountants(
    events: Sequence[tuple[GaussianEvent, ...]], delta: float, bound: EpsilonBound
) -> models.AccountantFigures | None:
    if not math.isfinite(bound.epsilon):
        return None
    if any(epsilon_bound(each, delta).accountant == "rdp" for each in events):
        return models.AccountantFigures(
            rdp=max(accounting.epsilon(each, delta, "rdp") for each in events),
            note="PRV and PLD cannot be evaluated at this ε or δ; RDP is an upper bound by itself",
        )
    checks = [cross_checked_epsilon(each, delta) for each in events]
    figures = {name: max(getattr(check, name) for check in checks) for name in ("prv", "rdp", "pld")}
    return models.AccountantFigures(**figures)


def _attack(events: Sequence[tuple[GaussianEvent, ...]], delta: float, private: bool) -> AttackBounds:
    if not private:
        return UNBOUNDED
    found = [dict(attack_bounds(each, delta)) for each in events]
    return AttackBounds(**{name: max(each[name] for each in found) for name in AttackBounds.model_fields})


def _mechanisms(rows: Iterable[LedgerRow]) -> tuple[models.Mechanism, ...]:
    groups: dict[tuple[float, float, float | None, int | None], list[GaussianEvent]] = {}
    for row in rows:
        if row.kind == "RESERVED":
            event = row.event()
            key = (event.noise_multiplier, event.sampling_rate, row.clipping_norm, row.dimensions)
            groups.setdefault(key, []).append(event)
    names = "noise_multiplier", "sampling_rate", "clipping_norm", "dimensions"
    return tuple(
        models.Mechanism(
            **dict(zip(names, key, strict=True)),
            steps=sum(each.steps for each in events),
            releases=len(events),
        )
        for key, events in groups.items()
    )


def _guarantees(client: _Client) -> Iterable[Guarantee]:
    for adversary in models.ADVERSARIES:
        found = [_single(channel, adversary, client) for channel in client.channels]
        yield from found
        yield _together(found, adversary, client)


def _single(channel: _Channel, adversary: Adversary, client: _Client) -> Guarantee:
    cover, words = coverage(channel.name, channel.protection, adversary, client.run)
    noisy = any(row.kind == "RESERVED" and row.covered_by == "dp" for row in channel.rows)
    if noisy and cover == "cryptography_only" and adversary in SERVERS:
        # The ledger does not tell whether another run encrypted what it had made private.
        cover, words = "mixed", f"{words}, but for releases under differential privacy, of which ε is"
    void = channel.test_noise and cover in _WITH_NOISE
    if void:
        # What is left once noise that can be taken off again is left out.
        cover = "cryptography_only" if cover == "dp_and_cryptography" else "nothing"
    private = (channel.name,) if cover in _WITH_NOISE else ()
    only = (channel.name,) if cover == "mixed" else ()
    return _guarantee(client, channel.name, adversary, cover, private, only, void, words)


def _together(found: Sequence[Guarantee], adversary: Adversary, client: _Client) -> Guarantee:
    covers = {guarantee.cover for guarantee in found}
    private = tuple(g.channel for g in found if g.cover in _WITH_NOISE)
    only = tuple(g.channel for g in found if g.cover in ("cryptography_only", "mixed"))
    cover: models.Cover
    if "nothing" in covers:
        bare = [CHANNEL_NAMES[g.channel] for g in found if g.cover == "nothing"]
        cover, words = "nothing", f"nothing but trust protects: {', '.join(bare)}"
    elif covers == {"nothing_sent"}:
        cover, words = "nothing_sent", "nothing is sent where this adversary could look"
    elif not private:
        cover, words = "cryptography_only", "cryptography only, so ε does not apply"
    elif only:
        named = ", ".join(CHANNEL_NAMES[name] for name in only)
        words = f"ε is of the differentially private channels; cryptography only covers: {named}"
        cover = "mixed"
    else:
        cover, words = ("dp" if "dp" in covers else "dp_and_cryptography"), "composed over all channels"
    void = any(g.test_noise for g in found)
    return _guarantee(client, "joint", adversary, cover, private, only, void, words)


def _guarantee(
    client: _Client,
    channel: models.StatementChannel,
    adversary: Adversary,
    cover: models.Cover,
    private: Sequence[models.StatementChannel],
    cryptography_only: tuple[models.StatementChannel, ...],
    test_noise: bool,
    words: str,
) -> Guarantee:
    parameters = client.parameters
    applies = bool(private) and cover != "nothing"
    stated = applies or cover == "nothing"
    # Of a mixed channel, ε is of what has noise; encryption covers the rest.
    everything = client.charges(private, adversary)
    charged = [each for each in everything if each.event.is_private or cover != "mixed"]
    bound = client.bound(charged, private=applies)
    name = f"{parameters.client_id}, {CHANNEL_NAMES[channel]}, against {ADVERSARY_NAMES[adversary]}"
    return Guarantee(
        channel=channel,
        adversary=adversary,
        cover=cover,
        epsilon=bound.epsilon if stated else None,
        delta=parameters.delta,
        unit=parameters.unit,
        neighbouring_relation=ledger.NEIGHBOURING_RELATION,
        accountant=bound.accountant,
        cryptography_only=cryptography_only,
        attack=_attack(compositions(charged), parameters.delta, applies) if stated else None,
        persons=_persons(charged, parameters) if bound.epsilon <= _TELLING else (),
        test_noise=test_noise,
        words=f"{name}: {words}" + (f"; {_NO_GUARANTEE}" if test_noise else ""),
    )


def _persons(charged: Sequence[Charge], parameters: LedgerParameters) -> tuple[models.PersonFigure, ...]:
    if parameters.unit == "person":
        return ()
    # One person's examples may lie in several data epochs, so these do not compose in parallel here.
    events = [charge.event for charge in charged]
    return tuple(
        models.PersonFigure(examples=count, epsilon=person_epsilon(events, parameters.delta, count))
        for count in models.PERSON_EXAMPLES
    )
