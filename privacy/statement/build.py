"""Build the privacy statement of a run from its clients' ledgers.

The ledger says what happened, in this run and in all others on the same data; where runs, or ledger and
configuration, differ, the worst is reported. A statement whose accountants contradict each other is not made:
`AccountingError`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedmosaic.privacy.accounting import epsilon as accounting
from fedmosaic.privacy.accounting.epsilon import (
    EpsilonBound,
    cross_checked_epsilon,
    epsilon_bound,
    person_epsilon,
)
from fedmosaic.privacy.accounting.events import AttackBounds, GaussianEvent
from fedmosaic.privacy.accounting.tradeoff import UNBOUNDED, attack_bounds
from fedmosaic.privacy.ledger import rows as ledger
from fedmosaic.privacy.ledger.rows import Charge, LedgerRow, compositions
from fedmosaic.privacy.ledger.rules import LedgerParameters, bound_of
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import Adversary, ClientStatement, Guarantee, PrivacyStatement
from fedmosaic.privacy.statement.parts import ChannelParts, Part, channels_of, charged_to, parameters_in
from fedmosaic.privacy.statement.words import (
    ADVERSARY_NAMES,
    CHANNEL_NAMES,
    assumptions,
    coverage,
    leaks,
)

_WITH_NOISE: frozenset[models.Cover] = frozenset({"dp", "dp_and_cryptography", "mixed"})
"""Covers that an ε is stated for."""
_NOT_ALL_NOISE: frozenset[models.Cover] = frozenset({"mixed", "cryptography_only"})
_Covers = Mapping[models.StatementChannel, models.Cover]
_TELLING = 20.0
"""Largest ε of one example beside which that of several is worth its minutes."""
_NO_GUARANTEE = "no guarantee: the noise came from a seeded test generator"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What protects one part against one adversary; `void` if its noise was claimed and is a test's."""

    part: Part
    cover: models.Cover
    words: str
    void: bool


@dataclass(frozen=True, slots=True)
class _Client:
    """What is needed again and again while one client's part is made."""

    parameters: LedgerParameters
    inputs: models.ClientInputs
    run: models.StatementInputs
    channels: tuple[ChannelParts, ...]

    def bound(self, charged: Sequence[Charge], *, private: bool = True) -> EpsilonBound:
        """ε of what was charged; ∞ where something besides is not private."""
        if not private:
            return EpsilonBound(math.inf, self.parameters.accountant)
        return bound_of(charged, self.parameters.delta, self.parameters.accountant)


def statement(inputs: models.StatementInputs) -> PrivacyStatement:
    """Make the privacy statement of a run; from an altered ledger or without a sound ε there is none."""
    made = [_client(client, inputs) for client in inputs.clients]
    parts = [part for _, channels in made for channel in channels for part in channel.parts]
    modes = {part.protection for part in parts}
    own = {part.protection for part in parts if part.run != "others"}
    others = {part.protection for part in parts if part.run == "others"}
    clients = tuple(client for client, _ in made)
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
            "distributed-dp" in modes,
        ),
        leaks=leaks(inputs, own, others),
    )


def _client(
    inputs: models.ClientInputs, run: models.StatementInputs
) -> tuple[ClientStatement, tuple[ChannelParts, ...]]:
    ledger.check_chain(inputs.ledger)
    parameters = parameters_in(inputs)
    channels, warnings = channels_of(inputs, run.run_id)
    client = _Client(parameters, inputs, run, channels)
    bounded = [row for row in inputs.ledger if row.channel in parameters.budgeted_channels]
    spent = client.bound(charged_to(bounded)).epsilon
    target = parameters.target_epsilon
    made = ClientStatement(
        client_id=parameters.client_id,
        delta=parameters.delta,
        unit=parameters.unit,
        neighbouring_relation=ledger.NEIGHBOURING_RELATION,
        target_epsilon=target,
        budgeted_channels=parameters.budgeted_channels,
        spent_epsilon=spent,
        remaining_epsilon=None if target is None else max(0.0, target - spent),
        refusals=sum(row.kind == "REFUSED" for row in inputs.ledger),
        test_noise=any(part.test_noise for channel in channels for part in channel.parts),
        channels=(
            *(_channel(each.name, (each,), each.rows, client) for each in channels),
            _channel("joint", channels, inputs.ledger, client),
        ),
        guarantees=tuple(_guarantees(client)),
        warnings=tuple(warnings),
    )
    return made, channels


