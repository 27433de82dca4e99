"""Back end `plain`, client side: float32 values that everybody who handles them can read."""

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.cipher import ClientCipher
from fedmosaic.privacy.encryption.parameters import PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.protos.messages import WeightRow


class PlainCipher(ClientCipher[PlainParameters]):
    """Client side of the back end `plain`."""

    def _seal(self, values: NDArray[np.float64], key: GroupKey | None, header: bytes, nonce: bytes) -> bytes:
        return values.astype("<f4").tobytes()

    def _open(
        self, payload: memoryview, key: GroupKey | None, context: RoundContext, row: WeightRow
    ) -> NDArray[np.float64]:
        return np.frombuffer(payload, dtype="<f4").astype(np.float64)
