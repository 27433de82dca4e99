"""Keys made at home: requests, what the consortium signs, what a member installs; and who cheats where."""

import datetime as dt
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import builders
from builders import founding
from fedmosaic.privacy.federation import consortium, identity, kits
from fedmosaic.privacy.federation.install import consortium_fingerprint, install
from fedmosaic.privacy.federation.office import Office, open_office
from fedmosaic.privacy.federation.requests import (
    KeyRequest,
    fingerprint,
    make_request,
    member_fingerprint,
    read_request,
)
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError, IdentityError

MEMBERS = "abcd"
WORDS = "correct horse battery"


class Founding:
    """A founding on six machines: a folder for each."""

    def __init__(self, place: Path, requests: dict[str, KeyRequest]) -> None:
        self.place, self.office, self.requests = place, place / "office", requests

    def ask(self, name: str, kit: str = "", **changes: Any) -> KeyRequest:
        hosts = ("fl.example.org",) if not name else ()
        fields: dict[str, Any] = {"federation": "clinics", "member": name, "hosts": hosts} | changes
        return make_request(self.kit(kit or name), **fields)

    def kit(self, name: str) -> Path:
        return self.place / (name or "server")

    def approve(self, *requests: KeyRequest, **options: Any) -> consortium.Approval:
        return consortium.approve(self.office, requests, **options)

    def found(self) -> dict[str, Path]:
        return self.approve(*self.requests.values(), self.ask("")).answers

    def install(self, name: str, answer: Path | None = None) -> kits.Kit:
        folder = answer or self.office / "answers" / (f"clients/{name}" if name else "server")
        return install(folder, self.kit(name), confirm=lambda shown: None)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Founding, Founding]:
    """One that has begun, with all requests there, and one that is done and installed."""
    begun = Founding(tmp_path_factory.mktemp("begun"), {})
    consortium.begin(founding(*MEMBERS, "e"), begun.office, None)
    begun.requests |= {name: begun.ask(name) for name in (*MEMBERS, "e")}
    done = copied(begun, tmp_path_factory.mktemp("founded"))
    for name in done.found():
        done.install(name)
    return begun, done


def copied(made: Founding, place: Path) -> Founding:
    shutil.copytree(made.place, place, dirs_exist_ok=True)
    return Founding(place, dict(made.requests))


@pytest.fixture
def begun(templates: tuple[Founding, Founding], tmp_path: Path) -> Founding:
    return copied(templates[0], tmp_path)


@pytest.fixture
def founded(templates: tuple[Founding, Founding], tmp_path: Path) -> Founding:
    return copied(templates[1], tmp_path)


def secrets(place: Path) -> set[bytes]:
    return {path.read_bytes() for path in place.rglob("*.key")}


def write(path: Path, request: KeyRequest, **changes: object) -> Path:
    path.write_text(json.dumps(request.model_dump() | changes))
    return path


def test_a_federation_is_founded_and_no_private_key_leaves_home(founded: Founding) -> None:
    roster = kits.open_kit(founded.kit("a")).roster
    assert [member.id for member in roster.members] == [*MEMBERS, "e"]
    at_home = {name: secrets(founded.kit(name)) for name in ("", *MEMBERS, "e")}
    assert [len(keys) for keys in at_home.values()] == [1, 2, 2, 2, 2, 2]
    office = b"".join(path.read_bytes() for path in founded.office.rglob("*") if path.is_file())
    for keys in at_home.values():
        for pem in keys:
            assert pem.splitlines()[1] not in office
    for name in MEMBERS:
        kit = kits.open_kit(founded.kit(name))
        member = roster.member(kit.member_id())
        assert member.id == name
        assert identity.public_hex(kit.signing_key().public_key()) == member.identity_key
        identity.check_pair(kit.tls_certificate, kit.tls_key)
        request = founded.requests[name]
        pinned = member_fingerprint("clinics", name, member.identity_key, member.tls_key_sha256)
        assert pinned == request.fingerprint
        assert not (kit.directory / kits.PENDING).exists()


def test_the_roster_waits_for_all_members_and_names_them(begun: Founding) -> None:
    early = begun.approve(begun.requests["a"], begun.requests["b"])
    assert (early.roster, early.answers, early.waiting) == (None, {}, ("c", "d", "e", "(server)"))
    last = begun.approve(*(begun.requests[name] for name in "cde"))
    assert last.waiting == ("(server)",)
    assert set(last.answers) == {"", *MEMBERS, "e"}
    assert not (last.answers[""] / kits.TLS_CERTIFICATE).exists()
    server = begun.approve(begun.ask(""))
    assert (list(server.answers), server.waiting) == ([""], ())
    assert server.roster == last.roster
    begun.install("")
    assert (begun.kit("") / kits.SERVER_SETTINGS).read_text().startswith("# The server's")


