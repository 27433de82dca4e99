"""The privacy statement of one client, from its ledger and the roster."""

import json

from fedmosaic.privacy.ledger import Ledger
from fedmosaic.privacy.roster import Roster


def build_statement(roster: Roster, client_id: str, ledger: Ledger) -> bytes:
    """JSON."""
    return json.dumps({"client": client_id, "epsilon_profile": ledger.epsilon("profile")}).encode()
