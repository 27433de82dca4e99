"""An upload on disk until the server has acknowledged it, so that it is re-sent byte for byte."""

import hashlib
import struct
from pathlib import Path

from google.protobuf.message import DecodeError

from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import Section, Upload
from fedmosaic.protos.v1 import federation_pb2
from fedmosaic.protos.wire import decode_upload_header, encode_upload_header

_LENGTH = struct.Struct("<Q")


def write_upload(path: Path, upload: Upload) -> None:
    """Store an upload durably: length and bytes of its header, then the payloads."""
    header = encode_upload_header(upload.header()).SerializeToString()
    write_atomically(
        path, b"".join([_LENGTH.pack(len(header)), header, *(s.payload for s in upload.sections)])
    )


def read_upload(path: Path) -> Upload | None:
    """The stored upload, or None if there is none.

    Raises:
        StateError: the file is damaged.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        (length,) = _LENGTH.unpack_from(content)
        start = _LENGTH.size + length
        message = federation_pb2.PushHeader.FromString(content[_LENGTH.size : start])
        header = decode_upload_header(message)
        sections = []
        for section in header.sections:
            payload = content[start : start + section.size]
            if hashlib.sha256(payload).digest() != section.sha256:
                raise WireError(f"section {section.name!r} is not what was stored")
            sections.append(Section(section.name, payload))
            start += section.size
        if start != len(content):
            raise WireError("bytes are left over")
    except (struct.error, DecodeError, WireError) as error:
        raise StateError(
            f"{path} is damaged ({error}); delete it: the round is then sealed again from the trained adapter"
        ) from None
    return Upload(
        header.round,
        header.attempt_id,
        header.key_epoch,
        tuple(sections),
        header.profile,
        header.signature,
        header.ledger,
    )
