"""Names, hosts and addresses are held to what they mean, and a federation is founded whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest

from builders import founding
from fedmosaic.client.settings import ClientSettings
from fedmosaic.privacy.configuration import validate
from fedmosaic.privacy.federation import consortium, identity, names
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.kits import FederationConfig
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.settings import settings_from_kit

BALANCER = "internal-fedmosaic-prod-alb-1234567890.eu-central-1.elb.amazonaws.com"


def described(name: str = "clinics", *hosts: str) -> FederationConfig:
    content = founding().model_dump(mode="json") | {
        "federation": name,
        "members": [{"id": member} for member in ("a", "b", "c", "m" * 63)],
        "server": {"hosts": hosts or ("localhost",)},
    }
    return validate(content, FederationConfig, "federation.toml")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("fl.example.org", "fl.example.org"),
        ("FL.Example.ORG.", "fl.example.org"),
        ("localhost", "localhost"),
        ("fl_server", "fl_server"),
        ("xn--mosaque-rza.example", "xn--mosaque-rza.example"),
        (BALANCER, BALANCER),
        (".".join(["a" * 63] * 3), ".".join(["a" * 63] * 3)),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
    ],
)
def test_a_host_is_given_back_as_it_is_signed_and_dialled(given: str, meant: str) -> None:
    assert names.host(given) == meant
    assert names.host(meant) == meant


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "no host name"),
        (".", "no host name"),
        ("a..b", "no host name"),
        ("-a.example", "no host name"),
        ("fl example", "no host name"),
        ("*.example.org", "no host name"),
        ("a" * 64, "no host name"),
        (".".join(["a" * 63] * 4), "no host name"),
        ("fl.example.org\n", "no host name"),
        ("fl.example.org:7443", "without a port"),
        ("[::1]", "without brackets"),
        ("https://fl.example.org", "a URL"),
        ("fl.example.org/path", "a URL"),
        ("mosaïque.example", "xn--mosaque-rza.example"),
        ("1.2.3", "complete address"),
        ("256.1.1.1", "complete address"),
        ("0.0.0.0", "not an address that clients can reach"),  # noqa: S104
        ("::", "not an address that clients can reach"),
        ("224.0.0.1", "not an address that clients can reach"),
        ("fe80::1%eth0", "zone"),
    ],
)
def test_what_no_client_can_reach_is_not_signed(given: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=r"server\.hosts\.0: ") as error:
        described("clinics", given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("FL.example.org:7443", "fl.example.org:7443"),
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[0:0::1]:65535", "[::1]:65535"),
    ],
)
def test_an_address_is_host_and_port(given: str, meant: str) -> None:
    assert names.address(given) == meant
    assert names.listen_address(given) == meant


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("localhost:99999", "at most 65535"),
        ("localhost:0", "port 0"),
        ("localhost:", "at most 65535"),
        ("localhost:٧", "at most 65535"),
        ("localhost", "no port"),
        ("[::1]", "brackets and with its port"),
        ("::1:7443", "brackets"),
        ("[localhost]:7443", "only an IPv6 address"),
        ("https://fl.example.org:7443", "a URL"),
        ("0.0.0.0:7443", "clients can reach"),
        (":7443", "no host name"),
    ],
)
def test_what_is_no_address_is_refused_before_it_is_dialled(given: str, words: str) -> None:
    settings = {
        "kit": "kit",
        "server": given,
        "state_dir": "state",
        "model": {"path": "m"},
        "probe": {"path": "p"},
        "data": {"train": "t"},
    }
    with pytest.raises(ConfigurationError, match="server: ") as error:
        validate(settings, ClientSettings, "client.toml")
    assert words in str(error.value)


@pytest.mark.parametrize("given", ["0.0.0.0:7443", "[::]:0", "127.0.0.1:0", "localhost:7443"])
def test_a_server_listens_where_clients_cannot_connect_to(given: str) -> None:
    assert names.listen_address(given) == given


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("founded") / "f"
    consortium.create(described(), place)
    return place


@pytest.fixture
def kit(founded: Path, tmp_path: Path) -> Path:
    """A copy of the server's kit."""
    return Path(shutil.copytree(founded / "server", tmp_path / "server"))


