"""Messages hold their own bounds: what breaks one is refused with the field's name."""

from collections.abc import Callable

import numpy as np
import pytest

from fedmosaic.protos import bounds, messages
from fedmosaic.protos.errors import WireError

HASH = bytes(range(32))
ROW = messages.WeightRow(("a", "b", "c"), (2, 3, 3), 3)


def profile(values: object = (1.0, 2.0), variance: float = 0.5, releases: int = 1) -> messages.Profile:
    return messages.Profile(np.array(values, dtype=np.float32), variance, releases)


def header(**changes: object) -> messages.UploadHeader:
    values = {
        "round": 1,
        "attempt_id": "a-1",
        "key_epoch": 0,
        "sections": (messages.SectionHeader("shared", 10, HASH),),
        "profile": None,
        "signature": bytes(64),
    }
    return messages.UploadHeader(**(values | changes))  # type: ignore[arg-type]  # deliberately wrong values


BROKEN: list[tuple[str, Callable[[], object]]] = [
    ("roster_hash", lambda: messages.Enrolment(1, "fed", b"short", HASH, "", "x")),
    ("federation", lambda: messages.Enrolment(1, "Fed!", HASH, HASH, "", "x")),
    ("software", lambda: messages.Enrolment(1, "fed", HASH, HASH, "", "two\nlines")),
    ("family", lambda: messages.Enrolment(1, "fed", HASH, HASH, "../x\x00", "x")),
    ("protocol_version", lambda: messages.Enrolment(-1, "fed", HASH, HASH, "", "x")),
    ("run_id", lambda: messages.Enrolled("../../etc", 1, 3, 0, ("a",))),
    ("round", lambda: messages.Enrolled("0" * 32, 5, 3, 0, ("a",))),
    ("members", lambda: messages.Enrolled("0" * 32, 1, 3, 0, ("a", "a"))),
    ("vector", lambda: messages.Profile(np.zeros(3, dtype=np.float64), 0.0, 1)),
    ("vector", lambda: messages.Profile(np.zeros((2, 2), dtype=np.float32), 0.0, 1)),
    ("vector", lambda: profile(())),
    ("vector", lambda: profile([0.0] * (bounds.MAX_PROFILE_DIMENSIONS + 1))),
    ("vector", lambda: profile((1.0, np.nan))),
    ("vector", lambda: profile((1.0, np.inf))),
    ("noise_variance", lambda: profile(variance=-1.0)),
    ("noise_variance", lambda: profile(variance=float("nan"))),
    ("releases", lambda: profile(releases=0)),
    ("name", lambda: messages.SectionHeader("private", 1, HASH)),  # type: ignore[arg-type]
    ("size", lambda: messages.SectionHeader("shared", 0, HASH)),
    ("sha256", lambda: messages.SectionHeader("shared", 1, b"")),
    ("round", lambda: header(round=0)),
    ("round", lambda: header(round=True)),
    ("attempt_id", lambda: header(attempt_id="../x")),
    ("attempt_id", lambda: header(attempt_id="x" * 65)),
    ("sections", lambda: header(sections=(messages.SectionHeader("shared", 1, HASH),) * 2)),
    ("signature", lambda: header(signature=bytes(63))),
    ("weights", lambda: messages.WeightRow(("a", "b"), (1, 1), 3)),
    ("weights", lambda: messages.WeightRow(("a", "b"), (9, -1), 3)),
    ("contributors", lambda: messages.WeightRow(("a", "a"), (4, 4), 3)),
    ("2 contributors", lambda: messages.WeightRow(("a", "b"), (8,), 3)),
    ("contributors", lambda: messages.WeightRow(("a\nb",), (8,), 3)),
    ("weights sum to 0", lambda: messages.WeightRow((), (), 3)),
    ("bits", lambda: messages.WeightRow(("a",), (1,), 0)),
    ("bits", lambda: messages.WeightRow(("a",), (1 << 31,), 31)),
    ("neither", lambda: messages.AggregateSection("shared", None, b"", "")),
    ("row and a refusal", lambda: messages.AggregateSection("shared", ROW, b"x", "because")),
    ("payload", lambda: messages.AggregateSection("shared", None, b"x", "because")),
    ("sections", lambda: messages.Aggregate(2, (messages.AggregateSection("shared", ROW, b"x"),) * 2, 0, 0)),
    ("seconds_left", lambda: messages.RoundStatus(1, messages.Phase.OPEN, (), (), float("nan"), "")),
    ("message", lambda: messages.RoundStatus(1, messages.Phase.OPEN, (), (), 0.0, "two\nlines")),
    ("stage", lambda: messages.KeyMessage(1, "Stage", "", b"x")),
    ("recipient", lambda: messages.KeyMessage(1, "box", "A B", b"x")),
    ("payload", lambda: messages.KeyMessage(1, "box", "a", bytes(bounds.MAX_KEY_PAYLOAD_BYTES + 1))),
    ("payload", lambda: messages.KeyMessage(1, "sum-vector", "a", bytes(bounds.MAX_CHUNK_BYTES + 1))),
    ("epoch", lambda: messages.KeyMessage(-1, "box", "a", b"x")),
]


@pytest.mark.parametrize(("field", "make"), BROKEN, ids=[f"{i}-{f}" for i, (f, _) in enumerate(BROKEN)])
def test_a_broken_bound_is_refused_with_the_name_of_the_field(field: str, make: Callable[[], object]) -> None:
    with pytest.raises(WireError, match=field):
        make()


def test_a_refused_value_is_shortened_and_a_refused_payload_is_not_shown() -> None:
    with pytest.raises(WireError) as error:
        messages.Enrolment(1, "X\n" * 10_000, HASH, HASH, "", "x")
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    with pytest.raises(WireError, match=r"KeyMessage\.payload is 70000 bytes: ") as error:
        messages.KeyMessage(1, "box", "a", b"secret " * 10_000)
    assert "secret" not in str(error.value)


def test_a_profile_cannot_be_changed_after_its_checks() -> None:
    source = np.ones(4, dtype=np.float32)
    made = messages.Profile(source, 0.0, 1)
    source[0] = np.nan
    assert np.isfinite(made.vector).all()
    with pytest.raises(ValueError, match="read-only"):
        made.vector[0] = 0.0


def test_profiles_are_equal_when_their_content_is() -> None:
    assert profile() == profile()
    assert hash(profile()) == hash(profile())
    for other in (profile((1.0, 2.5)), profile(variance=0.25), profile(releases=2)):
        assert profile() != other


def test_a_section_announces_its_size_and_hash_but_does_not_print_its_payload() -> None:
    section = messages.Section("shared", b"secret weights")
    assert section.header().size == 14
    assert "secret" not in repr(section)


def test_an_announcement_may_be_of_any_size_so_that_the_server_can_answer_it() -> None:
    assert header(sections=(messages.SectionHeader("shared", 2 << 30, HASH),)).size == 2 << 30
