"""How long each record is, and the header it must carry, from public facts alone."""

from fedmosaic.privacy.encryption.ckks.expansion import SEED_BYTES
from fedmosaic.privacy.encryption.ckks.modular import WORD_BYTES
from fedmosaic.privacy.encryption.parameters import (
    CkksParameters,
    MaskParameters,
    Parameters,
)
from fedmosaic.privacy.encryption.records import NONCE_BYTES, Header, Kind, RoundContext, read_record
from fedmosaic.protos.messages import WeightRow

FLOAT_BYTES = 4


def ring_blocks(parameters: CkksParameters, dimensions: int) -> int:
    """Return the number of ring elements that carry a vector, ring_degree real values each."""
    return -(-dimensions // parameters.ring_degree)


def upload_header(parameters: Parameters, context: RoundContext, client: str) -> Header:
    """Return the header an upload of a client must carry."""
    blocks = ring_blocks(parameters, context.dimensions) if isinstance(parameters, CkksParameters) else 0
    return Header(Kind.UPLOAD, parameters.backend, parameters.digest(), context, client, blocks)


def aggregate_header(parameters: Parameters, context: RoundContext, row: WeightRow, recipient: str) -> Header:
    """Return the header that a recipient's aggregate must carry."""
    count = 0
    if isinstance(parameters, CkksParameters):
        count = ring_blocks(parameters, context.dimensions)
    elif isinstance(parameters, MaskParameters):
        count = len(row.contributors)
    return Header(Kind.AGGREGATE, parameters.backend, parameters.digest(), context, recipient, count)


def upload_payload_bytes(parameters: Parameters, dimensions: int) -> int:
    """The length of an upload after its header.

    `ckks`: seed 32 | first polynomials, 6 bytes a word. `mask`, `plain`: 4 bytes a value.
    """
    if isinstance(parameters, CkksParameters):
        words = ring_blocks(parameters, dimensions) * parameters.ring_degree
        return SEED_BYTES + words * WORD_BYTES
    return dimensions * FLOAT_BYTES


def aggregate_payload_bytes(parameters: Parameters, header: Header) -> int:
    """Return the length of an aggregate after its header.

    `ckks`: first polynomials | second polynomials. `mask`: nonce 16 per contributor | words. `plain`: values.
    """
    if isinstance(parameters, CkksParameters):
        return 2 * header.count * parameters.ring_degree * WORD_BYTES
    return header.count * NONCE_BYTES + header.context.dimensions * FLOAT_BYTES


def read_upload(
    parameters: Parameters, context: RoundContext, client: str, upload: bytes | memoryview
) -> tuple[bytes, memoryview]:
    """Check header and length of an upload; its nonce and a view of its payload, or CiphertextError."""
    header = upload_header(parameters, context, client)
    return read_record(upload, header, upload_payload_bytes(parameters, context.dimensions))
