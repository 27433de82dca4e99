"""What the server must not forget, in SQLite or PostgreSQL, through SQLAlchemy Core.

Rows are written after the files they name and before anybody is told: what was acknowledged is here.
Payloads are files (`blobs`); profiles, weights and key messages are small and stand in the database.
"""

import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import Enrolment, KeyMessage, Profile, SectionHeader, UploadHeader
from fedmosaic.server.storage import tables

_SCHEMA_VERSION: Final = "1"
MARK: Final = "mark"
"""File in the state folder that tells which database goes with it."""


@dataclass(frozen=True)
class StoredUpload:
    """A stored upload without its payloads and profile."""

    content_hash: bytes
    key_epoch: int
    sections: tuple[SectionHeader, ...]


@dataclass(frozen=True)
class Arrival:
    """An accepted upload: who sent it, when it was here, and how many bytes it took on the way."""

    client: str
    header: UploadHeader
    content_hash: bytes
    received_at: float
    received_bytes: int


@dataclass(frozen=True)
class StoredAggregate:
    """What a client may load, without payloads and weight rows; of uploads under `key_epoch`."""

    key_epoch: int
    sections: str
    """JSON, as `stored_aggregate` wrote it."""
    sha256: bytes
    """Of all payloads, laid end to end."""


class StoreTakenError(StateError):
    """Another server has taken the database over; this one has to stop."""


