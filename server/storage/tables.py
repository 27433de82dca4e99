"""Tables of the server's database, and what its methods share: reads, writes, SQLite's ways."""

import json
import os
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from fedmosaic.privacy.files import private_opener
from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import SectionHeader

metadata = sa.MetaData()
meta = sa.Table(
    "meta", metadata, sa.Column("key", sa.String(64), primary_key=True), sa.Column("value", sa.Text)
)
members = sa.Table(
    "members",
    metadata,
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("family", sa.String(128), nullable=False),
    sa.Column("software", sa.Text, nullable=False),
    sa.Column("enrolled_at", sa.Float, nullable=False),
)
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("content_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("attempt_id", sa.String(64), nullable=False),
    sa.Column("key_epoch", sa.BigInteger, nullable=False),
    sa.Column("sections", sa.Text, nullable=False),
    sa.Column("signature", sa.LargeBinary(64), nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
)
profiles = sa.Table(
    "profiles",
    metadata,
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("noise_variance", sa.Float, nullable=False),
    sa.Column("releases", sa.Integer, nullable=False),
)
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("result", sa.Text, nullable=False),
)
aggregates = sa.Table(
    "aggregates",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("key_epoch", sa.BigInteger, nullable=False),
    sa.Column("sections", sa.Text, nullable=False),
    sa.Column("sha256", sa.LargeBinary(32), nullable=False),
)
key_messages = sa.Table(
    "key_messages",
    metadata,
    sa.Column("epoch", sa.BigInteger, primary_key=True),
    sa.Column("stage", sa.String(32), primary_key=True),
    sa.Column("sender", sa.String(63), primary_key=True),
    sa.Column("recipient", sa.String(63), primary_key=True),
    sa.Column("payload", sa.LargeBinary, nullable=False),
)
reports = sa.Table(
    "reports",
    metadata,
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("statement", sa.LargeBinary, nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
)
traffic = sa.Table(
    "traffic",
    metadata,
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("received", sa.BigInteger, nullable=False),
    sa.Column("sent", sa.BigInteger, nullable=False),
)
ledger_heads = sa.Table(
    "ledger_heads",
    metadata,
    sa.Column("client", sa.String(63), primary_key=True),
    sa.Column("head", sa.LargeBinary(32), nullable=False),
)


def value(connection: sa.Connection, key: str) -> str | None:
    """A value of `meta`; None if there is none."""
    found = connection.scalar(sa.select(meta.c.value).where(meta.c.key == key))
    return None if found is None else str(found)


def put(connection: sa.Connection, values: Mapping[str, str]) -> None:
    """Set values of `meta`."""
    for key, text in values.items():
        upsert(connection, meta, {"key": key}, {"value": text})


def upsert(
    connection: sa.Connection, table: sa.Table, key: Mapping[str, object], values: Mapping[str, object]
) -> None:
    """Update the row of a key, or insert it."""
    where = [table.c[column] == part for column, part in key.items()]
    if connection.execute(sa.update(table).where(*where).values(**values)).rowcount == 0:
        connection.execute(sa.insert(table).values(**key, **values))


def add_traffic(connection: sa.Connection, client: str, received: int, sent: int) -> None:
    """Add to the bytes of a client."""
    added = sa.update(traffic).where(traffic.c.client == client)
    changed = connection.execute(
        added.values(received=traffic.c.received + received, sent=traffic.c.sent + sent)
    )
    if changed.rowcount == 0:
        connection.execute(sa.insert(traffic).values(client=client, received=received, sent=sent))


def ledger_head(connection: sa.Connection, client: str) -> bytes | None:
    """The newest head of a member's privacy ledger; None if it never sent one."""
    found = connection.scalar(sa.select(ledger_heads.c.head).where(ledger_heads.c.client == client))
    return None if found is None else bytes(found)


def cause(error: Exception) -> str:
    """What the database said, on one line, without the statement and its parameters."""
    return " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__


def prepare_sqlite(engine: sa.Engine, *, durable: bool) -> None:
    """Set how SQLite writes, and look through the file; StateError if it is damaged."""
    if (database := engine.url.database) and database != ":memory:":
        # Made before SQLite does, with a mode that its journals then take over.
        os.close(private_opener(database, os.O_CREAT | os.O_RDWR))

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
        cursor.execute("PRAGMA busy_timeout=10000")
        cursor.close()

    with engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise StateError(
            f"the server's database {engine.url.database} is damaged ({found}); restore a backup of "
            "state_dir: database and payloads together"
        )


def loads(text: str, what: str) -> Any:
    """JSON of the database; StateError, which says of what, if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StateError(
            f"the server's database is damaged: {what} is not JSON ({error}); restore a backup of state_dir, "
            "database and payloads together"
        ) from None


def section_headers(text: str, client: str) -> tuple[SectionHeader, ...]:
    """The sections of a stored upload; StateError if they are damaged."""
    what = f"the sections of an upload of {client}"
    try:
        return tuple(SectionHeader(n, s, bytes.fromhex(h)) for n, s, h in loads(text, what))
    except (WireError, ValueError, TypeError) as error:
        raise StateError(f"the server's database is damaged: {what}: {error}") from None
