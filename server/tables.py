"""Tables of the server's database."""

import sqlalchemy as sa

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
