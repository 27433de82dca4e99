"""What a statement's releases would have cost: the noise for another ε."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedmosaic.privacy.accounting.calibrate import noise_factor_for
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import ClientStatement
from fedmosaic.privacy.statement.words import CHANNEL_NAMES
from fedmosaic.protos.errors import AccountingError


@dataclass(frozen=True)
class ChannelCost:
    """The noise with which a client's releases on a channel, or on all, would have met a target ε.

    `current` are the σ as they were, one per mechanism that changes, 0 without DP; `needed` are those that
    the same schedule needs, none when they cannot be told.
    """

    client: ClientStatement
    channel: models.ChannelStatement
    words: str
    current: tuple[float, ...] = ()
    needed: tuple[float, ...] = ()


def costs_at_epsilon(client: ClientStatement, target: float) -> list[ChannelCost]:
    """The σ with which a client's releases, on the same schedule, would have met a target ε in (0, 100].

    One answer per channel, and one for all channels together, in which the profile keeps its noise if it can
    and the other channels share one σ per mechanism. Parallel composition is not used: the figures are for
    releases that may concern every example.
    """
    if not 0.0 < target <= 100.0:
        raise AccountingError(f"target ε is {target}; it must be in (0, 100]")
    alone = [_channel_cost(channel, client, target) for channel in client.channels[:-1]]
    return [*alone, _joint_cost(client, target)]


def _channel_cost(channel: models.ChannelStatement, client: ClientStatement, target: float) -> ChannelCost:
    events, protected = _schedule(channel)
    if not events:
        return ChannelCost(client, channel, "nothing was released, or its schedule is not known")
    return _scaled(channel, client, target, [], events, protected)


def _joint_cost(client: ClientStatement, target: float) -> ChannelCost:
    joint = client.channels[-1]
    parts = [(channel, *_schedule(channel)) for channel in client.channels[:-1]]
    unknown = [CHANNEL_NAMES[each.channel] for each, events, _ in parts if not events and each.mechanisms]
    if unknown:
        return ChannelCost(client, joint, f"no schedule is known for: {', '.join(unknown)}")
    profile = [event for channel, events, _ in parts if channel.channel == "profile" for event in events]
    others = [event for channel, events, _ in parts if channel.channel != "profile" for event in events]
    protected = all(each for _, events, each in parts if events)
    if not profile + others:
        return ChannelCost(client, joint, "nothing was released")
    if others and epsilon(profile, client.delta) < target:
        return _scaled(joint, client, target, profile, others, protected)
    return _scaled(joint, client, target, [], profile + others, protected)


def _schedule(channel: models.ChannelStatement) -> tuple[list[GaussianEvent], bool]:
    """Events of a channel; for one without DP, those that were planned, at σ = 1 to scale from."""
    protected = all(mechanism.noise_multiplier > 0 for mechanism in channel.mechanisms)
    if protected and channel.mechanisms:
        return [GaussianEvent(m.noise_multiplier, m.sampling_rate, m.steps) for m in channel.mechanisms], True
    if channel.planned is None:
        return [], protected
    return [GaussianEvent(1.0, channel.planned.sampling_rate, channel.planned.steps)], False


def _scaled(
    channel: models.ChannelStatement,
    client: ClientStatement,
    target: float,
    kept: Sequence[GaussianEvent],
    scaled: Sequence[GaussianEvent],
    protected: bool,
) -> ChannelCost:
    current = tuple(event.noise_multiplier if protected else 0.0 for event in scaled)
    try:
        factor = noise_factor_for(target, client.delta, kept, scaled)
    except AccountingError as error:
        return ChannelCost(client, channel, str(error), current)
    needed = tuple(event.noise_multiplier * factor for event in scaled)
    change = ("with the profile's noise as it was, " if kept else "") + f"σ = {_list(needed)} "
    times = f"{max(factor, 1 / factor):.2f} times {'more' if factor > 1 else 'less'} noise"
    change += f"instead of {_list(current)}: {times}" if protected else "where there was no noise"
    return ChannelCost(client, channel, change, current, needed)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
