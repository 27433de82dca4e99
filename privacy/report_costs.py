"""What a statement's releases would have cost: the noise for another ε, and a version to hand on."""

import math
from collections.abc import Callable, Sequence, Set
from typing import Any, TypeVar

from pydantic import BaseModel

from fedmosaic.privacy.accounting import epsilon
from fedmosaic.privacy.events import GaussianEvent
from fedmosaic.privacy.planning import noise_factor_for, noise_multiplier_for
from fedmosaic.privacy.report_models import (
    AccountantFigures,
    AttackFigures,
    ChannelCost,
    ChannelStatement,
    ClientStatement,
    Mechanism,
    PlannedChannel,
    PrivacyStatement,
    StatementChannel,
)
from fedmosaic.privacy.report_words import CHANNEL_NAMES
from fedmosaic.protos.errors import AccountingError

Model = TypeVar("Model", bound=BaseModel)


def costs_at_epsilon(statement: PrivacyStatement, target_epsilon: float) -> tuple[ChannelCost, ...]:
    """The σ with which each client's releases, on the same schedule, would have met a target ε.

    Parallel composition is not used: the figures are for releases that may concern every example.

    Args:
        statement: as `statement` made it, or read back from JSON.
        target_epsilon: ε asked for, in (0, 100], against a reader of the plaintext.

    Returns:
        One answer per client and channel, and one for all its channels together, in which the profile
        keeps its noise if it can and the other channels share one σ per mechanism.

    Raises:
        AccountingError: the target is outside its domain.
    """
    if not 0.0 < target_epsilon <= 100.0:
        raise AccountingError(f"target ε is {target_epsilon}; it must be in (0, 100]")
    return tuple(
        cost
        for client in statement.clients
        for cost in (
            *(_channel_cost(channel, client, target_epsilon) for channel in client.channels[:-1]),
            _joint_cost(client, target_epsilon),
        )
    )


def _channel_cost(channel: ChannelStatement, client: ClientStatement, target: float) -> ChannelCost:
    events, protected = _schedule(channel)
    if not events:
        return _answer(
            channel, client, target, (), None, "nothing was released, or its schedule is not known"
        )
    current = tuple(event.noise_multiplier if protected else 0.0 for event in events)
    try:
        if protected:
            factor = noise_factor_for(target, client.delta, [], events)
            needed = tuple(event.noise_multiplier * factor for event in events)
        else:
            (event,) = events
            needed = (noise_multiplier_for(target, client.delta, [], event.sampling_rate, event.steps),)
    except AccountingError as error:
        return _answer(channel, client, target, current, None, str(error))
    return _answer(channel, client, target, current, needed, _change(current, needed))


def _joint_cost(client: ClientStatement, target: float) -> ChannelCost:
    joint = client.channels[-1]
    parts = [(channel, *_schedule(channel)) for channel in client.channels[:-1]]
    unknown = [
        CHANNEL_NAMES[channel.channel] for channel, events, _ in parts if not events and channel.mechanisms
    ]
    if unknown:
        return _answer(joint, client, target, (), None, f"no schedule is known for: {', '.join(unknown)}")
    profile = [event for channel, events, _ in parts if channel.channel == "profile" for event in events]
    others = [event for channel, events, _ in parts if channel.channel != "profile" for event in events]
    protected = all(each for channel, events, each in parts if events)
    keep = bool(others) and epsilon(profile, client.delta) < target
    scaled = others if keep else profile + others
    if not scaled:
        return _answer(joint, client, target, (), None, "nothing was released")
    current = tuple(event.noise_multiplier if protected else 0.0 for event in scaled)
    try:
        factor = noise_factor_for(target, client.delta, profile if keep else [], scaled)
    except AccountingError as error:
        return _answer(joint, client, target, current, None, str(error))
    needed = tuple(event.noise_multiplier * factor for event in scaled)
    kept = "with the profile's noise as it was, " if keep and profile else ""
    return _answer(joint, client, target, current, needed, kept + _change(current, needed))


def _schedule(channel: ChannelStatement) -> tuple[list[GaussianEvent], bool]:
    """Events of a channel; for one without DP, those that were planned, at σ = 1 to scale from."""
    protected = all(mechanism.noise_multiplier > 0 for mechanism in channel.mechanisms)
    if protected and channel.mechanisms:
        return [GaussianEvent(m.noise_multiplier, m.sampling_rate, m.steps) for m in channel.mechanisms], True
    if channel.planned is None:
        return [], protected
    return [GaussianEvent(1.0, channel.planned.sampling_rate, channel.planned.steps)], False


