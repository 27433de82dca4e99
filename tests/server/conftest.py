"""A federation made up for tests: settings, keys, uploads. No model and no network."""

import datetime as dt
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders
from chaos.faults import Postgresql, lacking
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.privacy.encryption.parameters import PlainParameters
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext, upload_header
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.roster import Member, Roster, Witness
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.mechanism.profile import Reduction
from fedmosaic.privacy.statement.models import ADVERSARIES, PrivacyStatement
from fedmosaic.protos.messages import PROTOCOL_VERSION, Enrolment, Profile, ReceiptStatus, Section, Upload
from fedmosaic.protos.signing import sign_upload
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.server import Server
from fedmosaic.server.settings import ServerSettings, TlsFiles
from fedmosaic.server.storage import tables

CLIENTS = ("clinic-a", "clinic-b", "clinic-c", "clinic-d", "clinic-e")
PROFILE_DIMENSIONS = 8


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class TestFederation:
    """Members with their keys, and what they send."""

    __test__ = False
    clients: tuple[str, ...] = CLIENTS
    rank: int = 3
    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)
    parameters: PlainParameters = field(default_factory=PlainParameters)
    roster: Roster = field(init=False)
    """What the settings asked for last are made of."""

    def __post_init__(self) -> None:
        self.keys = {client: Ed25519PrivateKey.generate() for client in self.clients}
        self.roster = self.agree()

    @property
    def dimensions(self) -> int:
        return self.roster.terms.adapter.shared_dimensions

    def agree(self, serial: int = 1, families: Mapping[str, str] = {}, **changes: Any) -> Roster:
        """A roster of all clients; the changes are to its terms, table by table."""
        encryption = changes.pop("encryption", self.parameters)
        plain = encryption.backend == "plain"
        protection = "none" if plain else "encrypted"
        reduction = Reduction(hidden_size=4, intermediate_size=4, projection_dimensions=PROFILE_DIMENSIONS)
        tables: dict[str, dict[str, Any]] = {
            "adapter": {"rank": self.rank, "blocks": 1, "target_modules": ("m",), "protection": protection},
            "schedule": {"rounds": 3, "quorum": min(4, len(self.clients)), "round_deadline_seconds": 60.0},
            "policy": {"minimum_contributors": min(3, len(self.clients) - 1)},
            "profile": {"reduction": reduction, "noise_multiplier": 0.0},
        }
        agreed = {name: table | changes.pop(name, {}) for name, table in tables.items()} | changes
        agreed["profile"] = builders.tiny_mechanism(**agreed["profile"])
        terms = Terms.model_validate({**agreed, "encryption": encryption, "allow_plaintext": plain})
        members = [
            Member(
                id=client,
                identity_key=identity.public_hex(key.public_key()),
                tls_key_sha256=identity.spki_sha256(builders.tls_key(client).public_key()),
                family=families.get(client, ""),
            )
            for client, key in self.keys.items()
        ]
        return Roster(federation="fed", serial=serial, issued="", members=tuple(members), terms=terms)

    def settings(self, state_dir: Path, witness: Witness | None = None, **changes: Any) -> ServerSettings:
        """Of a server of this federation; the changes are the operator's, or to the roster."""
        own = {name: changes.pop(name) for name in ServerSettings.model_fields.keys() & changes.keys()}
        agreed = self.agree(**changes)
        made = ServerSettings(roster=agreed, state_dir=state_dir, **({"durable": False} | own))
        # A witness is shown plain sums here, which no roster allows: they are easier to look at.
        self.roster = agreed.model_copy(update={"witness": witness})
        return made.model_copy(update={"roster": self.roster})

    def enrolment(self, **changes: Any) -> Enrolment:
        values: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "federation": "fed",
            "roster_hash": self.roster.hash,
            "adapter_spec_hash": self.roster.terms.adapter.spec_hash,
            "family": "",
            "software": "fedmosaic test",
        }
        return Enrolment(**(values | changes))

    def vector(self, client: str, round_number: int, dimensions: int | None = None) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(f"{client}/{round_number}".encode()).digest()[:8], "little")
        size = dimensions or self.dimensions
        return np.random.default_rng(seed).uniform(-1.0, 1.0, size).astype(np.float32)

    def profile(self, client: str, round_number: int = 1) -> Profile:
        return Profile(self.vector(client, -round_number, PROFILE_DIMENSIONS), 0.0, 1)

    def record(
        self, client: str, round_number: int, vector: np.ndarray, label: str = "shared", epoch: int = 0
    ) -> bytes:
        context = RoundContext("fed", epoch, round_number, label, vector.size)
        head = upload_header(self.parameters, context, client).encode(bytes(16))
        return head + vector.astype("<f4").tobytes()

    def upload(self, run_id: str, client: str, round_number: int, **changes: Any) -> Upload:
        values: dict[str, Any] = {
            "federation": "fed",
            "run_id": run_id,
            "round_number": round_number,
            "client_id": client,
            "key_epoch": 0,
            "attempt_id": f"{client}-{round_number}",
            "sections": (
                Section("shared", self.record(client, round_number, self.vector(client, round_number))),
            ),
            "profile": self.profile(client, round_number),
        }
        key = changes.pop("key", self.keys[client])
        return sign_upload(key, **(values | changes))

    def statement(self, run_id: str, client: str, **changes: Any) -> bytes:
        """A privacy statement; `changes` are of the client's part."""
        attack: dict[str, Any] = {"gaussian_mu": 1.0, "advantage": 0.3}
        attack |= {f"true_positive_rate_at_{rate}_percent": 0.1 for rate in ("1", "0_1")}
        subject = {"delta": 1e-5, "unit": "example", "neighbouring_relation": "add or remove one"}
        channel: dict[str, Any] = {"channel": "joint", "protection": None, "epsilon": 1.0}
        channel |= {"nominal_epsilon": 1.0, "accountant": "rdp", "accountants": None, "attack": attack}
        channel |= {"mechanisms": (), "parallel_composition": False, "reservations_never_released": 0}
        channel |= {"resends": 0, "refusals": 0, "clipped_share": None, "planned": None}
        guarantee: dict[str, Any] = {"channel": "joint", "cover": "dp", "epsilon": 1.0, "accountant": "rdp"}
        guarantee |= {
            "cryptography_only": (),
            "attack": None,
            "test_noise": False,
            "words": "ε = 1",
            **subject,
        }
        mine: dict[str, Any] = {"client_id": client, "target_epsilon": 8.0, "budgeted_channels": ("profile",)}
        mine |= {
            "spent_epsilon": 1.0,
            "remaining_epsilon": 7.0,
            "refusals": 0,
            "test_noise": False,
            **subject,
        }
        mine |= {"channels": (channel,), "warnings": ()}
        mine |= {"guarantees": [guarantee | {"adversary": adversary} for adversary in ADVERSARIES]}
        whole: dict[str, Any] = {"run_id": run_id, "roster_sha256": self.roster.hash.hex()}
        whole |= {"created": "", "encryption": ""}
        whole |= {"transport": "mutual_tls", "no_guarantee": False, "coalition_rows": (), "assumptions": ()}
        statement = {**whole, "leaks": (), "clients": (mine | changes,)}
        return PrivacyStatement.model_validate(statement).model_dump_json().encode()

    def values(self, payload: bytes) -> np.ndarray:
        """The vector inside a plain aggregate."""
        return np.frombuffer(payload[HEADER_BYTES:], dtype="<f4")

    def push(
        self, coordinator: Coordinator, round_number: int, clients: tuple[str, ...] = (), **changes: Any
    ) -> None:
        """Enrol and push; the changes are to the uploads."""
        for client in clients or self.clients:
            coordinator.enrol(client, self.enrolment())
            receipt = coordinator.push(
                client, self.upload(coordinator.run_id, client, round_number, **changes)
            )
            assert receipt.status is not ReceiptStatus.LATE

    def play(self, coordinator: Coordinator, round_number: int, clients: tuple[str, ...] = ()) -> None:
        """Enrol, push and close one round."""
        self.push(coordinator, round_number, clients)
        coordinator.advance()

    @staticmethod
    def crash(coordinator: Coordinator) -> None:
        """Let go of the state without a word, as a killed process would."""
        coordinator._run.store.close()
        coordinator._run.blobs.close()


