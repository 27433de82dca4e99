"""Settings of the server from its kit."""

from pathlib import Path

import pytest

from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.settings import settings_from_kit

PROFILE = ProfileMechanism(
    probe="tiny",
    probe_sha256="0" * 64,
    reduction=Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=32),
)


def test_a_roster_below_its_quorum_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tuple(MemberEntry(id=name) for name in "abcd")
    place = tmp_path / "f"
    consortium.create(FederationConfig(federation="f", members=entries, terms=Terms(profile=PROFILE)), place)
    assert settings_from_kit(place / "server").quorum == 4
    # As an older program issued it.
    monkeypatch.setattr(consortium, "too_few", lambda members, terms: "")
    consortium.revoke_member(place, "d")
    with pytest.raises(ConfigurationError) as error:
        settings_from_kit(place / "server")
    message = f"the roster of {place / 'server'} is not a valid ServerSettings:"
    assert str(error.value) == f"{message}\n  (whole file): quorum is 4 with 3 members"
