"""What the operator installs while the server runs: a new roster is taken up, and what expires is announced.

Certificate and key need nothing of this: they are read again at every handshake when their files change
(`fedmosaic.server.network.serving`).
"""

import asyncio
import logging
from pathlib import Path
from typing import Final

from fedmosaic.privacy.federation.identity import expires_soon, read_certificate
from fedmosaic.privacy.federation.kits import ROSTER, keep_signed
from fedmosaic.protos.errors import FedMosaicError, IdentityError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

log = logging.getLogger(__name__)
_LOOK_SECONDS: Final = 1.0
_DAY_SECONDS: Final = 86_400.0


class Renewal:
    """Looks at the kit now and then."""

    def __init__(self, coordinator: Coordinator, kit: Path | None) -> None:
        """Prepare; without a kit, settings were given and stay, and only certificates are looked at."""
        self._coordinator = coordinator
        self._roster = None if kit is None else kit / ROSTER
        self._content = b"" if self._roster is None else self._roster.read_bytes()
        self._keep()

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        announced = -_DAY_SECONDS
        while True:
            if loop.time() - announced >= _DAY_SECONDS:
                announced = loop.time()
                await asyncio.to_thread(self._announce)
            try:
                await asyncio.to_thread(self._look)
            except (FedMosaicError, OSError) as error:
                log.error("the new roster is not taken up, the server goes on as it was: %s", error)
            await asyncio.sleep(_LOOK_SECONDS)

    def _look(self) -> None:
        if self._roster is None:
            return
        content = self._roster.read_bytes()
        if content == self._content:
            return
        before, self._content = self._content, content
        if not self._coordinator.renew(settings_from_kit(self._roster.parent)):
            self._content = before  # a round is being aggregated; look again
        self._keep()

    def _keep(self) -> None:
        """Have the roster of the run in the state directory, for whoever reads the statements there."""
        settings = self._coordinator.settings
        if self._roster is not None:
            keep_signed(self._roster.parent, settings.roster, settings.state_dir)

    def _announce(self) -> None:
        tls = self._coordinator.settings.tls
        for path in () if tls is None else (tls.certificate, tls.authority):
            try:
                words = expires_soon(read_certificate(path).not_valid_after_utc)
            except IdentityError as error:
                words = str(error)
            if words:
                log.warning("%s: %s", path.name, words)
