"""The database: what is written is read back, in SQLite and, where one is given, PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Enrolment, KeyMessage, Profile, SectionHeader, UploadHeader
from fedmosaic.server.storage.store import Arrival, Store, StoredAggregate, default_url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    made = Store(store_url, durable=True)
    yield made
    made.close()


def header(number: int, profile: Profile | None = None) -> UploadHeader:
    sections = (SectionHeader("shared", 5, bytes(range(32))), SectionHeader("family", 7, bytes(32)))
    return UploadHeader(number, "attempt", 3, sections, profile, bytes(64))


def profile(value: float) -> Profile:
    return Profile(np.array([value, 1.0], dtype=np.float32), 0.25, 2)


def test_uploads_and_profiles(store: Store, store_url: str) -> None:
    store.add_uploads([Arrival("a", header(1, profile(1.5)), b"h" * 32, 10.0, 100)])
    store.add_uploads([Arrival("b", header(1, None), b"i" * 32, 11.0, 50)])
    store.add_uploads([Arrival("a", header(2, None), b"j" * 32, 12.0, 1)])
    store.close()
    again = Store(store_url, durable=True)
    assert set(again.uploads(1)) == {"a", "b"}
    stored = again.uploads(1)["a"]
    assert stored.sections == header(1).sections
    assert (stored.content_hash, stored.key_epoch) == (b"h" * 32, 3)
    assert again.content_hash(1, "b") == b"i" * 32
    assert again.content_hash(3, "a") is None
    assert again.profiles() == {"a": profile(1.5)}
    assert again.traffic(["a", "b", "c"])["a"] == {"received": 101, "sent": 0}
    again.close()


def test_the_newest_profile_wins(store: Store) -> None:
    for number in (1, 3, 2):
        store.add_uploads([Arrival("a", header(number, profile(number)), b"h" * 32, 1.0, 0)])
    assert store.profiles()["a"].vector[0] == 3.0


def test_a_second_upload_of_a_round_cannot_slip_in(store: Store) -> None:
    store.add_uploads([Arrival("a", header(1, profile(1.0)), b"h" * 32, 1.0, 5)])
    with pytest.raises(StateError, match=r"(?i)unique"):
        store.add_uploads([Arrival("a", header(1, profile(2.0)), b"i" * 32, 1.0, 5)])
    assert store.content_hash(1, "a") == b"h" * 32
    assert store.traffic(["a"])["a"]["received"] == 5


def test_closing_a_round_is_all_or_nothing(store: Store) -> None:
    aggregate = StoredAggregate(2, "[]", bytes(32))
    store.close_round(1, {"round": 1}, {"a": aggregate}, {"round": "2"})
    assert store.aggregates(2) == {"a": aggregate}
    with pytest.raises(StateError, match=r"(?i)unique"):
        store.close_round(1, {"round": 1}, {"b": aggregate}, {"round": "9"})
    assert store.get("round") == "2"
    assert store.aggregates(2) == {"a": aggregate}
    store.close_round(2, {"round": 2}, {}, {"round": "3"})
    assert store.aggregates(2) == {}
    assert store.results() == [{"round": 1}, {"round": 2}]
    assert store.results(after=1) == [{"round": 2}]


def test_key_messages_are_read_by_whom_they_are_for(store: Store) -> None:
    store.add_key_message("a", KeyMessage(1, "opening", "", b"open"), {"key_board": "1"})
    store.add_key_message("a", KeyMessage(1, "box", "b", b"for b"), {})
    store.add_key_message("a", KeyMessage(1, "box", "c", b"for c"), {})
    assert store.key_messages(1, "opening", "z") == {"a": b"open"}
    assert store.key_messages(1, "box", "b") == {"a": b"for b"}
    assert store.key_messages(1, "box", "d") == {}
    assert store.key_message("a", KeyMessage(1, "box", "c", b"")) == b"for c"
    store.replace_key_epoch(2, {"key_board": "2"})
    assert store.key_messages(1, "opening", "b") == {}
    assert store.get("key_board") == "2"


def test_enrolment_reports_and_traffic(store: Store) -> None:
    enrolment = Enrolment(1, "fed", bytes(32), bytes(32), "", "x")
    store.enrol("a", enrolment, 1.0)
    store.enrol("a", enrolment, 2.0)
    assert store.enrolled() == {"a"}
    store.add_report("a", b"{}", 1.0)
    store.add_report("a", b'{"later": 1}', 2.0)
    assert store.reports() == {"a": b'{"later": 1}'}
    store.add_traffic({"a": (3, 4)})
    store.add_traffic({"a": (1 << 40, 1)})
    assert store.traffic(["a"]) == {"a": {"received": (1 << 40) + 3, "sent": 5}}


def test_sqlite_waits_for_the_disk(tmp_path: Path) -> None:
    store = Store(default_url(tmp_path), durable=True)
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    store.close()


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    store = Store(default_url(tmp_path), durable=False)
    store.put({"schema": "99"})
    store.close()
    with pytest.raises(StateError, match="schema 99"):
        Store(default_url(tmp_path), durable=False)


def test_a_damaged_or_unreachable_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "server.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StateError, match="cannot be opened"):
        Store(default_url(tmp_path), durable=False)
    with pytest.raises(StateError, match="check store_url"):
        Store("sqlite:////nonexistent/folder/x.db", durable=False)


def test_a_name_in_the_file_that_is_no_text_is_damage_as_any_other(tmp_path: Path) -> None:
    """SQLite names it in its message, which Python cannot decode then."""
    Store(default_url(tmp_path), durable=True).close()
    path = tmp_path / "server.db"
    content = path.read_bytes()
    assert b"sqlite_autoindex" in content
    path.write_bytes(content.replace(b"sqlite_autoindex", b"sqlite_aut\xff\xffndex"))
    with pytest.raises(StateError, match="database"):
        Store(default_url(tmp_path), durable=True)
