"""Tables of the server's database, and how SQLite is to hold them."""

import os
import sqlite3
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from fedmosaic.privacy.files import private_opener
from fedmosaic.protos.errors import StateError

metadata = sa.MetaData()
_CLIENT = sa.String(63)
_HASH = sa.LargeBinary(32)


def _table(name: str, key: dict[str, Any], **columns: Any) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        *(sa.Column(column, kind, primary_key=True) for column, kind in key.items()),
        *(sa.Column(column, kind, nullable=False) for column, kind in columns.items()),
    )


meta = _table("meta", {"key": sa.String(64)}, value=sa.Text)
members = _table(
    "members", {"client": _CLIENT}, family=sa.String(128), software=sa.Text, enrolled_at=sa.Float
)
uploads = _table(
    "uploads",
    {"round": sa.Integer, "client": _CLIENT},
    content_hash=_HASH,
    attempt_id=sa.String(64),
    key_epoch=sa.BigInteger,
    sections=sa.Text,
    signature=sa.LargeBinary(64),
    received_at=sa.Float,
)
profiles = _table(
    "profiles",
    {"client": _CLIENT, "round": sa.Integer},
    vector=sa.LargeBinary,
    noise_variance=sa.Float,
    releases=sa.Integer,
)
rounds = _table("rounds", {"round": sa.Integer}, result=sa.Text)
aggregates = _table(
    "aggregates",
    {"round": sa.Integer, "client": _CLIENT},
    key_epoch=sa.BigInteger,
    sections=sa.Text,
    sha256=_HASH,
)
key_messages = _table(
    "key_messages",
    {"epoch": sa.BigInteger, "stage": sa.String(32), "sender": _CLIENT, "recipient": _CLIENT},
    payload=sa.LargeBinary,
)
reports = _table("reports", {"client": _CLIENT}, statement=sa.LargeBinary, received_at=sa.Float)
traffic = _table("traffic", {"client": _CLIENT}, received=sa.BigInteger, sent=sa.BigInteger)
ledger_heads = _table("ledger_heads", {"client": _CLIENT}, head=_HASH)


NEWEST_PROFILES = sa.select(profiles.c.client, sa.func.max(profiles.c.round).label("round")).group_by(
    profiles.c.client
)


def upsert(
    connection: sa.Connection, table: sa.Table, key: Mapping[str, object], values: Mapping[str, Any]
) -> None:
    """Update the row of a key, or insert it."""
    where = [table.c[column] == part for column, part in key.items()]
    if connection.execute(sa.update(table).where(*where).values(values)).rowcount == 0:
        connection.execute(sa.insert(table).values(**key, **values))


def count_traffic(connection: sa.Connection, client: str, received: int, sent: int) -> None:
    """Add to the bytes received from and sent to a client."""
    table = traffic
    added = {"received": table.c.received + received, "sent": table.c.sent + sent}
    if connection.execute(sa.update(table).where(table.c.client == client).values(added)).rowcount == 0:
        connection.execute(sa.insert(table).values(client=client, received=received, sent=sent))


def reading_engine(url: str) -> sa.Engine:
    """An engine whose connections cannot write; SQLite's file is not made if it is missing."""
    found = sa.make_url(url)
    if found.get_backend_name() != "sqlite":
        return sa.create_engine(url, poolclass=sa.NullPool, execution_options={"postgresql_readonly": True})
    file = f"file:{quote(found.database or '')}?mode=ro"
    return sa.create_engine(
        "sqlite://", poolclass=sa.NullPool, creator=lambda: sqlite3.connect(file, timeout=10.0, uri=True)
    )


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
