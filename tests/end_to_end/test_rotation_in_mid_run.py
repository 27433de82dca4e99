"""Certificates, keys and the roster change while a server and its clients run, over gRPC on loopback."""

import logging
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from waiting import wait_until

import builders
from end_to_end import federation_of_vectors as fv
from fedmosaic.client.round import membership
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.federation import consortium, identity, kits
from fedmosaic.privacy.federation.requests import make_request
from fedmosaic.protos.errors import IdentityError
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server import renewal
from fedmosaic.server.server import Server


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_SECONDS_BETWEEN_EPOCHS", 0.1)
    monkeypatch.setattr(membership, "_SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(renewal, "_LOOK_SECONDS", 0.1)


class Held(fv.VectorLearner):
    """A learner that stays in the training of a round until it is let go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arrived, self.go = threading.Event(), threading.Event()

    def train(self, round_number: int, *arguments: Any) -> None:
        super().train(round_number, *arguments)
        if round_number == 2:
            self.arrived.set()
            assert self.go.wait(240)


class HeldClient(fv.Client):
    def make_learner(self, agreed: Any) -> Held:
        return Held(self.seed, agreed)


@contextmanager
def running(directory: Path, port: int, clients: dict[str, HeldClient]) -> Iterator[dict[str, BaseException]]:
    """Runs all clients while the context is open; fills in what they raised."""
    errors: dict[str, BaseException] = {}
    with ExitStack() as stack:
        sessions = {}
        for name, client in clients.items():
            transport = fv.dial(directory, name, port, retry_seconds=120.0, wait_seconds=0.5)
            stack.callback(transport.close)
            sessions[name] = client.session(transport)
            stack.callback(client.close)
        whole = threading.Thread(target=lambda: errors.update(fv.run_all(sessions)), daemon=True)
        whole.start()
        yield errors
        whole.join(240)
        assert not whole.is_alive()


def shown_serial(directory: Path, port: int) -> int:
    """Serial number of the certificate that the server shows at a new handshake."""
    kit = directory / "clients" / "ada"
    context = ssl.create_default_context(cafile=str(kit / "authority.pem"))
    context.load_cert_chain(kit / "tls.pem", kit / "tls.key")
    with socket.create_connection(("localhost", port)) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


@pytest.mark.parametrize("uploaded", [False, True], ids=["before any upload", "after some"])
def test_a_run_goes_on_while_all_of_it_is_changed(
    tmp_path: Path, uploaded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In round 2 the server gets another certificate, ben other keys, and eva leaves; then one goes back."""
    caplog.set_level(logging.INFO)
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", rounds=4))
    clients = fv.clients_of(directory, kind=HeldClient)
    held = fv.MEMBERS[:2] if uploaded else fv.MEMBERS
    old_roster = tmp_path / "roster-1.json"
    shutil.copyfile(directory / "roster.json", old_roster)
    old_ben = {name: (directory / "clients/ben" / name).read_bytes() for name in ("tls.key", "identity.key")}
    server = Server(directory / "server")
    with server.background() as port, running(directory, port, clients) as errors:
        for name, client in clients.items():
            if name not in held:
                client.learner.go.set()
            wait_until(client.learner.arrived.is_set)
        if uploaded:
            wait_until(lambda: sum("accepted" in line for line in caplog.messages) >= 8)
        before = shown_serial(directory, port)
        names = identity.certificate_names(identity.read_certificate(directory / "server/tls.pem"))
        consortium.approve(directory, [make_request(directory / "server", "vectors", hosts=names)])
        wait_until(lambda: shown_serial(directory, port) != before)

        builders.enrol_member(directory, "ben", replace=True)
        consortium.revoke_member(directory, "eva")
        wait_until(lambda: any("the roster has changed" in line for line in caplog.messages))
        newest = (directory / "server/roster.json").read_bytes()
        shutil.copyfile(old_roster, directory / "server/roster.json")
        wait_until(
            lambda: any("roster 1 of federation 'vectors' is older" in line for line in caplog.messages)
        )
        (directory / "server/roster.json").write_bytes(newest)
        for client in clients.values():
            client.learner.go.set()
    assert set(errors) == {"eva"}
    assert isinstance(errors["eva"], Refusal)
    assert errors["eva"].reason == "NOT_ON_ROSTER"
    for name, content in old_ben.items():
        assert (directory / "clients/ben" / name).read_bytes() != content
    assert "going on under roster 3" in caplog.text
    kept = kits.open_kit(directory / "server/state").roster
    assert (kept.serial, kept.hash) == (3, kits.open_kit(directory / "server").roster.hash)
    coordinator = fv.coordinator_of(directory)
    summary: Any = coordinator.summary()
    coordinator.close()
    assert [result["round"] for result in summary["results"]] == [1, 2, 3, 4]
    staying = sorted(fv.MEMBERS[:-1])
    assert summary["results"][2]["uploaded"] == summary["results"][3]["uploaded"] == staying
    assert summary["results"][3]["key_epoch"] > summary["results"][0]["key_epoch"]
    assert "going on with the connection of before" not in caplog.text


def test_a_client_takes_no_older_roster_and_no_other_terms_after_a_restart_either(tmp_path: Path) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask"))
    first = kits.open_kit(directory / "clients/ada").roster
    second = consortium.revoke_member(directory, "eva")
    looser = second.terms.model_copy(
        update={"adapter_privacy": second.terms.adapter_privacy.model_copy(update={"target_epsilon": 99.0})}
    )
    for attempt in range(2):
        state = ClientState(tmp_path / "state", "vectors", "ada")
        if attempt == 0:
            state.follow_roster(first)
            state.follow_roster(second)
        with pytest.raises(IdentityError, match="roster 1 of federation 'vectors' is older than roster 2"):
            state.follow_roster(first)
        with pytest.raises(IdentityError, match=r"has other terms than roster 2 \(adapter_privacy\)"):
            state.follow_roster(second.model_copy(update={"serial": 3, "terms": looser}))
        state.follow_roster(second)
        state.release()
