"""Small files that a client writes between two steps of a round, so that a restart goes on from them.

STATE/upload-0003.bin             an upload until its round is closed, re-sent byte for byte
STATE/profile-average.npz         the average of all profiles that were released
STATE/clipping.json               how many examples were clipped, for the client's own statement
LEDGER/profile-<data>-<map>.npy   a noised profile, sent again free of charge
"""

import hashlib
import io
import json
import struct
import threading
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.rows import Channel
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism, ReleasedProfile
from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import Section, Upload
from fedmosaic.protos.v1 import federation_pb2
from fedmosaic.protos.wire import decode_upload_header, encode_upload_header

CLIPPING: Final = "clipping.json"
# NumPy reads headers by `ast`, in which threads of CPython 3.11 disturb each other (cpython issue 106905).
_ONE_READER: Final = threading.Lock()
_LENGTH: Final = struct.Struct("<Q")
_ARCHIVE_ERRORS: Final = (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError)
_HEADER_ERRORS: Final = (SyntaxError, TypeError, tokenize.TokenError, MemoryError)
_ARRAY_ERRORS: Final = (OSError, ValueError, EOFError, *_HEADER_ERRORS, *_ARCHIVE_ERRORS)
"""Everything that NumPy says of a file that is no array, or no archive of arrays."""
_LOST_PROFILE: Final = (
    "A fresh draw would cost its ε again: put the file back from a backup of the ledger, or change "
    "the data by an example, which makes another release that is charged"
)


def write_upload(path: Path, upload: Upload) -> None:
    """Store an upload durably: length and bytes of its header, then the payloads."""
    header = encode_upload_header(upload.header()).SerializeToString()
    payloads = (section.payload for section in upload.sections)
    write_atomically(path, b"".join([_LENGTH.pack(len(header)), header, *payloads]))


def read_upload(path: Path) -> Upload | None:
    """The stored upload, or None if there is none; StateError if the file is damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        (length,) = _LENGTH.unpack_from(content)
        start = _LENGTH.size + length
        header = decode_upload_header(federation_pb2.PushHeader.FromString(content[_LENGTH.size : start]))
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
        words = "delete it: the round is then sealed again from the trained adapter"
        raise StateError(f"{path} is damaged ({error}); {words}") from None
    return Upload(
        header.round,
        header.attempt_id,
        header.key_epoch,
        tuple(sections),
        header.profile,
        header.signature,
        header.ledger,
    )


def digest_of(vector: np.ndarray) -> str:
    """SHA-256 (hexadecimal) of a vector's float32 values, as the ledger has it."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()


def profile_path(directory: Path, epoch: str, mechanism: ProfileMechanism) -> Path:
    """Where the noised task profile of a data epoch stands once it was released."""
    return directory / f"profile-{epoch[:16]}-{mechanism.sha256[:16]}.npy"


def write_profile(path: Path, vector: Float32Array) -> str:
    """Store a noised profile durably; returns its `digest_of`."""
    buffer = io.BytesIO()
    np.save(buffer, vector)
    write_atomically(path, buffer.getvalue())
    return digest_of(vector)


def read_profile(path: Path, dimensions: int, digest: str | None = None) -> Float32Array:
    """A stored profile of some length, with the digest that the ledger has of it, if it has one.

    StateError if it cannot be read, or is not the one that was released.
    """
    try:
        with path.open("rb") as file, _ONE_READER:
            vector: Float32Array = np.load(file, allow_pickle=False)
    except _ARRAY_ERRORS as error:
        words = f"the stored task profile cannot be read ({error}), and was released. {_LOST_PROFILE}"
        raise StateError(f"{path}: {words}") from None
    if vector.shape != (dimensions,) or vector.dtype != np.float32:
        raise StateError(f"{path}: a profile of shape {vector.shape}, expected ({dimensions},) float32")
    if digest is not None and digest_of(vector) != digest:
        # Sent unnoticed, other bytes would be a release that nobody was charged for.
        raise StateError(
            f"{path}: the stored task profile is not the one that was released: its SHA-256 is "
            f"{digest_of(vector)[:12]}…, the privacy ledger has {digest[:12]}…. {_LOST_PROFILE}"
        )
    return vector


def write_average(path: Path, average: ReleasedProfile) -> None:
    """Store the average of all released profiles."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        vector=average.vector,
        noise_variance=average.noise_variance,
        releases=average.releases,
        last=np.frombuffer(bytes.fromhex(average.last_release_sha256), dtype=np.uint8),
    )
    write_atomically(path, buffer.getvalue())


def read_average(path: Path, dimensions: int) -> ReleasedProfile | None:
    """The stored average, None before the first release; StateError if it is damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, _ONE_READER, np.load(file, allow_pickle=False) as stored:
            average = ReleasedProfile(
                stored["vector"],
                float(stored["noise_variance"]),
                int(stored["releases"]),
                stored["last"].tobytes().hex(),
            )
        if average.vector.shape != (dimensions,) or average.releases < 1:
            raise ValueError("it is of another shape")
        return average
    except _ARRAY_ERRORS as error:
        raise StateError(f"{path} is damaged ({error}); delete it, the ledger stays valid") from None


class ClippingRecord:
    """How many examples were clipped, by channel, counted on over restarts.

    The counts depend on private data and carry no noise, so they stay in the state directory; what a client
    hands over leaves them out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, channel: Channel, clipped: int, examples: int) -> None:
        """Count the clipped ones among the examples of one release."""
        counts = self._read()
        before = counts.get(channel, (0, 0))
        counts[channel] = (before[0] + clipped, before[1] + examples)
        write_atomically(self._path, json.dumps(counts).encode())

    def shares(self) -> dict[Channel, float]:
        """Share of clipped examples by channel, of the channels that saw any."""
        return {channel: clipped / seen for channel, (clipped, seen) in self._read().items() if seen}

    def _read(self) -> dict[Channel, tuple[int, int]]:
        remedy = "delete it, only the share of clipped examples is lost"
        return (
            read_own(self._path, lambda kept: {k: (int(a), int(b)) for k, (a, b) in kept.items()}, remedy)
            or {}
        )