class Store:
    """The database. Every method is one transaction; the caller serialises writers."""

    def __init__(self, url: str, *, durable: bool, reading: bool = False) -> None:
        """Open or create the database; StateError if that cannot be, or it is of another version.

        Unless `durable`, SQLite answers before data is on the disk. With `reading`, another process has
        created it and writes to it, and this one cannot.
        """
        self._holder = ""
        self._taken = False
        try:
            if reading:
                self._engine = tables.reading_engine(url)
            else:
                self._engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
                if self._engine.dialect.name == "sqlite":
                    tables.prepare_sqlite(self._engine, durable=durable)
                tables.metadata.create_all(self._engine)
        except (sa.exc.SQLAlchemyError, UnicodeDecodeError, ImportError, OSError) as error:
            raise StateError(
                f"the server's database cannot be opened ({_cause(error)}); check store_url, and that the "
                "database runs"
            ) from error
        if (version := self.get("schema")) is None and not reading:
            self.put({"schema": _SCHEMA_VERSION})
        elif version not in (None, _SCHEMA_VERSION):
            raise StateError(
                f"the server's database has schema {version}, this program writes {_SCHEMA_VERSION}; finish "
                "the run with the program that began it"
            )

    def hold(self, folder: str | None) -> None:
        """Take the database for this server: whoever held it before can write nothing any more.

        `folder` is the mark of the state folder, which has the payloads that the database names; None where
        the database stands in that folder. StateError if it goes with another one.
        """
        known = self.get("folder")
        if folder is not None and known not in (None, folder):
            raise StateError(
                f"the database at store_url goes with another state_dir (its mark is {known}, this one's is "
                f"{folder}): two servers would take each other's uploads. Give this server a database of its "
                "own, or stop the other one and use its state_dir; if that folder is lost, write the mark "
                f"{known} into the file {MARK} of this one"
            )
        holder = uuid.uuid4().hex
        self.put({"holder": holder} if folder is None else {"holder": holder, "folder": folder})
        self._holder = holder

    def check_hold(self) -> None:
        """Raise StoreTakenError once another server is known to have taken the database over."""
        if self._taken:
            raise StoreTakenError(
                "another server has taken this database over, so this one stops: one server at a time"
            )

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                if self._holder:
                    self._taken |= connection.scalar(_value("holder")) != self._holder
                self.check_hold()
                yield connection
        except (sa.exc.SQLAlchemyError, UnicodeDecodeError) as error:  # SQLite's message about damaged text
            raise StateError(f"the server's database failed: {_cause(error)}") from error

    def _rows(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        with self._transaction() as connection:
            return connection.execute(query).all()

    def _scalar(self, query: sa.Select[Any]) -> Any:
        with self._transaction() as connection:
            return connection.scalar(query)

    def get(self, key: str) -> str | None:
        """A value of the run's metadata."""
        found: str | None = self._scalar(_value(key))
        return found

    def get_json(self, key: str) -> Any:
        """A value of the run's metadata that is JSON; None if there is none, StateError if it is damaged."""
        value = self.get(key)
        return None if value is None else _loads(value, f"the entry {key!r}")

    def put(self, values: Mapping[str, str]) -> None:
        """Set values of the run's metadata."""
        with self._transaction() as connection:
            _put(connection, values)

    def enrol(self, client: str, enrolment: Enrolment, now: float) -> None:
        """Remember that a member has enrolled, and with what; of its ledger, what it enrols with first."""
        row = {"family": enrolment.family, "software": enrolment.software, "enrolled_at": now}
        with self._transaction() as connection:
            tables.upsert(connection, tables.members, {"client": client}, row)
            if enrolment.ledger_head and connection.scalar(_ledger_head(client)) is None:
                tables.upsert(
                    connection, tables.ledger_heads, {"client": client}, {"head": enrolment.ledger_head}
                )

    def ledger_head(self, client: str) -> bytes:
        """The newest head of a member's privacy ledger; empty if it never sent one."""
        return bytes(self._scalar(_ledger_head(client)) or b"")

    def families(self) -> dict[str, str]:
        """Members that have ever enrolled, and the family that they enrolled with last."""
        columns = tables.members.c
        return {row.client: row.family for row in self._rows(sa.select(columns.client, columns.family))}

    def enrolled(self) -> frozenset[str]:
        """Members that have ever enrolled."""
        return frozenset(self.families())

    def add_uploads(self, arrivals: Iterable[Arrival]) -> None:
        """Store accepted uploads, their profiles, ledger heads and traffic; their payloads are in place."""
        with self._transaction() as connection:
            for arrival in arrivals:
                _add_upload(connection, arrival)

    def uploads(self, round_number: int) -> dict[str, StoredUpload]:
        """Stored uploads of a round, by client."""
        rows = self._rows(sa.select(tables.uploads).where(tables.uploads.c.round == round_number))
        return {
            row.client: StoredUpload(bytes(row.content_hash), row.key_epoch, _section_headers(row))
            for row in rows
        }

    def drop_uploads(self, round_number: int, clients: Collection[str]) -> None:
        """Forget uploads whose payloads are damaged; their profiles are in the database and stay."""
        table = tables.uploads
        with self._transaction() as connection:
            connection.execute(
                sa.delete(table).where(table.c.round == round_number, table.c.client.in_(clients))
            )

    def content_hash(self, round_number: int, client: str) -> bytes | None:
        """Digest of the stored upload of a client for a round."""
        table = tables.uploads
        found = self._scalar(
            sa.select(table.c.content_hash).where(table.c.round == round_number, table.c.client == client)
        )
        return None if found is None else bytes(found)

    def newest_profiles(self) -> dict[str, int]:
        """Round of the newest profile of every client that ever sent one."""
        return {row.client: row.round for row in self._rows(tables.NEWEST_PROFILES)}

    def profiles(self) -> dict[str, Profile]:
        """The newest profile of every client that ever sent one."""
        table, latest = tables.profiles, tables.NEWEST_PROFILES.subquery()
        match = sa.and_(table.c.client == latest.c.client, table.c.round == latest.c.round)
        rows = self._rows(sa.select(table).join(latest, match))
        return {
            row.client: Profile(
                np.frombuffer(row.vector, dtype="<f4").astype(np.float32), row.noise_variance, row.releases
            )
            for row in rows
        }

    def close_round(
        self,
        round_number: int,
        result: Mapping[str, object],
        aggregates: Mapping[str, StoredAggregate],
        metadata: Mapping[str, str],
        *,
        key_epoch: int = 0,
    ) -> None:
        """Record the end of a round, with the aggregates for the next, in one transaction.

        `result` is JSON-compatible, `metadata` what changes with the round. Key messages of epochs before
        `key_epoch`, that of the next round, are forgotten.
        """
        told = {"round": round_number, "result": json.dumps(result, allow_nan=False)}
        rows = [{"round": round_number + 1, "client": c, **vars(a)} for c, a in aggregates.items()]
        with self._transaction() as connection:
            connection.execute(sa.insert(tables.rounds).values(told))
            if rows:
                connection.execute(sa.insert(tables.aggregates), rows)
            connection.execute(sa.delete(tables.aggregates).where(tables.aggregates.c.round <= round_number))
            connection.execute(_older_key_messages(key_epoch))
            _put(connection, metadata)

    def aggregates(self, round_number: int) -> dict[str, StoredAggregate]:
        """What clients may load before a round."""
        table = tables.aggregates
        rows = self._rows(sa.select(table).where(table.c.round == round_number))
        return {row.client: StoredAggregate(row.key_epoch, row.sections, bytes(row.sha256)) for row in rows}

    def replace_aggregate(self, round_number: int, client: str, made: StoredAggregate) -> None:
        """Store another description of a client's aggregate, whose payload was damaged."""
        table, values = tables.aggregates, {"sections": made.sections, "sha256": made.sha256}
        changed = sa.update(table).where(table.c.round == round_number, table.c.client == client)
        with self._transaction() as connection:
            connection.execute(changed.values(values))

    def results(self, after: int = 0) -> list[dict[str, Any]]:
        """What was recorded at the end of every round above `after`, in order."""
        table = tables.rounds
        rows = self._rows(sa.select(table.c.result).where(table.c.round > after).order_by(table.c.round))
        return [_loads(row.result, "the result of a round") for row in rows]

    def add_key_message(self, sender: str, message: KeyMessage, metadata: Mapping[str, str]) -> None:
        """Store a message of a key agreement together with the epoch's new state."""
        with self._transaction() as connection:
            connection.execute(sa.insert(tables.key_messages).values(sender=sender, **asdict(message)))
            _put(connection, metadata)

    def key_message(self, sender: str, message: KeyMessage) -> bytes | None:
        """Payload that is stored in the place of a message."""
        table = tables.key_messages
        found = self._scalar(
            sa.select(table.c.payload).where(
                table.c.epoch == message.epoch,
                table.c.stage == message.stage,
                table.c.sender == sender,
                table.c.recipient == message.recipient,
            )
        )
        return None if found is None else bytes(found)

    def key_messages(self, epoch: int, stage: str, reader: str) -> dict[str, bytes]:
        """Messages of a stage that a client may read, by sender."""
        table = tables.key_messages
        rows = self._rows(
            sa.select(table.c.sender, table.c.payload).where(
                table.c.epoch == epoch, table.c.stage == stage, table.c.recipient.in_(("", reader))
            )
        )
        return {row.sender: bytes(row.payload) for row in rows}

    def replace_key_epoch(self, epoch: int, metadata: Mapping[str, str]) -> None:
        """Forget the messages of all epochs below `epoch` and store the new one's state."""
        with self._transaction() as connection:
            connection.execute(_older_key_messages(epoch))
            _put(connection, metadata)

    def add_report(self, client: str, statement: bytes, now: float) -> None:
        """Store a client's privacy statement; a later one replaces it."""
        row = {"statement": statement, "received_at": now}
        with self._transaction() as connection:
            tables.upsert(connection, tables.reports, {"client": client}, row)

    def reports(self) -> dict[str, bytes]:
        """Privacy statements by client."""
        return {row.client: bytes(row.statement) for row in self._rows(sa.select(tables.reports))}

    def add_traffic(self, counted: Mapping[str, tuple[int, int]]) -> None:
        """Add to the bytes received from and sent to clients."""
        with self._transaction() as connection:
            for client, (received, sent) in counted.items():
                tables.count_traffic(connection, client, received, sent)

    def traffic(self, clients: Collection[str]) -> dict[str, dict[str, int]]:
        """Bytes received from and sent to every client."""
        rows = self._rows(sa.select(tables.traffic))
        known = {row.client: {"received": row.received, "sent": row.sent} for row in rows}
        return {client: known.get(client, {"received": 0, "sent": 0}) for client in sorted(clients)}


def default_url(state_dir: Path) -> str:
    """SQLite inside the state folder."""
    return f"sqlite:///{state_dir / 'server.db'}"


def _value(key: str) -> sa.Select[Any]:
    return sa.select(tables.meta.c.value).where(tables.meta.c.key == key)


def _add_upload(connection: sa.Connection, arrival: Arrival) -> None:
    client, header = arrival.client, arrival.header
    row = {
        "round": header.round,
        "client": client,
        "content_hash": arrival.content_hash,
        "attempt_id": header.attempt_id,
        "key_epoch": header.key_epoch,
        "sections": json.dumps([[s.name, s.size, s.sha256.hex()] for s in header.sections]),
        "signature": header.signature,
        "received_at": arrival.received_at,
    }
    connection.execute(sa.insert(tables.uploads).values(row))
    if header.profile is not None:
        # There is one already where the upload was damaged here and is sent again.
        values = {
            "vector": header.profile.vector.astype("<f4").tobytes(),
            "noise_variance": header.profile.noise_variance,
            "releases": header.profile.releases,
        }
        tables.upsert(connection, tables.profiles, {"client": client, "round": header.round}, values)
    if header.ledger is not None:
        tables.upsert(connection, tables.ledger_heads, {"client": client}, {"head": header.ledger.head})
    tables.count_traffic(connection, client, arrival.received_bytes, 0)


def _ledger_head(client: str) -> sa.Select[Any]:
    return sa.select(tables.ledger_heads.c.head).where(tables.ledger_heads.c.client == client)


def _older_key_messages(epoch: int) -> sa.Delete:
    return sa.delete(tables.key_messages).where(tables.key_messages.c.epoch < epoch)


def _put(connection: sa.Connection, values: Mapping[str, str]) -> None:
    for key, text in values.items():
        tables.upsert(connection, tables.meta, {"key": key}, {"value": text})


def _cause(error: Exception) -> str:
    """What the database said, on one line, without the statement and its parameters."""
    return " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__


def _loads(text: str, what: str) -> Any:
    """JSON of the database; StateError, which says of what, if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StateError(
            f"the server's database is damaged: {what} is not JSON ({error}); restore a backup of state_dir, "
            "database and payloads together"
        ) from None


def _section_headers(row: sa.Row[Any]) -> tuple[SectionHeader, ...]:
    """The sections of a stored upload; StateError if they are damaged."""
    what = f"the sections of an upload of {row.client}"
    try:
        return tuple(SectionHeader(n, s, bytes.fromhex(h)) for n, s, h in _loads(row.sections, what))
    except (WireError, ValueError, TypeError) as error:
        raise StateError(f"the server's database is damaged: {what}: {error}") from None
