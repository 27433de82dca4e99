"""Streams: every example arrives once, in the order of the tasks, and replay favours what was seen least."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.scenario.streams import InOrder, Stream, arrivals
from fedmosaic.protos.errors import ConfigurationError


def _task(name: str, count: int) -> list[Example]:
    return [Example(f"{name}-{i}", "p", "a") for i in range(count)]


def _stream(arriving: tuple[int, ...], batches: int, batch_size: int, seed: int) -> Stream:
    slices = tuple(tuple(_task(str(number), count)) for number, count in enumerate(arriving))
    return Stream(slices, batches, batch_size, seed)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["static", "dynamic"]),
)
def test_every_example_arrives_exactly_once(sizes: list[int], rounds: int, order: str) -> None:
    tasks = [_task(str(k), size) for k, size in enumerate(sizes)]
    if not sum(sizes):
        with pytest.raises(ConfigurationError):
            arrivals(tasks, rounds, order, 0)  # type: ignore[arg-type]  # drawn from its two values
        return
    slices = arrivals(tasks, rounds, order, 0)  # type: ignore[arg-type]  # drawn from its two values
    assert len(slices) == rounds
    arrived = [example.id for part in slices for example in part]
    assert sorted(arrived) == sorted(e.id for task in tasks for e in task)


def test_dynamic_tasks_come_one_after_the_other() -> None:
    slices = arrivals([_task("a", 8), _task("b", 8)], 4, "dynamic", 3)
    assert [{e.id[0] for e in part} for part in slices] == [{"a"}, {"a"}, {"b"}, {"b"}]


def test_a_round_may_span_two_tasks() -> None:
    slices = arrivals([_task("a", 12), _task("b", 12)], 3, "dynamic", 0)
    assert [Counter(e.id[0] for e in part) for part in slices] == [{"a": 8}, {"a": 4, "b": 4}, {"b": 8}]


def test_static_rounds_mix_all_tasks() -> None:
    slices = arrivals([_task("a", 100), _task("b", 100)], 4, "static", 0)
    for part in slices:
        assert len(part) == 50
        assert 10 < sum(e.id[0] == "a" for e in part) < 40


def test_replay_draws_evenly_from_what_has_arrived_and_never_from_the_future() -> None:
    replay = _stream((6, 6), batches=12, batch_size=2, seed=1)
    first, second = replay.drawn(1), replay.drawn(2)
    assert len(first) == len(second) == 24
    assert max(first) < 6
    # What arrived in the second round was drawn least, so it is drawn first.
    counts = Counter(second)
    assert sum(counts[i] for i in range(6, 12)) > sum(counts[i] for i in range(6))
    assert replay.drawn(2) == second


def test_replay_of_one_example_fills_its_batches() -> None:
    assert _stream((1,), batches=2, batch_size=3, seed=0).drawn(1) == [0] * 6


def test_replay_before_anything_arrived_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="arrived"):
        _stream((0, 3), batches=1, batch_size=1, seed=0).drawn(1)


def test_an_idle_round_replays_the_memory() -> None:
    drawn = _stream((3, 0), batches=6, batch_size=1, seed=0).drawn(2)
    assert len(drawn) == 6
    assert set(drawn) <= {0, 1, 2}


def test_in_order_walks_as_it_stands() -> None:
    order = InOrder(3, 7, 2)
    assert order.take(2) == [0, 1]
    assert order.take(2) == [2, 0]
    assert order.state_dict() == {"size": 3, "seed": 7, "epoch": 2, "position": 4}