def _change(current: Sequence[float], needed: Sequence[float]) -> str:
    if not all(current):
        return f"σ = {_list(needed)} where there was no noise"
    factor = needed[0] / current[0]
    direction = "more" if factor > 1 else "less"
    times = max(factor, 1 / factor)
    return f"σ = {_list(needed)} instead of {_list(current)}: {times:.2f} times {direction} noise"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _answer(
    channel: ChannelStatement,
    client: ClientStatement,
    target: float,
    current: tuple[float, ...],
    needed: tuple[float, ...] | None,
    words: str,
) -> ChannelCost:
    name: StatementChannel = channel.channel
    return ChannelCost(
        client_id=client.client_id,
        channel=name,
        target_epsilon=target,
        delta=client.delta,
        current_epsilon=channel.epsilon,
        current_noise_multipliers=current,
        needed_noise_multipliers=needed,
        words=f"{client.client_id}, {CHANNEL_NAMES[name]}, ε = {target:g}: {words}",
    )


def shareable(statement: PrivacyStatement) -> PrivacyStatement:
    """The statement without what was computed from private data without noise.

    Shares of clipped examples are removed. δ, sampling rates and every ε are rounded up, and noise
    multipliers that were planned for the client's own data are rounded down (values on that side of each
    are true as well), so that they tell the order of a client's number of examples but not the number.

    Args:
        statement: as `statement` made it.
    """
    clients = tuple(_shareable_client(client) for client in statement.clients)
    return _changed(statement, clients=clients, shareable=True)


def _shareable_client(client: ClientStatement) -> ClientStatement:
    remaining = client.remaining_epsilon
    agreed = {m for channel in client.channels if channel.channel == "profile" for m in channel.mechanisms}
    return _changed(
        client,
        delta=round_up(client.delta, 1),
        spent_epsilon=round_up(client.spent_epsilon, 2),
        remaining_epsilon=None if remaining is None else math.floor(remaining * 10) / 10,
        channels=tuple(_shareable_channel(channel, agreed) for channel in client.channels),
        guarantees=tuple(
            _changed(
                guarantee,
                delta=round_up(guarantee.delta, 1),
                epsilon=None if guarantee.epsilon is None else round_up(guarantee.epsilon, 2),
                attack=None if guarantee.attack is None else _shareable_attack(guarantee.attack),
            )
            for guarantee in client.guarantees
        ),
    )


def _shareable_channel(channel: ChannelStatement, agreed: Set[Mechanism]) -> ChannelStatement:
    figures = channel.accountants
    return _changed(
        channel,
        epsilon=round_up(channel.epsilon, 2),
        nominal_epsilon=round_up(channel.nominal_epsilon, 2),
        clipped_share=None,
        attack=_shareable_attack(channel.attack),
        accountants=None if figures is None else _rounded(figures, AccountantFigures.model_fields),
        mechanisms=tuple(_shareable_mechanism(each, each in agreed) for each in channel.mechanisms),
        planned=None if channel.planned is None else _shareable_rate(channel.planned),
    )


def _shareable_mechanism(mechanism: Mechanism, agreed: bool) -> Mechanism:
    # The profile's σ stands in the roster; the adapter's follows from ε, q and δ, and with them from n.
    noise = mechanism.noise_multiplier if agreed else round_down(mechanism.noise_multiplier, 1)
    return _shareable_rate(_changed(mechanism, noise_multiplier=noise))


RateModel = TypeVar("RateModel", Mechanism, PlannedChannel)


def _shareable_rate(model: RateModel) -> RateModel:
    return _changed(model, sampling_rate=min(1.0, round_up(model.sampling_rate, 1)))


def _shareable_attack(attack: AttackFigures) -> AttackFigures:
    rounded = _rounded(attack, AttackFigures.model_fields)
    shares = {
        name: min(1.0, getattr(rounded, name)) for name in AttackFigures.model_fields if name != "gaussian_mu"
    }
    return _changed(rounded, **shares)


def _rounded(model: Model, names: Any) -> Model:
    values = {name: getattr(model, name) for name in names}
    return _changed(
        model, **{name: round_up(value, 2) for name, value in values.items() if isinstance(value, float)}
    )


def _changed(model: Model, **values: Any) -> Model:
    return type(model).model_validate({**{n: getattr(model, n) for n in type(model).model_fields}, **values})


def round_up(value: float, digits: int) -> float:
    """The smallest number of `digits` significant decimal digits that is not below `value` (≥ 0)."""
    return _rounded_to(value, digits, math.ceil)


def round_down(value: float, digits: int) -> float:
    """The largest number of `digits` significant decimal digits that is not above `value` (≥ 0)."""
    return _rounded_to(value, digits, math.floor)


def _rounded_to(value: float, digits: int, towards: Callable[[float], int]) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    exponent = digits - 1 - math.floor(math.log10(value))
    scaled = towards(round(value * 10.0**exponent, 9))
    return float(f"{scaled}e{-exponent}")