def forge(founded: Founding, answer: Path, a: dict[str, Any] | None = None, **changes: Any) -> Office:
    """What a founder can sign who cheats: the roster with changes, and with others to its member a."""
    office = open_office(founded.office, None)
    assert office.roster is not None
    members = [dict(m) | (a or {} if m.id == "a" else {}) for m in office.roster.members]
    content = office.roster.model_dump() | {"members": members} | changes
    Roster.model_validate(content).signed(office.authority.signing_key).write(answer / kits.ROSTER)
    return office


def swapped(founded: Founding, answer: Path, what: str) -> None:
    """What a founder does who would be member a: other keys in a's answer, all of it signed."""
    own = founded.ask("a", kit="false-a")
    office = forge(founded, answer, {what: getattr(own, what)}, serial=2)
    if what == "tls_key_sha256":
        pem = identity.certify_client(office.authority, own.tls_key, "clinics", "a")
        (answer / kits.TLS_CERTIFICATE).write_bytes(pem)


@pytest.mark.parametrize("what", ["identity_key", "tls_key_sha256"])
@pytest.mark.parametrize("first", [True, False], ids=["first installation", "new roster"])
def test_a_founder_that_swaps_a_key_is_noticed_at_installation(
    begun: Founding, what: str, first: bool
) -> None:
    answer = begun.found()["a"]
    if not first:
        begun.install("a")
    swapped(begun, answer, what)
    before = {path: path.read_bytes() for path in begun.kit("a").rglob("*") if path.is_file()}
    with pytest.raises(IdentityError, match=r"is not one that was made here.*could pose as you"):
        begun.install("a")
    assert {path: path.read_bytes() for path in begun.kit("a").rglob("*") if path.is_file()} == before


def test_a_key_of_another_member_is_not_installed_as_ones_own(begun: Founding) -> None:
    answers = begun.found()
    with pytest.raises(IdentityError, match="certificate is not one that was made here"):
        begun.install("a", answers["b"])
    with pytest.raises(IdentityError, match="certificate is not one that was made here"):
        begun.install("a", answers[""])


def test_a_member_whose_name_was_changed_notices(begun: Founding) -> None:
    """The founder signs a's very keys under another name."""
    answer = begun.found()["a"]
    office = forge(begun, answer, {"id": "z"})
    pem = identity.certify_client(office.authority, begun.requests["a"].tls_key, "clinics", "z")
    (answer / kits.TLS_CERTIFICATE).write_bytes(pem)
    with pytest.raises(IdentityError, match=r"answer is for member 'z'.*request was for member 'a'"):
        begun.install("a")


def test_another_consortium_is_noticed_by_its_fingerprint_and_later_by_its_keys(
    begun: Founding, tmp_path: Path
) -> None:
    """Somebody in the middle runs a consortium of the same name and signs the true requests."""
    begun.found()
    consortium.begin(founding(*MEMBERS, "e"), tmp_path / "false", None)
    false = consortium.approve(tmp_path / "false", list(begun.requests.values())).answers["a"]
    shown = consortium_fingerprint(begun.office)

    def compare(heard: str) -> None:
        if heard != shown:
            raise IdentityError("not what was read")

    with pytest.raises(IdentityError, match="not what was read"):
        install(false, begun.kit("a"), compare)
    install(begun.office / "answers/clients/a", begun.kit("a"), compare)
    with pytest.raises(IdentityError, match=f"another consortium.*, not {shown}"):
        begun.install("a", false)


def test_an_older_roster_is_refused_and_so_is_a_second_one_of_a_serial(
    founded: Founding, tmp_path: Path
) -> None:
    first = shutil.copytree(founded.office / "answers/clients/a", tmp_path / "first")
    consortium.revoke_member(founded.office, "e")
    founded.install("a")
    with pytest.raises(IdentityError, match=r"roster 1 of federation 'clinics' is older than roster 2"):
        founded.install("a", first)
    forge(founded, founded.office / "answers/clients/a", issued="2030-01-01")
    with pytest.raises(IdentityError, match="the consortium has signed two"):
        founded.install("a")


def test_terms_that_were_changed_afterwards_are_refused_by_name(founded: Founding) -> None:
    signed = open_office(founded.office, None).roster
    assert signed is not None
    terms = signed.terms.model_dump()
    terms["adapter_privacy"]["target_epsilon"] = 50.0
    forge(founded, founded.office / "answers/clients/a", serial=2, terms=terms)
    with pytest.raises(IdentityError, match=r"has other terms than roster 1 \(adapter_privacy\)"):
        founded.install("a")


