"""What the server must not forget, in SQLite or PostgreSQL, through SQLAlchemy Core.

Rows are written after the files they name and before anybody is told: what was acknowledged is here.
Payloads are files (`blobs`); profiles, weights and key messages are small and stand in the database.
"""

import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Enrolment, KeyMessage, Profile, SectionHeader, UploadHeader
from fedmosaic.server.storage import tables

_SCHEMA_VERSION: Final = "1"
MARK: Final = "mark"
"""File in the state folder that tells which database goes with it."""


@dataclass(frozen=True)
class StoredUpload:
    """A stored upload without its payloads and profile."""

    client: str
    content_hash: bytes
    key_epoch: int
    sections: tuple[SectionHeader, ...]


@dataclass(frozen=True)
class StoredAggregate:
    """What a client may load, without the payloads.

    Attributes:
        key_epoch: epoch of the uploads inside.
        sections: JSON of the sections as `closing` wrote it.
        sha256: of all payloads, laid end to end.
    """

    key_epoch: int
    sections: str
    sha256: bytes


class StoreTakenError(StateError):
    """Another server has taken the database over; this one has to stop."""


class Store:
    """The database. Every method is one transaction; the caller serialises writers."""

    def __init__(self, url: str, *, durable: bool) -> None:
        """Open or create the database.

        Args:
            url: SQLAlchemy URL.
            durable: False lets SQLite answer before data is on the disk.

        Raises:
            StateError: the database cannot be opened, or is of another version.
        """
        self._holder = ""
        self._taken = False
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
            if self._engine.dialect.name == "sqlite":
                tables.prepare_sqlite(self._engine, durable=durable)
            tables.metadata.create_all(self._engine)
        except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
            raise StateError(
                f"the server's database cannot be opened ({tables.cause(error)}); check store_url, and that "
                "the database runs"
            ) from error
        version = self.get("schema")
        if version is None:
            self.put({"schema": _SCHEMA_VERSION})
        if version not in (None, _SCHEMA_VERSION):
            raise StateError(
                f"the server's database has schema {version}, this program writes {_SCHEMA_VERSION}; finish "
                "the run with the program that began it"
            )

    def hold(self, folder: str | None) -> None:
        """Take the database for this server: whoever held it before can write nothing any more.

        Args:
            folder: mark of the state folder, which has the payloads that the database names; None where the
                database stands in that folder.

        Raises:
            StateError: the database goes with another state folder.
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
                self._taken |= bool(self._holder) and tables.value(connection, "holder") != self._holder
                self.check_hold()
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise StateError(f"the server's database failed: {tables.cause(error)}") from error

    def get(self, key: str) -> str | None:
        """A value of the run's metadata."""
        with self._transaction() as connection:
            return tables.value(connection, key)

    def get_json(self, key: str) -> Any:
        """A value of the run's metadata that is JSON; None if there is none.

        Raises:
            StateError: it is damaged.
        """
        value = self.get(key)
        if value is None:
            return None
        return tables.loads(value, f"the entry {key!r}")

    def put(self, values: Mapping[str, str]) -> None:
        """Set values of the run's metadata."""
        with self._transaction() as connection:
            tables.put(connection, values)

    def enrol(self, client: str, enrolment: Enrolment, now: float) -> None:
        """Remember that a member has enrolled, and with what; of its ledger, what it enrols with first."""
        row = {"family": enrolment.family, "software": enrolment.software, "enrolled_at": now}
        with self._transaction() as connection:
            tables.upsert(connection, tables.members, {"client": client}, row)
            if enrolment.ledger_head and tables.ledger_head(connection, client) is None:
                head = {"head": enrolment.ledger_head}
                tables.upsert(connection, tables.ledger_heads, {"client": client}, head)

    def ledger_head(self, client: str) -> bytes:
        """The newest head of a member's privacy ledger; empty if it never sent one."""
        with self._transaction() as connection:
            return tables.ledger_head(connection, client) or b""

    def enrolled(self) -> frozenset[str]:
        """Members that have ever enrolled."""
        with self._transaction() as connection:
            return frozenset(connection.scalars(sa.select(tables.members.c.client)))

    def add_upload(
        self, client: str, header: UploadHeader, content_hash: bytes, now: float, received_bytes: int
    ) -> None:
        """Store an accepted upload, its profile, the ledger's head and the bytes it took.

        Its payloads are in place already.
        """
        sections = json.dumps([[s.name, s.size, s.sha256.hex()] for s in header.sections])
        with self._transaction() as connection:
            connection.execute(
                sa.insert(tables.uploads).values(
                    round=header.round,
                    client=client,
                    content_hash=content_hash,
                    attempt_id=header.attempt_id,
                    key_epoch=header.key_epoch,
                    sections=sections,
                    signature=header.signature,
                    received_at=now,
                )
            )
            if header.profile is not None:
                # There is one already where the upload was damaged here and is sent again.
                values = {
                    "vector": header.profile.vector.astype("<f4").tobytes(),
                    "noise_variance": header.profile.noise_variance,
                    "releases": header.profile.releases,
                }
                tables.upsert(connection, tables.profiles, {"client": client, "round": header.round}, values)
            if header.ledger is not None:
                tables.upsert(
                    connection, tables.ledger_heads, {"client": client}, {"head": header.ledger.head}
                )
            tables.add_traffic(connection, client, received_bytes, 0)

    def uploads(self, round_number: int) -> dict[str, StoredUpload]:
        """Stored uploads of a round, by client."""
        with self._transaction() as connection:
            rows = connection.execute(
                sa.select(tables.uploads).where(tables.uploads.c.round == round_number)
            ).all()
        return {
            row.client: StoredUpload(
                row.client,
                bytes(row.content_hash),
                row.key_epoch,
                tables.section_headers(row.sections, row.client),
            )
            for row in rows
        }

    def drop_uploads(self, round_number: int, clients: Collection[str]) -> None:
        """Forget uploads whose payloads are damaged; their profiles are in the database and stay."""
        with self._transaction() as connection:
            connection.execute(
                sa.delete(tables.uploads).where(
                    tables.uploads.c.round == round_number, tables.uploads.c.client.in_(clients)
                )
            )

    def content_hash(self, round_number: int, client: str) -> bytes | None:
        """Digest of the stored upload of a client for a round."""
        query = sa.select(tables.uploads.c.content_hash).where(
            tables.uploads.c.round == round_number, tables.uploads.c.client == client
        )
        with self._transaction() as connection:
            value = connection.scalar(query)
        return None if value is None else bytes(value)

    def profiles(self) -> dict[str, Profile]:
        """The newest profile of every client that ever sent one."""
        newest = (
            sa.select(tables.profiles.c.client, sa.func.max(tables.profiles.c.round).label("round"))
            .group_by(tables.profiles.c.client)
            .subquery()
        )
        query = sa.select(tables.profiles).join(
            newest,
            sa.and_(tables.profiles.c.client == newest.c.client, tables.profiles.c.round == newest.c.round),
        )
        with self._transaction() as connection:
            rows = connection.execute(query).all()
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
        """Record the end of a round and the opening of the next, with its key epoch, in one transaction.

        Args:
            round_number: the round that was aggregated.
            result: what the summary tells of it; JSON-compatible.
            aggregates: by client, for round_number + 1.
            metadata: values of the run that change with it.
            key_epoch: of the next round; the key messages of earlier ones are forgotten.
        """
        with self._transaction() as connection:
            connection.execute(
                sa.insert(tables.rounds).values(
                    round=round_number, result=json.dumps(result, allow_nan=False)
                )
            )
            rows = [
                {
                    "round": round_number + 1,
                    "client": client,
                    "key_epoch": aggregate.key_epoch,
                    "sections": aggregate.sections,
                    "sha256": aggregate.sha256,
                }
                for client, aggregate in aggregates.items()
            ]
            if rows:
                connection.execute(sa.insert(tables.aggregates), rows)
            connection.execute(sa.delete(tables.aggregates).where(tables.aggregates.c.round <= round_number))
            connection.execute(sa.delete(tables.key_messages).where(tables.key_messages.c.epoch < key_epoch))
            tables.put(connection, metadata)

    def aggregate(self, round_number: int, client: str) -> StoredAggregate | None:
        """What a client may load before a round; None if nothing was made for it."""
        query = sa.select(tables.aggregates).where(
            tables.aggregates.c.round == round_number, tables.aggregates.c.client == client
        )
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else StoredAggregate(row.key_epoch, row.sections, bytes(row.sha256))

    def replace_aggregate(self, round_number: int, client: str, sections: str, sha256: bytes) -> None:
        """Store another description of a client's aggregate, whose payload was damaged."""
        with self._transaction() as connection:
            connection.execute(
                sa.update(tables.aggregates)
                .where(tables.aggregates.c.round == round_number, tables.aggregates.c.client == client)
                .values(sections=sections, sha256=sha256)
            )

    def results(self) -> list[dict[str, Any]]:
        """What was recorded at the end of every round, in order."""
        with self._transaction() as connection:
            rows = connection.scalars(sa.select(tables.rounds.c.result).order_by(tables.rounds.c.round)).all()
        return [tables.loads(row, "the result of a round") for row in rows]

    def add_key_message(self, sender: str, message: KeyMessage, metadata: Mapping[str, str]) -> None:
        """Store a message of a key agreement together with the board's new state."""
        with self._transaction() as connection:
            connection.execute(
                sa.insert(tables.key_messages).values(
                    epoch=message.epoch,
                    stage=message.stage,
                    sender=sender,
                    recipient=message.recipient,
                    payload=message.payload,
                )
            )
            tables.put(connection, metadata)

    def key_message(self, sender: str, message: KeyMessage) -> bytes | None:
        """Payload that is stored in the place of a message."""
        query = sa.select(tables.key_messages.c.payload).where(
            tables.key_messages.c.epoch == message.epoch,
            tables.key_messages.c.stage == message.stage,
            tables.key_messages.c.sender == sender,
            tables.key_messages.c.recipient == message.recipient,
        )
        with self._transaction() as connection:
            value = connection.scalar(query)
        return None if value is None else bytes(value)

    def key_messages(self, epoch: int, stage: str, reader: str) -> dict[str, bytes]:
        """Messages of a stage that a client may read, by sender."""
        query = sa.select(tables.key_messages.c.sender, tables.key_messages.c.payload).where(
            tables.key_messages.c.epoch == epoch,
            tables.key_messages.c.stage == stage,
            tables.key_messages.c.recipient.in_(("", reader)),
        )
        with self._transaction() as connection:
            return {row.sender: bytes(row.payload) for row in connection.execute(query)}

    def replace_key_epoch(self, epoch: int, metadata: Mapping[str, str]) -> None:
        """Forget the messages of all epochs below `epoch` and store the board's new state."""
        with self._transaction() as connection:
            connection.execute(sa.delete(tables.key_messages).where(tables.key_messages.c.epoch < epoch))
            tables.put(connection, metadata)

    def add_report(self, client: str, statement: bytes, now: float) -> None:
        """Store a client's privacy statement; a later one replaces it."""
        with self._transaction() as connection:
            tables.upsert(
                connection, tables.reports, {"client": client}, {"statement": statement, "received_at": now}
            )

    def reports(self) -> dict[str, bytes]:
        """Privacy statements by client."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(tables.reports.c.client, tables.reports.c.statement)).all()
        return {row.client: bytes(row.statement) for row in rows}

    def add_traffic(self, counted: Mapping[str, tuple[int, int]]) -> None:
        """Add to the bytes received from and sent to clients."""
        with self._transaction() as connection:
            for client, (received, sent) in counted.items():
                tables.add_traffic(connection, client, received, sent)

    def traffic(self, clients: Collection[str]) -> dict[str, dict[str, int]]:
        """Bytes received from and sent to every client."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(tables.traffic)).all()
        known = {row.client: {"received": row.received, "sent": row.sent} for row in rows}
        return {client: known.get(client, {"received": 0, "sent": 0}) for client in sorted(clients)}


def default_url(state_dir: Path) -> str:
    """SQLite inside the state folder."""
    return f"sqlite:///{state_dir / 'server.db'}"