@pytest.fixture
def federation() -> TestFederation:
    return TestFederation()


@pytest.fixture
def make_federation() -> Callable[..., TestFederation]:
    return TestFederation


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def begin(federation: TestFederation, clock: Clock, tmp_path: Path) -> Iterator[Callable[..., Coordinator]]:
    """Begin the run in `tmp_path / "state"` with changed settings, or go on with it; closed at the end."""
    begun: list[Coordinator] = []

    def make(of: TestFederation = federation, **changes: Any) -> Coordinator:
        begun.append(Coordinator(of.settings(tmp_path / "state", **changes), clock))
        return begun[-1]

    yield make
    for coordinator in begun:
        if not coordinator._run.blobs._lock.closed:  # crashed, or closed by the test
            coordinator.close()


@pytest.fixture
def coordinator(begin: Callable[..., Coordinator]) -> Coordinator:
    return begin()


@pytest.fixture(scope="session")
def own_postgresql() -> Iterator[Postgresql]:
    """A PostgreSQL of the tests' own, where its programs and psycopg are."""
    if missing := lacking():
        pytest.skip(f"there is no {missing} here")
    database = Postgresql()
    yield database
    database.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'server.db'}"
        return
    url = os.environ.get("FEDMOSAIC_TEST_POSTGRESQL") or request.getfixturevalue("own_postgresql").url
    engine = sa.create_engine(url)
    tables.metadata.drop_all(engine)
    yield url
    tables.metadata.drop_all(engine)
    engine.dispose()