def test_a_request_cannot_be_replayed_for_another_name(begun: Founding, tmp_path: Path) -> None:
    for changes in ({"id": "b"}, {"federation": "banks"}, {"family": "llama"}, {"signature": "0" * 128}):
        with pytest.raises(IdentityError, match=r"request of member '[ab]'"):
            read_request(write(tmp_path / "r.json", begun.requests["a"], **changes))
    with pytest.raises(ConfigurationError, match="is for federation 'banks', this is 'clinics'"):
        begun.approve(begun.ask("a", kit="elsewhere", federation="banks"))
    with pytest.raises(ConfigurationError, match=r"names no member 'z'.*it names a, b, c, d, e"):
        begun.approve(begun.ask("z"))


def test_a_foreign_csr_is_no_part_of_a_request(begun: Founding, tmp_path: Path) -> None:
    """B claims a's TLS key: by a's own CSR, or by one for b that a's key has not signed."""
    a, b = begun.requests["a"], begun.requests["b"]
    key = identity.read_signing_key(begun.kit("b") / kits.PENDING / kits.IDENTITY_KEY)

    def signed(csr: str) -> Path:
        draft = b.model_copy(update={"csr": csr, "signature": ""})
        return write(tmp_path / "r.json", draft, signature=key.sign(draft.content).hex())

    with pytest.raises(IdentityError, match=r"its CSR is for .*client/a'"):
        read_request(signed(a.csr))
    forged = x509.load_pem_x509_csr(b.csr.encode()).public_bytes(serialization.Encoding.DER)
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    forged = forged.replace(b.tls_key.public_bytes(*spki), a.tls_key.public_bytes(*spki))
    pem = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(IdentityError, match="not signed by the key in it"):
        read_request(signed(pem))
    other = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    weak = other.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    with pytest.raises(IdentityError, match="no valid request of member 'b'"):
        read_request(signed(weak.public_bytes(serialization.Encoding.PEM).decode()))


def test_two_requests_of_one_name_and_copied_keys_sign_nothing(begun: Founding) -> None:
    with pytest.raises(ConfigurationError, match="two requests of member 'a'"):
        begun.approve(begun.requests["a"], begun.ask("a", kit="second-a"))
    # e takes the keys of d, which it could only prove if it held them.
    pending = begun.kit("e") / kits.PENDING
    stolen = begun.requests["d"].model_copy(update={"id": "e"})
    with pytest.raises(IdentityError, match="request of member 'e'"):
        begun.approve(stolen)
    assert pending.exists()
    assert not (begun.office / "consortium" / "approved").exists()


def test_new_keys_need_a_word_and_old_ones_never_come_back(founded: Founding) -> None:
    new = founded.ask("a")
    with pytest.raises(ConfigurationError, match="member 'a' has other keys already"):
        founded.approve(new)
    with pytest.raises(IdentityError, match="waits for its answer"):
        founded.ask("a")
    roster = founded.approve(new, replace=True).roster
    assert roster is not None
    assert roster.serial == 2
    with pytest.raises(IdentityError, match="given up before"):
        founded.approve(founded.requests["a"], replace=True)
    kit = founded.install("a")
    assert identity.public_hex(kit.signing_key().public_key()) == roster.member("a").identity_key
    consortium.revoke_member(founded.office, "e")
    with pytest.raises(IdentityError, match="given up before"):
        founded.approve(founded.requests["e"])
    added = founded.approve(founded.ask("e", kit="new-e")).roster
    assert added is not None
    assert [added.serial, len(added.members)] == [4, 5]


def test_a_request_that_was_signed_before_renews_the_certificate_and_nothing_else(founded: Founding) -> None:
    before = (founded.kit("a") / kits.TLS_CERTIFICATE).read_bytes()
    approval = founded.approve(read_request(founded.kit("a") / kits.REQUEST))
    assert approval.roster is not None
    assert approval.roster.serial == 1
    founded.install("a")
    assert (founded.kit("a") / kits.TLS_CERTIFICATE).read_bytes() != before


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/etc", "..", "A", "a\n", "a" * 64, "a\0"])
def test_a_name_that_is_a_path_is_no_name(begun: Founding, tmp_path: Path, name: str) -> None:
    with pytest.raises(FedMosaicError, match="id"):
        read_request(write(tmp_path / "r.json", begun.requests["a"], id=name))
    with pytest.raises(ConfigurationError, match="id"):
        begun.ask(name, kit="k")
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 60_000, b"\xff", b'{"a": NaN}', b" " * (1 << 16) + b"{}"], ids=range(6)
)
def test_what_is_no_request_is_named_and_read_within_bounds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"r\.json"):
        read_request(path)
    with pytest.raises(ConfigurationError, match="no file"):
        read_request(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="pipes with a name are a POSIX notion")
