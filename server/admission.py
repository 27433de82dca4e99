"""What the server checks before it believes a client: enrolment, headers, signatures, payloads."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from pydantic_core import from_json

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext, upload_payload_bytes
from fedmosaic.privacy.statement.check import check_received
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import EncryptionError, IdentityError, PrivacyError
from fedmosaic.protos.messages import PROTOCOL_VERSION, Enrolment, Profile, Report, UploadHeader
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.protos.signing import ledger_digest, upload_digest, verify_digest
from fedmosaic.server.round.weights import section_label
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import map_file, section_hashes

_NOISE_TOLERANCE = 1e-5
_NEWEST_ROSTER = "install the consortium's newest roster on both sides (`fedmosaic keys install`)"


class Admission:
    """Checks that need the settings of the run but not its state."""

    def __init__(
        self, settings: ServerSettings, run_id: str, aggregator: Aggregator[Any], rosters: Collection[str]
    ) -> None:
        """Prepare; `rosters` are the hashes of all that the run has had, whose statements are welcome."""
        self._settings = settings
        self._rosters = rosters
        self._run_id = run_id
        self._aggregator = aggregator

    def check_member(self, client: str) -> None:
        """Refuse whoever is not on the roster."""
        if client not in self._settings.members:
            raise Refusal(
                RefusalKind.NOT_PERMITTED,
                "NOT_ON_ROSTER",
                f"{client!r} is not on the roster of federation {self._settings.roster.federation!r}",
                "the consortium can add a member with `fedmosaic keys approve`",
            )

    def check_round(self, round_number: int) -> None:
        """Refuse a round that the run does not have; one above the last stands for its end."""
        rounds = self._settings.terms.schedule.rounds
        if not 1 <= round_number <= rounds + 1:
            raise Refusal(
                RefusalKind.TOO_LARGE,
                "ROUND_OUT_OF_RANGE",
                f"round {round_number} was asked for, the run has rounds 1 … {rounds}",
                "enrol again to learn where the run is",
            )

    def check_statement(self, client: str, statement: bytes) -> None:
        """Refuse what is not this client's privacy statement of this run and roster."""
        self.check_member(client)
        Report(statement)  # holds its bounds
        try:
            # Bounds the depth, which the parser of the standard library does not.
            content = from_json(statement, allow_inf_nan=False)
        except ValueError:
            problem = "NOT_JSON", "report.statement is not a JSON object", "send the statement as is"
            raise _invalid(*problem) from None
        try:
            found = check_received(content, client, self._run_id)
        except PrivacyError as error:
            raise _invalid(
                "STATEMENT_UNUSABLE",
                f"report.statement of {client!r}: {error}",
                "send the statement that the client wrote for this run",
            ) from None
        if found.roster_sha256 not in self._rosters:
            raise _differs(
                "ROSTER_DIFFERS",
                f"report.statement is about roster {found.roster_sha256[:16]!r}, the server's is "
                f"{self._settings.roster_hash.hex()[:16]}",
                _NEWEST_ROSTER,
            )

    def check_enrolment(self, client: str, enrolment: Enrolment) -> None:
        """Refuse a client whose protocol, federation, roster, adapter or family differs."""
        self.check_member(client)
        settings, federation = self._settings, self._settings.roster.federation
        if enrolment.protocol_version != PROTOCOL_VERSION:
            older = "client" if enrolment.protocol_version < PROTOCOL_VERSION else "server"
            raise _differs(
                "PROTOCOL_VERSION",
                f"the client speaks protocol {enrolment.protocol_version}, the server {PROTOCOL_VERSION}",
                f"update the {older}",
            )
        if enrolment.federation != federation:
            raise _differs(
                "FEDERATION_DIFFERS",
                f"the client is of federation {enrolment.federation!r}, this is {federation!r}",
                "check the server's address and the kit in use",
            )
        if enrolment.roster_hash != settings.roster_hash:
            raise _differs(
                "ROSTER_DIFFERS",
                f"the client's roster has fingerprint {enrolment.roster_hash.hex()[:16]}, the server's "
                f"{settings.roster_hash.hex()[:16]}",
                _NEWEST_ROSTER,
            )
        spec_hash = settings.terms.adapter.spec_hash
        if enrolment.adapter_spec_hash != spec_hash:
            raise _differs(
                "ADAPTER_DIFFERS",
                f"the client's adapter spec is {enrolment.adapter_spec_hash.hex()[:16]}, expected "
                f"{spec_hash.hex()[:16]}",
                "build the adapter from the roster's rank, blocks and modules",
            )
        family = settings.members[client].family
        if enrolment.family != family:
            raise _differs(
                "FAMILY_DIFFERS",
                f"{client!r} enrols with family {enrolment.family!r}, the roster says {family!r}",
                "use the model the roster names, or have the roster changed",
            )
        if enrolment.ledger_head:
            signed = ledger_digest(federation=federation, client_id=client, head=enrolment.ledger_head)
            self._check_signature(client, signed, enrolment.ledger_signature)

    def check_ledger(self, header: UploadHeader, kept: bytes) -> None:
        """Refuse an upload from a ledger that is not known to hold what was kept of it.

        What an upload that was lost here left behind is its own head; the same bytes bring it again.
        """
        if kept and (header.ledger is None or kept not in (header.ledger.follows, header.ledger.head)):
            raise _differs(
                "LEDGER_BEHIND",
                "the upload comes from a privacy ledger that was not checked against the newest head that is "
                "kept here; another process of this client has gone on with it, or with a copy of it",
                "stop all other processes of this client and start it again: it then checks its ledger",
            )

    def check_upload(self, client: str, header: UploadHeader) -> bytes:
        """The content hash of an upload, unless it is too large, misshapen or not signed by its client."""
        self.check_member(client)
        self._check_sizes(client, header)
        if header.profile is not None:
            self._check_profile(header.profile)
        content_hash = upload_digest(
            federation=self._settings.roster.federation,
            run_id=self._run_id,
            round_number=header.round,
            client_id=client,
            key_epoch=header.key_epoch,
            sections=header.sections,
            profile=header.profile,
            ledger=header.ledger,
        )
        self._check_signature(client, content_hash, header.signature)
        return content_hash

    def _check_signature(self, client: str, digest: bytes, signature: bytes) -> None:
        try:
            key = bytes.fromhex(self._settings.members[client].identity_key)
            verify_digest(key, digest, signature, client)
        except IdentityError as error:
            raise Refusal(RefusalKind.NOT_PERMITTED, "SIGNATURE_INVALID", str(error), "") from None

    def _check_sizes(self, client: str, header: UploadHeader) -> None:
        if header.size > bounds.MAX_PAYLOAD_BYTES:
            raise Refusal(
                RefusalKind.TOO_LARGE,
                "UPLOAD_TOO_LARGE",
                f"an upload of {header.size} bytes was announced, at most {bounds.MAX_PAYLOAD_BYTES} are "
                "accepted",
                "check the adapter's rank and target modules against the roster",
            )
        dimensions = self._settings.dimensions(client)
        for section in header.sections:
            if section.name not in dimensions:
                raise _invalid(
                    "UNEXPECTED_SECTION",
                    f"section {section.name!r} was announced, {client!r} shares {', '.join(dimensions)}",
                    "the roster's family_dimensions say which families share more than P and Q",
                )
            length = dimensions[section.name]
            expected = HEADER_BYTES + upload_payload_bytes(self._settings.terms.encryption, length)
            if section.size != expected:
                raise _invalid(
                    "WRONG_SIZE",
                    f"section {section.name!r} has {section.size} bytes, expected {expected} for {length} "
                    f"values with back end {self._settings.terms.encryption.backend!r}",
                    "compare the adapter and encryption terms with the roster",
                )

    def _check_profile(self, profile: Profile) -> None:
        expected = self._settings.terms.profile.dimensions
        if profile.vector.size != expected:
            raise _invalid(
                "PROFILE_DIMENSIONS",
                f"profile.vector has {profile.vector.size} values, expected {expected}",
                "use the roster's profile mechanism",
            )
        # An average with weights that sum to 1 has at most the variance of one release, at least 1/n of it.
        fresh = self._settings.terms.profile.noise_variance
        low, high = fresh / profile.releases * (1 - _NOISE_TOLERANCE), fresh * (1 + _NOISE_TOLERANCE)
        if not low <= profile.noise_variance <= high:
            raise _invalid(
                "PROFILE_NOISE",
                f"profile.noise_variance is {profile.noise_variance:g}, expected {low:g} … {high:g} for an "
                f"average of {profile.releases} releases of the roster's mechanism",
                "use the roster's profile mechanism",
            )

    def check_payload(self, client: str, header: UploadHeader, spool: Path) -> None:
        """Refuse a payload that is not the announced and signed one, or that the back end cannot use."""
        if not header.sections:
            return
        hashes = section_hashes(spool, [section.size for section in header.sections])
        view, start = map_file(spool), 0
        if len(view) != header.size or hashes != [section.sha256 for section in header.sections]:
            raise _invalid(
                "PAYLOAD_DIFFERS",
                f"{len(view)} of {header.size} bytes arrived, or their SHA-256 is not the announced one",
                "send the upload again from its first byte",
            )
        for section in header.sections:
            dimensions = self._settings.dimensions(client)[section.name]
            label = section_label(section.name, self._settings.family(client))
            context = RoundContext(
                self._settings.roster.federation, header.key_epoch, header.round, label, dimensions
            )
            try:
                # Back ends read through the buffer protocol only; a mapped file is not copied.
                record = cast(bytes, view[start : start + section.size])
                self._aggregator.check_upload(record, context, client)
            except EncryptionError as error:
                raise _invalid(
                    "PAYLOAD_UNUSABLE",
                    f"section {section.name!r}: {error}",
                    "check that training did not diverge and that the encryption terms are the roster's",
                ) from None
            start += section.size


def _differs(reason: str, message: str, remedy: str) -> Refusal:
    return Refusal(RefusalKind.PRECONDITION, reason, message, remedy)


def _invalid(reason: str, message: str, remedy: str) -> Refusal:
    return Refusal(RefusalKind.INVALID, reason, message, remedy)