class Authority:
    """A certificate authority and the files of everybody it has issued to."""

    def __init__(self, folder: Path, federation: str = "fed") -> None:
        self.folder = folder
        self.federation = federation
        folder.mkdir(parents=True)
        self.authority = identity.create_authority(federation)
        self.certificate = folder / "authority.pem"
        self.certificate.write_bytes(self.authority.certificate.public_bytes(serialization.Encoding.PEM))

    def _files(self, name: str, issued: builders.TlsIdentity) -> tuple[Path, Path]:
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        if key.exists():
            key.unlink()
        certificate.write_bytes(issued.certificate_pem)
        identity.write_private(key, issued.key_pem)
        return certificate, key

    def server(self) -> TlsFiles:
        certificate, key = self._files(
            "server", builders.issue_server(self.authority, ["localhost", "127.0.0.1"])
        )
        return TlsFiles(certificate=certificate, private_key=key, authority=self.certificate)

    def client(self, client: str, age_days: int = 0, **changes: Any) -> tuple[Path, Path]:
        """Certificate and key of a client, issued `age_days` ago."""
        then = dt.datetime.now(dt.UTC) - dt.timedelta(days=age_days)
        federation = changes.get("federation", self.federation)
        return self._files(client, builders.issue_client(self.authority, federation, client, now=then))

    def channel(self, server: Any, client: str, *options: tuple[str, int]) -> grpc.Channel:
        """A channel with a new certificate of a client."""
        certificate, key = self.client(client)
        credentials = grpc.ssl_channel_credentials(
            self.certificate.read_bytes(), key.read_bytes(), certificate.read_bytes()
        )
        return grpc.secure_channel(server.address, credentials, options=options)


class ServerThread:
    """A real server in a thread, stopped when told."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._open = ExitStack()
        self.port = self._open.enter_context(Server(settings).background())
        self.stop = self._open.close

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def make_authority(tmp_path: Path) -> Callable[..., Authority]:
    return lambda name, **changes: Authority(tmp_path / name, **changes)


@pytest.fixture
def start_server() -> Iterator[Callable[[ServerSettings], ServerThread]]:
    with ExitStack() as started:

        def start(settings: ServerSettings) -> ServerThread:
            server = ServerThread(settings)
            started.callback(server.stop)
            return server

        yield start


@pytest.fixture
def connect(authority: Authority) -> Iterator[Callable[..., GrpcTransport]]:
    opened: list[GrpcTransport] = []

    def make(server: ServerThread, client: str, federation: str = "fed", **options: Any) -> GrpcTransport:
        certificate, key = authority.client(client, federation=federation)
        opened.append(
            GrpcTransport(
                server.address,
                authority=authority.certificate,
                certificate=certificate,
                private_key=key,
                **({"retry_seconds": 60.0, "wait_seconds": 5.0} | options),
            )
        )
        return opened[-1]

    yield make
    for transport in opened:
        transport.close()
