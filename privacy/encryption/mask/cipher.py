"""Back end `mask`, client side: an additively homomorphic stream cipher over 32-bit words.

A value becomes a fixed-point integer m; the upload is m + pad modulo 2^32, with a pad that only members can
form. Weighted sums of uploads are weighted sums of the m plus weighted sums of the pads, and the recipient,
who knows its weight row and every contributor's nonce, subtracts the latter. The result is exact.

Pads are AES-256 in counter mode under a key that HKDF-SHA256 derives from the group key, the upload's nonce
and its whole header. So a pad belongs to one contributor, round and section, and can never serve twice.

Reference: Castelluccia, Mykletun and Tsudik, "Efficient aggregation of encrypted data in wireless sensor
networks" (MobiQuitous 2005); NIST SP 800-38A (CTR); RFC 5869 (HKDF).
"""

import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.cipher import ClientCipher, out_of_range
from fedmosaic.privacy.encryption.parameters import MaskParameters
from fedmosaic.privacy.encryption.records import NONCE_BYTES, RoundContext, upload_header
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.protos.errors import EncryptionError
from fedmosaic.protos.messages import WeightRow


class MaskCipher(ClientCipher[MaskParameters]):
    """Client side of the back end `mask`."""

    def _seal(self, values: NDArray[np.float64], key: GroupKey | None, header: bytes, nonce: bytes) -> bytes:
        integers = np.rint(np.ldexp(values, self.parameters.fraction_bits)).astype(np.int64)
        words = integers.astype(np.uint32)
        words += _pad(key, header, nonce, values.size)
        return words.astype("<u4", copy=False).tobytes()

    def _open(
        self, payload: memoryview, key: GroupKey | None, context: RoundContext, row: WeightRow
    ) -> NDArray[np.float64]:
        size = len(row.contributors) * NONCE_BYTES
        words = np.frombuffer(payload[size:], dtype="<u4").astype(np.uint32)
        for index, (name, weight) in enumerate(zip(row.contributors, row.weights, strict=True)):
            if weight:
                nonce = bytes(payload[index * NONCE_BYTES : (index + 1) * NONCE_BYTES])
                header = upload_header(self.parameters, context, name).encode(nonce)
                words -= _pad(key, header, nonce, context.dimensions) * np.uint32(weight)
        sums = words.view(np.int32)
        bits = self.parameters.fraction_bits + self.parameters.weight_bits
        bound = int(math.ldexp(self.parameters.clip, bits))
        if int(sums.max()) > bound or int(sums.min()) < -bound:
            raise out_of_range(context, self.parameters.clip)
        return np.ldexp(sums.astype(np.float64), -bits)


def _pad(key: GroupKey | None, header: bytes, nonce: bytes, count: int) -> NDArray[np.uint32]:
    if key is None:
        raise EncryptionError("back end 'mask' needs a group key")
    pad_key = key.subkey(b"pad\n" + header, salt=nonce)
    # The key serves one pad only, so the counter may start at zero.
    stream = Cipher(algorithms.AES256(pad_key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32, copy=False)
