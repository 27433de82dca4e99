"""The witness of a federation: recomputes aggregates from signed uploads, bit for bit, and countersigns them.

It holds no group key. The arithmetic of `ckks` and `mask` is that of integers, so whoever has the uploads and
a row gets the aggregate's very bytes. One set of uploads and one row per recipient and round count: they are
on the disk before the first signature leaves, so that asking twice gives no second answer.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext, row_digest, upload_payload_bytes
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.policy import check_row
from fedmosaic.protos import bounds, witnessing
from fedmosaic.protos.errors import EncryptionError, IdentityError, PolicyError, StateError
from fedmosaic.protos.messages import SectionName
from fedmosaic.protos.signing import verify_digest
from fedmosaic.protos.witnessing import AggregateClaim, ReviewHeader, Verdict

log = logging.getLogger(__name__)
_ROWS_AT_ONCE: Final = 64
"""Bounds the memory of the recomputed aggregates."""
_OTHER_SUM: Final = "the aggregate is not this row applied to the signed uploads"
Uploads = Mapping[str, tuple[witnessing.SignedUpload, bytes | bytearray]]
"""What every client has signed, and its payload."""


class _WrongError(Exception):
    """Why a claim is not countersigned: what is wrong ("upload", "row" or "sum"), and in words."""


class _Checked(NamedTuple):
    """An upload that its client has signed for this round: content hash, and sections by their label."""

    content: bytes
    sections: Mapping[str, memoryview]


class WitnessBook:
    """What a witness has judged; one process at a time holds its directory."""

    def __init__(self, roster: Roster, key: Ed25519PrivateKey, directory: Path, audit: AuditLog) -> None:
        self._roster = roster
        self._key = key
        self._directory = directory
        self._audit = audit
        self._aggregator = create_aggregator(roster.terms.encryption, roster.terms.policy)

    def sections(self, client: str) -> dict[SectionName, tuple[str, int]]:
        """Label and length of the vectors that a member shares; IdentityError if it is none."""
        member, adapter = self._roster.member(client), self._roster.terms.adapter
        found: dict[SectionName, tuple[str, int]] = {"shared": ("shared", adapter.shared_dimensions)}
        if member.family in adapter.family_dimensions:
            label = f"family:{member.family}"
            found["family"] = (label, adapter.family_dimensions[member.family])
        return found

    def check_size(self, signed: witnessing.SignedUpload) -> None:
        """Refuse, before a byte of it is taken, an upload that no member could have made."""
        expected, parameters = self.sections(signed.client), self._roster.terms.encryption
        for section in signed.sections:
            _, length = expected.pop(section.name, ("", 0))
            size = HEADER_BYTES + upload_payload_bytes(parameters, length) if length else 0
            if section.size != size:
                raise EncryptionError(
                    f"section {section.name!r} of {signed.client!r} has {section.size} bytes, expected {size}"
                )

    def judge(
        self, header: ReviewHeader, uploads: Uploads, claims: Sequence[AggregateClaim]
    ) -> list[Verdict]:
        """Judge every claim of a closed round, in order; StateError if a later round was judged before."""
        pins = self._pins(header)
        checked, problems = self._check_uploads(header, uploads, pins["uploads"])
        contexts: dict[int, RoundContext] = {}
        wrong: dict[int, _WrongError] = {}
        for index, claim in enumerate(claims):
            try:
                contexts[index] = self._check_claim(header, claim, checked, problems, pins["rows"])
            except _WrongError as error:
                wrong[index] = error
        write_atomically(self._path(header.run_id), json.dumps(pins).encode())
        for context in set(contexts.values()):
            label, rows = context.section, [i for i, other in contexts.items() if other == context]
            records = {n: c.sections[label] for n, c in checked.items() if label in c.sections}
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                named = {claims[i].recipient: claims[i].row for i in some}
                made = zip(named, self._aggregator.aggregate(records, named, context), strict=True)
                digests = {recipient: hashlib.sha256(payload).digest() for recipient, payload in made}
                for index in some:
                    if digests[claims[index].recipient] != claims[index].sha256:
                        wrong[index] = _WrongError("sum", _OTHER_SUM)
        hashes = {client: upload.content for client, upload in checked.items()}
        return [
            self._refuse(header, claim, *wrong[index].args)
            if index in wrong
            else self._sign(
                contexts[index], header.run_id, claim, witnessing.uploads_digest(claim.row, hashes)
            )
            for index, claim in enumerate(claims)
        ]

    def _check_uploads(
        self, header: ReviewHeader, uploads: Uploads, pinned: dict[str, str]
    ) -> tuple[dict[str, _Checked], dict[str, str]]:
        """Uploads that count, and what is wrong with the others, by client."""
        checked, problems = {}, {}
        for client, (signed, payload) in uploads.items():
            try:
                found = self._check_upload(header, signed, memoryview(payload))
                if pinned.setdefault(client, found.content.hex()) != found.content.hex():
                    raise IdentityError("another upload of this round was judged before")
                checked[client] = found
            except (IdentityError, EncryptionError) as error:
                problems[client] = f"the upload of {client!r} does not count: {error}"
        return checked, problems

    def _check_upload(
        self, header: ReviewHeader, signed: witnessing.SignedUpload, payload: memoryview
    ) -> _Checked:
        name, federation = signed.client, self._roster.federation
        key = bytes.fromhex(self._roster.member(name).identity_key)
        content = signed.digest(federation, header.run_id, header.round)
        verify_digest(key, content, signed.signature, name)
        if name not in self._roster.taking_part(header.run_id, header.round):
            raise IdentityError(f"others were drawn to take part in round {header.round}")
        if signed.key_epoch != header.key_epoch:
            raise EncryptionError(f"it is of key epoch {signed.key_epoch}, the round of {header.key_epoch}")
        self.check_size(signed)
        shared, sections, start = self.sections(name), {}, 0
        for section in signed.sections:
            label, length = shared[section.name]
            piece = payload[start : start + section.size]
            start += section.size
            if hashlib.sha256(piece).digest() != section.sha256:
                raise EncryptionError(f"section {section.name!r} is not the one that was signed")
            context = RoundContext(federation, header.key_epoch, header.round, label, length)
            self._aggregator.check_upload(piece, context, name)
            sections[label] = piece
        return _Checked(content, sections)

    def _check_claim(
        self,
        header: ReviewHeader,
        claim: AggregateClaim,
        checked: Mapping[str, _Checked],
        problems: Mapping[str, str],
        pinned: dict[str, str],
    ) -> RoundContext:
        """What the claimed row is to be applied to, if the row may be."""
        try:
            label, length = self.sections(claim.recipient)[claim.section]
            terms, families = self._roster.terms, self._roster.sharing_families(claim.section)
            bits = terms.encryption.weight_bits
            check_row(
                claim.recipient, claim.row, terms.policy, members=families, families=families, bits=bits
            )
        except (IdentityError, PolicyError) as error:
            raise _WrongError("row", str(error)) from None
        except KeyError:
            raise _WrongError("row", f"{claim.recipient!r} shares no {claim.section} section") from None
        for name in claim.row.contributors:
            if name not in checked or label not in checked[name].sections:
                words = problems.get(name, f"there is no {label} section of {name!r} in this round")
                raise _WrongError("upload", words)
        digest = row_digest(claim.row, claim.recipient, header.round).hex()
        if pinned.setdefault(f"{claim.recipient}/{claim.section}", digest) != digest:
            raise _WrongError("row", "another row of this recipient and round was judged before")
        return RoundContext(self._roster.federation, header.key_epoch, header.round, label, length)

    def _sign(self, context: RoundContext, run_id: str, claim: AggregateClaim, uploads: bytes) -> Verdict:
        digest = witnessing.countersigned_digest(
            federation=context.federation,
            run_id=run_id,
            round_number=context.round,
            key_epoch=context.epoch,
            section=context.section,
            recipient=claim.recipient,
            row=claim.row,
            aggregate_sha256=claim.sha256,
            uploads_sha256=uploads,
        )
        self._audit.add(
            "countersigned",
            **_about(run_id, context.round, claim),
            aggregate=claim.sha256.hex(),
            uploads=uploads.hex(),
        )
        where = run_id, context.round, claim.recipient, claim.section
        return Verdict(*where, uploads, self._key.sign(digest), "")

    def _refuse(self, header: ReviewHeader, claim: AggregateClaim, wrong: str, words: str) -> Verdict:
        log.error("round %d, %s: NOT countersigned: %s", header.round, claim.recipient, words)
        self._audit.add("not-countersigned", **_about(header.run_id, header.round, claim), wrong=wrong)
        where = header.run_id, header.round, claim.recipient, claim.section
        return Verdict(*where, b"", b"", words[: bounds.MAX_TEXT])

    def _path(self, run_id: str) -> Path:
        return self._directory / f"run-{run_id}.json"

    def _pins(self, header: ReviewHeader) -> dict[str, Any]:
        """Uploads and rows of the round that were judged before; StateError if a later round was."""
        remedy = "restore it from a backup, or have the federation begin a new run"
        pins = read_own(self._path(header.run_id), _read_pins, remedy)
        if pins is not None and pins["round"] > header.round:
            raise StateError(
                f"round {header.round} of run {header.run_id} is to be judged after round {pins['round']}: "
                "the server runs on an older copy of its state, or replays"
            )
        if pins is not None and pins["round"] == header.round:
            return pins
        return {"round": header.round, "uploads": {}, "rows": {}}


def _read_pins(found: dict[str, Any]) -> dict[str, Any]:
    return {"round": int(found["round"]), **{name: dict(found[name]) for name in ("uploads", "rows")}}


def _about(run_id: str, round_number: int, claim: AggregateClaim) -> dict[str, Any]:
    return {"run": run_id, "round": round_number, "client": claim.recipient, "section": claim.section}