def test_an_answer_that_is_huge_or_no_file_is_not_read(begun: Founding, tmp_path: Path) -> None:
    answer = begun.found()["a"]
    for name in (kits.ROSTER, kits.TLS_CERTIFICATE, kits.AUTHORITY_CERTIFICATE, kits.CONSORTIUM_KEY):
        copy = shutil.copytree(answer, tmp_path / f"huge-{name}")
        with (copy / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ConfigurationError, match=f"{name} has more than .* bytes"):
            begun.install("a", copy)
    (answer / kits.ROSTER).unlink()
    os.mkfifo(answer / kits.ROSTER)
    with pytest.raises(ConfigurationError, match=r"roster\.json: no file"):
        begun.install("a")


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[], None]:
    """Let the process end at one of the renamings of files."""
    replace, calls = Path.replace, [0]

    def counted(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    return monkeypatch.undo


@pytest.mark.parametrize("call", range(1, 8))
def test_an_installation_that_was_stopped_is_finished_by_doing_it_again(
    founded: Founding, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    founded.approve(founded.ask("a"), replace=True)
    undo = stop_at(monkeypatch, call)
    with pytest.raises(KeyboardInterrupt):
        founded.install("a")
    undo()
    kit = founded.install("a")
    assert kit.roster.serial == 2
    assert identity.public_hex(kit.signing_key().public_key()) == kit.roster.member("a").identity_key
    identity.check_pair(kit.tls_certificate, kit.tls_key)
    assert not (kit.directory / kits.PENDING).exists()


def test_the_consortium_signs_with_its_passphrase_only(tmp_path: Path) -> None:
    office = tmp_path / "office"
    consortium.begin(founding(*MEMBERS), office, WORDS)
    for path in (office / "consortium").glob("*.key"):
        assert b"ENCRYPTED" in path.read_bytes()
        with pytest.raises(IdentityError, match="passphrase is not the right one"):
            identity.read_private_key(path)
    request = make_request(tmp_path / "a", "clinics", "a")
    for passphrase, words in ((None, "none was given"), (f"{WORDS} ", "passphrase is not the right one")):
        with pytest.raises(IdentityError, match=words):
            consortium.approve(office, [request], passphrase)
    assert consortium.approve(office, [request], WORDS).waiting == ("b", "c", "d", "(server)")


def test_fingerprints_differ_with_every_part() -> None:
    parts = ["clinics", "a", "0" * 64, "1" * 64]
    changed = [[*parts[:i], "z" + part[1:], *parts[i + 1 :]] for i, part in enumerate(parts)]
    shown = {member_fingerprint(*each) for each in [parts, *changed]}
    assert len(shown) == 5
    assert all(len(digits) == 23 and digits.replace(" ", "").isdecimal() for digits in shown)
    assert fingerprint("a", "bc") != fingerprint("ab", "c")


def test_certificates_are_announced_in_their_last_fortnight() -> None:
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    assert identity.expires_soon(now + dt.timedelta(days=14, seconds=1), now) == ""
    assert "expires in 13 days" in identity.expires_soon(now + dt.timedelta(days=13, hours=23), now)
    assert "expired on 2029-12-31" in identity.expires_soon(now - dt.timedelta(hours=1), now)


def test_an_expired_certificate_is_not_installed(begun: Founding) -> None:
    answer = begun.found()["a"]
    office = open_office(begun.office, None)
    then = dt.datetime.now(dt.UTC) - dt.timedelta(days=91)
    pem = identity.certify_client(office.authority, begun.requests["a"].tls_key, "clinics", "a", now=then)
    (answer / kits.TLS_CERTIFICATE).write_bytes(pem)
    with pytest.raises(IdentityError, match="expired on"):
        begun.install("a")


def test_a_demo_federation_makes_room_for_members_with_keys_of_their_own(tmp_path: Path) -> None:
    place = tmp_path / "f"
    consortium.create(founding(*MEMBERS), place)
    assert not (place / "answers").exists() or not any((place / "answers").rglob("*.json"))
    home = make_request(tmp_path / "home", "clinics", "e")
    answer = consortium.approve(place, [home]).answers["e"]
    install(answer, tmp_path / "home", None)
    assert kits.open_kit(place / "clients/a").roster == kits.open_kit(tmp_path / "home").roster
    builders.enrol_member(place, "b", replace=True)
    assert kits.open_kit(place / "server").roster.serial == 3
