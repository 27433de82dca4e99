"""What a witness countersigns, and what it does not, upload by upload and row by row."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builders import founding, tiny_mechanism
from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.records import RoundContext, upload_header
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.consortium import approve, create
from fedmosaic.privacy.federation.kits import FederationConfig, WitnessEntry, open_kit
from fedmosaic.privacy.federation.requests import make_request
from fedmosaic.privacy.federation.roster import Member, Roster, RosterMark, Witness
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.federation.witness import WitnessBook
from fedmosaic.protos.errors import ConfigurationError, EncryptionError, IdentityError, StateError
from fedmosaic.protos.messages import SectionHeader, WeightRow
from fedmosaic.protos.witnessing import AggregateClaim, ReviewHeader, SignedUpload, Verdict

NAMES = ("ada", "ben", "cid", "dee", "eva")
RUN = "0" * 32
ROW = WeightRow(("ben", "cid", "dee"), (1536, 1280, 1280), 12)
TERMS = Terms.model_validate({"profile": tiny_mechanism(), "encryption": {"backend": "mask"}})
SIZE = TERMS.adapter.shared_dimensions


@dataclass
class Consortium:
    """A roster with keys at hand, and what its members upload."""

    directory: Path

    def __post_init__(self) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in (*NAMES, "notary")}
        public = {name: identity.public_hex(key.public_key()) for name, key in self.keys.items()}
        members = tuple(Member(id=n, identity_key=public[n], tls_key_sha256=public[n]) for n in NAMES)
        witness = Witness(id="notary", identity_key=public["notary"], tls_key_sha256=public["notary"])
        self.roster = Roster(
            federation="fed", serial=1, issued="now", members=members, terms=TERMS, witness=witness
        )
        self.book = self.again()

    def again(self) -> WitnessBook:
        """The witness after a restart."""
        return WitnessBook(self.roster, self.keys["notary"], self.directory, AuditLog(self.directory))

    def upload(
        self, name: str, number: int = 2, seed: int = 0, signer: str = ""
    ) -> tuple[SignedUpload, bytes]:
        context = RoundContext("fed", 1, number, "shared", SIZE)
        words = np.random.default_rng([NAMES.index(name), seed]).integers(0, 2**32, SIZE, dtype=np.uint32)
        payload = upload_header(TERMS.encryption, context, name).encode(bytes(16)) + words.tobytes()
        section = SectionHeader("shared", len(payload), hashlib.sha256(payload).digest())
        unsigned = SignedUpload(name, 1, (section,), b"", b"", b"", bytes(64))
        signature = self.keys[signer or name].sign(unsigned.digest("fed", RUN, number))
        return replace(unsigned, signature=signature), payload

    def uploads(self, number: int = 2) -> dict[str, tuple[SignedUpload, bytes]]:
        return {name: self.upload(name, number) for name in NAMES}

    def claim(
        self, uploads: Any, row: WeightRow = ROW, recipient: str = "ada", number: int = 2
    ) -> AggregateClaim:
        records = {name: payload for name, (_, payload) in uploads.items()}
        context = RoundContext("fed", 1, number, "shared", SIZE)
        aggregator = create_aggregator(TERMS.encryption, TERMS.policy)
        (made,) = aggregator.aggregate(records, {recipient: row}, context)
        return AggregateClaim(recipient, "shared", row, hashlib.sha256(made).digest())

    def judge(self, uploads: Any, *claims: AggregateClaim, number: int = 2) -> list[Verdict]:
        header = ReviewHeader(RUN, number, 1, len(uploads), len(claims))
        return self.book.judge(header, uploads, claims)


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


def refusal(verdicts: list[Verdict]) -> str:
    (verdict,) = verdicts
    assert verdict.signature == b""
    return verdict.refusal


def test_what_is_right_is_countersigned_again_and_again(consortium: Consortium) -> None:
    uploads = consortium.uploads()
    claims = [
        consortium.claim(uploads),
        consortium.claim(uploads, replace(ROW, contributors=("ada", "cid", "dee")), "ben"),
    ]
    first = consortium.judge(uploads, *claims)
    assert [bool(verdict.signature) for verdict in first] == [True, True]
    consortium.book = consortium.again()
    assert consortium.judge(uploads, *claims) == first


def test_an_upload_of_a_member_that_was_not_drawn_does_not_count(consortium: Consortium) -> None:
    schedule = TERMS.schedule.model_copy(update={"sampled_clients": 4})
    terms = TERMS.model_copy(update={"schedule": schedule})
    consortium.roster = consortium.roster.model_copy(update={"terms": terms})
    consortium.book = consortium.again()
    drawn = sorted(consortium.roster.taking_part(RUN, 2))
    (away,) = set(NAMES) - set(drawn)
    uploads = consortium.uploads()
    good, bad = replace(ROW, contributors=tuple(drawn[1:])), replace(ROW, contributors=(*drawn[:2], away))
    assert consortium.judge(uploads, consortium.claim(uploads, good, drawn[0]))[0].signature
    assert refusal(consortium.judge(uploads, consortium.claim(uploads, bad, drawn[3]))) == (
        f"the upload of {away!r} does not count: others were drawn to take part in round 2"
    )


def test_an_upload_that_its_client_has_not_signed_for_this_round(consortium: Consortium) -> None:
    uploads = consortium.uploads()
    claim = consortium.claim(uploads)
    payload = bytearray(uploads["ben"][1])
    payload[-1] ^= 1
    wrong: dict[str, tuple[Any, str]] = {
        "another's signature": (consortium.upload("ben", signer="eva"), "is not signed by the identity key"),
        "the last round's": (consortium.upload("ben", number=1), "is not signed by the identity key"),
        "an altered word": ((uploads["ben"][0], bytes(payload)), "is not the one that was signed"),
        "a lost end": ((uploads["ben"][0], payload[:-4]), "is not the one that was signed"),
        "another key epoch": ((replace(uploads["ben"][0], key_epoch=2), b""), "is not signed"),
    }
    for upload, words in wrong.values():
        found = refusal(consortium.judge(uploads | {"ben": upload}, claim))
        assert found.startswith("the upload of 'ben' does not count: ")
        assert words in found
    without = {name: upload for name, upload in uploads.items() if name != "ben"}
    assert refusal(consortium.judge(without, claim)) == "there is no shared section of 'ben' in this round"
    assert consortium.judge(uploads, claim)[0].signature


def test_a_row_that_the_policy_forbids_is_not_countersigned(consortium: Consortium) -> None:
    uploads = consortium.uploads()
    claim = consortium.claim(uploads)
    rows = {
        "above the cap": replace(ROW, weights=(2049, 1024, 1023)),
        "own weight must be 0": replace(ROW, contributors=("ada", "cid", "dee")),
        "outside the roster: notary": replace(ROW, contributors=("notary", "cid", "dee")),
    }
    for words, row in rows.items():
        assert words in refusal(consortium.judge(uploads, replace(claim, row=row)))
    assert "is not on the roster" in refusal(consortium.judge(uploads, replace(claim, recipient="notary")))
    members = tuple(m.model_copy(update={"family": m.id[0]}) for m in consortium.roster.members)
    consortium.roster = consortium.roster.model_copy(update={"members": members})
    consortium.book = consortium.again()
    assert "names members of others: ben, cid, dee" in refusal(consortium.judge(uploads, claim))
    family = replace(claim, section="family")
    assert refusal(consortium.judge(uploads, family)) == "'ada' shares no family section"


def test_asked_twice_it_gives_no_second_answer(consortium: Consortium) -> None:
    """Another row for one recipient, or another signed upload of a client that helps the server."""
    uploads = consortium.uploads()
    assert consortium.judge(uploads, consortium.claim(uploads))[0].signature
    consortium.book = consortium.again()
    other = replace(ROW, weights=(1280, 1536, 1280))
    said = refusal(consortium.judge(uploads, consortium.claim(uploads, other)))
    assert said == "another row of this recipient and round was judged before"
    changed = uploads | {"ben": consortium.upload("ben", seed=1)}
    said = refusal(consortium.judge(changed, consortium.claim(changed)))
    assert said == "the upload of 'ben' does not count: another upload of this round was judged before"
    both = consortium.claim(uploads), consortium.claim(uploads, other)
    assert [bool(verdict.signature) for verdict in consortium.judge(uploads, *both)] == [True, False]


def test_a_round_that_is_over_is_not_judged_again(consortium: Consortium) -> None:
    later = consortium.uploads(3)
    consortium.judge(later, consortium.claim(later, number=3), number=3)
    before = consortium.uploads(2)
    with pytest.raises(StateError, match=r"round 2 of run 0+ is to be judged after round 3"):
        consortium.judge(before, consortium.claim(before))


def test_sizes_are_known_before_a_byte_is_taken(consortium: Consortium) -> None:
    signed, payload = consortium.upload("ada")
    consortium.book.check_size(signed)
    large = SectionHeader("shared", 2**40, bytes(32))
    for sections in ((large,), signed.sections * 2):
        with pytest.raises(EncryptionError, match=f"bytes, expected ({len(payload)}|0)"):
            consortium.book.check_size(replace(signed, sections=sections))
    with pytest.raises(IdentityError, match="'notary' is not on the roster"):
        consortium.book.check_size(replace(signed, client="notary"))


def test_a_witness_is_founded_rotated_and_never_a_member(tmp_path: Path) -> None:
    config = founding().model_dump() | {"witness": {"id": "notary", "seconds": 30.0}}
    with pytest.raises(ValueError, match="member id a appears more than once"):
        FederationConfig.model_validate(config | {"witness": {"id": "a"}})
    plain = {"encryption": {"backend": "plain"}, "allow_plaintext": True, "adapter": {"protection": "none"}}
    terms = config["terms"] | plain
    with pytest.raises(ValueError, match="no witness can recompute bit for bit"):
        FederationConfig.model_validate(config | {"terms": terms})
    directory = tmp_path / "f"
    create(FederationConfig.model_validate(config), directory)
    kit = directory / "clients" / "notary"
    before = open_kit(kit)
    assert before.member_id() == "notary"
    assert before.roster.witness is not None
    assert (before.roster.witness.id, before.roster.witness.seconds) == ("notary", 30.0)
    with pytest.raises(IdentityError, match="'notary' is not on the roster"):
        before.roster.member("notary")
    renewed = make_request(kit, "clinics", "notary")
    with pytest.raises(ConfigurationError, match="'notary' has other keys already"):
        approve(directory, [renewed])
    approve(directory, [renewed], replace=True)
    after = open_kit(kit).roster
    assert after.witness is not None
    assert after.witness.identity_key == renewed.identity_key
    assert (after.witness.seconds, after.members) == (30.0, before.roster.members)
    RosterMark.of(before.roster).check(after)
    without = after.model_copy(update={"witness": None, "serial": after.serial + 1})
    with pytest.raises(IdentityError, match=r"has other terms than roster 2 \(witness\)"):
        RosterMark.of(after).check(without)


def test_a_roster_without_a_witness_keeps_its_hash() -> None:
    members = tuple(
        Member(id=n, identity_key=f"{i:064x}", tls_key_sha256=f"{i:064x}") for i, n in enumerate("abcd")
    )
    roster = Roster(federation="fed", serial=1, issued="now", members=members, terms=TERMS)
    assert b"witness" not in roster._canonical()
    named = Witness(id="w", identity_key="a" * 64, tls_key_sha256="b" * 64)
    assert roster.model_copy(update={"witness": named}).hash != roster.hash
    assert WitnessEntry(id="w").seconds == named.seconds
