"""Federations on disk: kits, rosters, and every way they can be wrong."""

import contextlib
import datetime as dt
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders
from builders import enrol_member, founding, tiny_mechanism
from fedmosaic.privacy.configuration import read_configuration, validate
from fedmosaic.privacy.federation import consortium, identity
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.roster import Roster, taking_part
from fedmosaic.privacy.federation.terms import AdapterTerms, RelevanceTerms, Terms
from fedmosaic.privacy.mechanism.profile import Reduction
from fedmosaic.protos.errors import ConfigurationError, IdentityError, WireError
from fedmosaic.protos.messages import Enrolment
from fedmosaic.server.settings import settings_from_kit

PROFILE = tiny_mechanism()
TOO_LONG = Reduction(hidden_size=1024, intermediate_size=512, projection_dimensions=2**17)
SUMS = {
    "adapter": {"protection": "distributed-dp"},
    "adapter_privacy": {"steps_per_round": 1},
    "encryption": {"backend": "plain"},
}
ALIGNED = "aligned:" + "0" * 32


@pytest.fixture
def made(tmp_path: Path) -> Path:
    place = tmp_path / "federation"
    consortium.create(founding(), place)
    return place


def test_no_kit_holds_the_keys_of_another_party(made: Path) -> None:
    secrets = {p.relative_to(made) for p in made.rglob("*.key")}
    expected = {Path("consortium/authority.key"), Path("consortium/roster.key"), Path("server/tls.key")}
    for client in "abcd":
        expected |= {Path(f"clients/{client}/tls.key"), Path(f"clients/{client}/identity.key")}
    assert secrets == expected


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX notion")
def test_private_keys_are_readable_by_their_owner_only(made: Path) -> None:
    for path in made.rglob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    loose = made / "clients" / "a" / "identity.key"
    loose.chmod(0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        federation.open_kit(made / "clients" / "a").signing_key()


def test_a_changed_roster_is_refused(made: Path) -> None:
    path = made / "clients" / "a" / "roster.json"
    content = json.loads(path.read_text())
    content["terms"]["policy"]["minimum_contributors"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(IdentityError, match="not signed by the consortium key"):
        federation.open_kit(made / "clients" / "a")


def test_a_certificate_of_another_federation_is_refused(made: Path) -> None:
    authority = identity.create_authority("banks")
    tls = builders.issue_client(authority, "banks", "a")
    (made / "clients" / "a" / "tls.pem").write_bytes(tls.certificate_pem)
    with pytest.raises(IdentityError, match="'banks'"):
        federation.open_kit(made / "clients" / "a").member_id()


def test_adding_and_revoking_changes_the_roster_hash_and_serial(made: Path) -> None:
    before = federation.open_kit(made / "server").roster
    with pytest.raises(ConfigurationError, match="has other keys already"):
        enrol_member(made, "a")
    added = enrol_member(made, "e")
    assert federation.open_kit(made / "clients" / "e").member_id() == "e"
    revoked = consortium.revoke_member(made, "e")
    assert [before.serial, added.serial, revoked.serial] == [1, 2, 3]
    assert len({before.hash, added.hash, revoked.hash}) == 3
    assert all(m.id != "e" for m in revoked.members)


def test_too_few_members_for_the_policy_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="name at least 4"):
        founding("a", "b", "c")
    policy = {"minimum_contributors": 2, "squares_cap": 0.5}
    with pytest.raises(ValueError, match="3 members agree on no group key, which 4 at least must hold"):
        founding("a", "b", "c", policy=policy)
    plain: dict[str, Any] = {"adapter": {"protection": "dp"}, "encryption": {"backend": "plain"}}
    plain |= {"allow_plaintext": True}
    assert len(founding("a", "b", "c", policy=policy, schedule={"quorum": 3}, **plain).members) == 3


def test_as_few_members_as_the_policy_needs_are_warned_of() -> None:
    few, enough = founding(), founding("a", "b", "c", "d", "e")
    assert "one member that is away stops all exchange" in federation.fragile(few.members, few.terms)
    assert federation.fragile(enough.members, enough.terms) == ""
    split = [MemberEntry(id=f"m{i}", family="qwen" if i < 4 else "llama") for i in range(9)]
    assert "with 4 members in family 'qwen'" in federation.fragile(split, few.terms)


@pytest.mark.parametrize(("sampled", "warned"), [(6, True), (10, True), (11, False), (None, False)])
def test_a_draw_that_leaves_a_family_too_few_is_warned_of(sampled: int | None, warned: bool) -> None:
    members = [MemberEntry(id=f"m{i}", family="qwen" if i < 5 else "llama") for i in range(12)]
    plain = {"adapter": {"protection": "dp"}, "encryption": {"backend": "plain"}, "allow_plaintext": True}
    terms = Terms.model_validate({"profile": PROFILE, "schedule": {"sampled_clients": sampled}} | plain)
    words = federation.fragile(members, terms)
    assert ("fewer than 4 of family 'qwen' (5 in all)" in words) == warned
    assert ("sampled_clients = 11" in words) == warned
    if sampled == 6:
        draws = [taking_part(tuple(m.id for m in members), 6, "run", n) for n in range(2000)]
        found = sum(sum(m.id in draw for m in members[:5]) < 4 for draw in draws) / len(draws)
        percent = re.search(r"([\d.]+)%", words)
        assert percent is not None
        said = float(percent[1]) / 100
        assert abs(found - said) < 6 * math.sqrt(said * (1 - said) / len(draws))


@pytest.mark.parametrize(
    ("sizes", "changes", "problem"),
    [
        ((4, 3), {}, "family 'f1' has 3 of the 7 members"),
        ((4, 4), {}, ""),
        ((4, 3), {"relevance": {"across_families": True}}, ""),
        ((7, 5), SUMS | {"group_sums": {"groups": 2}}, "of fewer than 6 nobody receives anything"),
        ((7, 6), SUMS, "groups is 1 with members of 2 families"),
        ((7, 6), SUMS | {"group_sums": {"groups": 2}}, ""),
    ],
)
def test_families_that_could_not_exchange_are_not_founded(
    sizes: tuple[int, int], changes: dict[str, Any], problem: str
) -> None:
    terms = Terms.model_validate({"profile": PROFILE} | changes)
    members = tuple(
        MemberEntry(id=f"m{f}{i}", family=f"f{f}") for f, size in enumerate(sizes) for i in range(size)
    )
    config = FederationConfig(federation="clinics", members=members, terms=terms)
    if not problem:
        assert federation.lonely(members, terms) == ""
        return
    with pytest.raises(ConfigurationError, match=re.escape(problem)):
        consortium.planned(config)


@pytest.mark.parametrize(
    ("families", "basis", "warned"),
    [
        (("llama", "qwen", "llama", "llama"), "", "Align them once with `fedmosaic align`"),
        (("llama", "qwen", "llama", "llama"), ALIGNED, "with relevance.across_families = false"),
        (("llama",) * 4, "", ""),
        (("llama",) * 4, ALIGNED, ""),
        (("", "", "", ""), "", ""),
    ],
)
def test_architectures_that_may_not_understand_each_other_are_warned_of(
    families: tuple[str, ...], basis: str, warned: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    across = RelevanceTerms(across_families=True)
    terms = Terms(profile=PROFILE, adapter=AdapterTerms(basis=basis), relevance=across)
    members = tuple(MemberEntry(id=f"m{i}", family=family) for i, family in enumerate(families))
    founding = FederationConfig(federation="clinics", members=members, terms=terms)
    roster = consortium.create(founding, tmp_path / "federation")
    words = federation.unaligned(roster)
    assert warned in words
    assert ("2 families (llama, qwen)" in words) == (words != "") == (warned != "")
    settings_from_kit(tmp_path / "federation" / "server")
    assert (words in caplog.messages) == (warned != "")


def test_members_without_a_family_among_others_with_one_are_named(made: Path) -> None:
    roster = federation.open_kit(made / "server").roster
    assert federation.unaligned(roster) == ""
    named = tuple(member.model_copy(update={"family": "llama"}) for member in roster.members)
    mixed = roster.model_copy(update={"members": named + roster.members})
    assert federation.unaligned(mixed).startswith("a, b, c, d name no family where others do")


def test_nobody_is_revoked_without_whom_the_others_could_not_go_on(made: Path) -> None:
    before = (made / "roster.json").read_bytes()
    with pytest.raises(ConfigurationError, match=r"without 'd', 3 members cannot receive.*keys approve"):
        consortium.revoke_member(made, "d")
    assert (made / "roster.json").read_bytes() == before
    enrol_member(made, "e")
    assert len(consortium.revoke_member(made, "d").members) == 4


def test_a_quorum_holds_members_as_well(tmp_path: Path) -> None:
    consortium.create(founding(*"abcde", schedule={"quorum": 5}), tmp_path / "f")
    with pytest.raises(ConfigurationError, match=r"quorum is 5 with 4 members"):
        consortium.revoke_member(tmp_path / "f", "e")


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_privacy": {"clipping_norm": math.inf}},
        {"adapter_privacy": {"clipping_norm": 1e7}},
        {"adapter_privacy": {"clipping_norm": 1e-7}},
        {"adapter_privacy": {"target_epsilon": math.inf}},
        {"adapter_privacy": {"target_epsilon": 101.0}, "adapter": {"protection": "dp+encrypted"}},
        {"adapter": {"alpha": math.inf}},
        {"adapter": {"family_dimensions": {"llama": 0}}},
        {"adapter": {"family_dimensions": {"Llama 3 (1B)": 5}}},
        {"relevance": {"temperature": math.inf}},
        {"schedule": {"round_deadline_seconds": math.inf}},
        {"schedule": {"gathering_seconds": 1e10}},
        {"schedule": {"key_patience_seconds": math.nan}},
        {"profile": PROFILE.model_copy(update={"reduction": TOO_LONG})},
    ],
    ids=str,
)
def test_terms_that_nobody_could_run_are_refused_before_they_are_signed(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        validate({"profile": PROFILE} | changes, Terms, "terms")


@pytest.mark.parametrize(
    ("family", "fits"),
    [
        ("", True),
        ("Llama-3.2:1B/x_y", True),
        ("x" * 128, True),
        ("Llama 3 (1B)", False),
        ("-x", False),
        ("x\n", False),
        ("x" * 129, False),
    ],
)
def test_a_family_is_named_as_the_wire_carries_it(family: str, fits: bool) -> None:
    with contextlib.nullcontext() if fits else pytest.raises(WireError):
        Enrolment(1, "f", bytes(32), bytes(32), family, "")
    with contextlib.nullcontext() if fits else pytest.raises(ConfigurationError, match="family"):
        validate({"id": "a", "family": family}, MemberEntry, "member")


def test_two_members_with_one_identity_key_are_refused(made: Path) -> None:
    roster = federation.open_kit(made / "server").roster
    content = roster.model_dump()
    content["members"][0]["identity_key"] = content["members"][1]["identity_key"]
    with pytest.raises(ValueError, match=r"identity key .* appears more than once"):
        Roster.model_validate(content)


def test_certificates_carry_the_strict_usages() -> None:
    from cryptography import x509

    authority = identity.create_authority("clinics")
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    client = x509.load_pem_x509_certificate(
        builders.issue_client(authority, "clinics", "a", now).certificate_pem
    )
    usage = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [u.dotted_string for u in usage] == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH.dotted_string]
    assert client.not_valid_after_utc == now + dt.timedelta(days=identity.CERTIFICATE_DAYS)
    assert not client.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_encryption_and_protection_have_to_agree() -> None:
    for protection, backend, allow, fits in [
        ("encrypted", "plain", True, False),
        ("none", "ckks", False, False),
        ("none", "plain", False, False),
        ("none", "plain", True, True),
        ("dp+encrypted", "mask", False, True),
    ]:
        data = {
            "profile": PROFILE,
            "adapter": {"protection": protection},
            "encryption": {"backend": backend},
            "allow_plaintext": allow,
        }
        if fits:
            Terms.model_validate(data)
        else:
            with pytest.raises(ValueError, match="plain"):
                Terms.model_validate(data)


def test_an_unknown_key_names_its_nearest_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text('federation = "x"\n[[members]]\nid = "a"\nfamly = "llama"\n')
    with pytest.raises(ConfigurationError, match=r"did you mean .family.") as error:
        read_configuration(path, FederationConfig)
    assert "terms: missing" in str(error.value)


def test_the_hash_ignores_the_signature_and_nothing_else(made: Path) -> None:
    roster = federation.open_kit(made / "server").roster
    assert roster.signed(Ed25519PrivateKey.generate()).hash == roster.hash
    changed = roster.model_copy(update={"issued": "2020-01-01"})
    assert changed.hash != roster.hash