@pytest.mark.parametrize("listen", ["::7443", "127.0.0.1:99999", "https://x:1", "7443"])
def test_a_bad_listen_address_is_refused_by_its_key(listen: str, kit: Path) -> None:
    (kit / "server.toml").write_text(f'listen = "{listen}"\n')
    with pytest.raises(ConfigurationError, match="listen: "):
        settings_from_kit(kit)


@pytest.mark.parametrize("url", ["", "postgres.example", "mysql://u:secret@h/d", "postgres://u:secret@h/d"])
def test_a_store_that_is_none_is_refused_by_its_key(url: str, kit: Path) -> None:
    (kit / "server.toml").write_text(f'store_url = "{url}"\n')
    with pytest.raises(ConfigurationError, match=r"store_url: .*postgresql\+psycopg://") as error:
        settings_from_kit(kit)
    assert "secret" not in str(error.value)
    for good in ("postgresql+psycopg://me@host/d", "postgresql://me@host/d", "sqlite:////tmp/x.db"):
        (kit / "server.toml").write_text(f'store_url = "{good}"\n')
        assert settings_from_kit(kit).store_url == good


@pytest.mark.parametrize(
    ("local", "servers"),
    [
        (True, "localhost:1 127.0.0.1:1 [::1]:1 10.1.2.3:1 fl-server:1 box.local:1"),
        (False, "fl.example.org:1 8.8.8.8:1"),
    ],
)
def test_this_machine_and_private_networks_are_local(local: bool, servers: str) -> None:
    for server in servers.split():
        assert names.is_local(server) is local, server


def test_the_longest_names_can_be_founded_and_what_is_signed_is_what_was_meant(tmp_path: Path) -> None:
    name = "rare-disease-imaging-consortium-northern-europe-and-baltics-eeu"
    assert len(name) == 63
    consortium.create(described(name, BALANCER, "2001:db8::1", "FL.Example.org."), tmp_path / "f")
    kit = federation.open_kit(tmp_path / "f" / "clients" / ("m" * 63))
    assert (kit.member_id(), kit.roster.federation) == ("m" * 63, name)
    certificate = identity.read_certificate(tmp_path / "f" / "server" / "tls.pem")
    assert identity.certificate_names(certificate) == [BALANCER, "fl.example.org", "2001:db8::1"]


@pytest.mark.parametrize("name", ["", "Clinics", "a b", "x" * 64, "-x", "clinics\n"])
def test_a_name_that_no_message_can_carry_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"federation: .*1 to 63 of a-z"):
        described(name)


def test_a_founding_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(consortium, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        consortium.create(described(), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_founding_that_is_killed_leaves_nothing_that_looks_founded(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        consortium.publish = lambda *_: os._exit(9)  # type: ignore[attr-defined]  # the moment of the kill
        consortium.create(described(), tmp_path / "f")
        os._exit(0)
    os.waitpid(child, 0)
    assert not (tmp_path / "f").exists()
    consortium.create(described(), tmp_path / "f")
    assert federation.open_kit(tmp_path / "f" / "clients" / "a").member_id() == "a"


def test_a_file_in_the_place_of_the_federation_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(ConfigurationError, match="there already"):
        consortium.create(described(), tmp_path / "f")
    assert (tmp_path / "f").read_text() == "mine"
    with pytest.raises(ConfigurationError, match="not empty"):
        consortium.create(described(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe{", b'{"a": NaN}', b"{}"], ids=repr)
def test_a_damaged_roster_or_key_is_named(content: bytes, kit: Path) -> None:
    (kit / "roster.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"roster\.json"):
        federation.open_kit(kit)
    (kit / "consortium.pub").write_bytes(content or b"\xe9")
    with pytest.raises(Exception, match=r"consortium\.pub: not an Ed25519 public key"):
        federation.open_kit(kit)