def _channel(
    name: models.StatementChannel,
    channels: Sequence[ChannelParts],
    rows: Sequence[LedgerRow],
    client: _Client,
) -> models.ChannelStatement:
    """What was released on one channel, or jointly on several; `rows` are the ledger's about them."""
    parts = [part for channel in channels for part in channel.parts]
    charged = charged_to(row for part in parts for row in part.rows)
    private = all(part.protection in models.PRIVATE for part in parts)
    test_noise = any(part.test_noise for part in parts)
    bound = client.bound(charged, private=private)
    events = compositions(charged)
    kinds = [row.kind for row in rows]
    released = {row.reference for row in rows if row.kind == "RELEASED"}
    lost = sum(row.kind == "RESERVED" and row.sequence not in released for row in rows)
    return models.ChannelStatement(
        channel=name,
        protection=None
        if name == "joint"
        else min((p.protection for p in parts), key=models.WEAKEST_FIRST.index),
        protected=()
        if name == "joint"
        else tuple(models.Protected(protection=p.protection, run=p.run, releases=len(p.rows)) for p in parts),
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


def _guarantees(client: _Client) -> Iterator[Guarantee]:
    elsewhere = client.run
    if any(part.run == "others" for channel in client.channels for part in channel.parts):
        elsewhere = elsewhere.model_copy(update={"transport": "mutual_tls"})
    for adversary in models.ADVERSARIES:
        seen = {
            channel.name: tuple(
                _seen(part, adversary, client.run if part.run == "this" else elsewhere)
                for part in channel.parts
            )
            for channel in client.channels
        }
        for name, parts in seen.items():
            yield _guarantee(client, name, adversary, parts, "; ".join(part.words for part in parts))
        covers: _Covers = {name: _together(part.cover for part in parts) for name, parts in seen.items()}
        everything = [part for parts in seen.values() for part in parts]
        yield _guarantee(client, "joint", adversary, everything, _joint_words(covers), covers)


def _seen(part: Part, adversary: Adversary, run: models.StatementInputs) -> _Seen:
    """What protects one part against one adversary."""
    cover, words = coverage(part.channel, part.protection, adversary, run)
    void = part.test_noise and cover in _WITH_NOISE
    if void:
        # What is left once noise that can be taken off again is left out.
        cover = "cryptography_only" if cover == "dp_and_cryptography" else "nothing"
    return _Seen(part, cover, f"{part.whose}: {words}" if part.run == "others" else words, void)


def _together(found: Iterable[models.Cover]) -> models.Cover:
    """What releases rest on together, of which the adversary has all."""
    covers = set(found)
    if "nothing" in covers or covers == {"nothing_sent"}:
        return "nothing" if "nothing" in covers else "nothing_sent"
    if not covers & _WITH_NOISE:
        return "cryptography_only"
    if covers & {"cryptography_only", "mixed"}:
        return "mixed"
    return "dp" if "dp" in covers else "dp_and_cryptography"


def _joint_words(covers: _Covers) -> str:
    match _together(covers.values()):
        case "nothing":
            bare = [CHANNEL_NAMES[name] for name, cover in covers.items() if cover == "nothing"]
            return f"nothing but trust protects: {', '.join(bare)}"
        case "nothing_sent":
            return "nothing is sent where this adversary could look"
        case "cryptography_only":
            return "cryptography only, so ε does not apply"
        case "mixed":
            only = [CHANNEL_NAMES[name] for name, cover in covers.items() if cover in _NOT_ALL_NOISE]
            covered = f"cryptography alone covers others, of: {', '.join(only)}"
            return f"ε is of the differentially private releases; {covered}"
    return "composed over all channels"


def _guarantee(
    client: _Client,
    channel: models.StatementChannel,
    adversary: Adversary,
    seen: Sequence[_Seen],
    words: str,
    covers: _Covers | None = None,
) -> Guarantee:
    """What holds of these parts together; `covers` are those of the channels, for all of them."""
    parameters, cover = client.parameters, _together(each.cover for each in seen)
    test_noise = any(each.void for each in seen)
    noisy = [row for each in seen if each.cover in _WITH_NOISE for row in each.part.rows]
    applies = cover in _WITH_NOISE
    stated = applies or cover == "nothing"
    charged = charged_to(noisy, adversary)
    bound = client.bound(charged, private=applies)
    only = [name for name, each in (covers or {channel: cover}).items() if each in _NOT_ALL_NOISE]
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
        cryptography_only=tuple(only) if covers or cover == "mixed" else (),
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
