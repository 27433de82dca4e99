"""Server settings from a kit: the operator's few choices, and everything else from the signed roster."""

from pathlib import Path

from pydantic import Field

from fedmosaic.privacy.configuration import Frozen, read_configuration, validate
from fedmosaic.privacy.federation.kits import SERVER_SETTINGS, Kit, open_kit
from fedmosaic.privacy.federation.names import ListenAddress
from fedmosaic.server.settings import ServerSettings, StoreUrl, TlsFiles


class OperatorSettings(Frozen):
    """`server.toml`: what the server's operator decides. Paths are relative to the kit."""

    listen: ListenAddress = "127.0.0.1:7443"
    """Address and port; port 0 takes a free one."""
    state_dir: Path = Path("state")
    store_url: StoreUrl | None = None
    """SQLAlchemy URL of the database; SQLite in `state_dir` by default."""
    grace_seconds: float = Field(default=600.0, ge=0.0, le=1e9)
    """After the last round, how long the server stays for members that have not handed over a statement."""


def settings_from_kit(directory: Path) -> ServerSettings:
    """Settings of the run that a server kit describes.

    Args:
        directory: the server's kit, as `fedmosaic keys init` made it.

    Raises:
        ConfigurationError: `server.toml` or the roster is not valid.
        IdentityError: the roster is not signed by the pinned consortium key.
    """
    kit = open_kit(directory)
    operator = read_configuration(directory / SERVER_SETTINGS, OperatorSettings)
    return _settings(kit, operator)


def _settings(kit: Kit, operator: OperatorSettings) -> ServerSettings:
    roster = kit.roster
    terms = roster.terms
    content = {
        "federation": roster.federation,
        "members": roster.identity_keys(),
        "tls_key_sha256": {member.id: member.tls_key_sha256 for member in roster.members},
        "roster_hash": roster.hash,
        "adapter_spec_hashes": (terms.adapter.spec_hash,),
        "families": {member.id: member.family for member in roster.members if member.family},
        "shared_dimensions": terms.adapter.shared_dimensions,
        "family_dimensions": terms.adapter.family_dimensions,
        "profile_dimensions": terms.profile.dimensions,
        "profile_noise_variance": terms.profile.noise_variance,
        "rounds": terms.schedule.rounds,
        "quorum": terms.schedule.quorum,
        "round_deadline_seconds": terms.schedule.round_deadline_seconds,
        "policy": terms.policy,
        "temperature": terms.relevance.temperature,
        "similarity": terms.relevance.similarity,
        "encryption": terms.encryption,
        "key_rotation_rounds": terms.schedule.rotate_key_every,
        "gathering_seconds": terms.schedule.gathering_seconds,
        "grace_seconds": operator.grace_seconds,
        "state_dir": kit.directory / operator.state_dir,
        "store_url": operator.store_url,
        "listen": operator.listen,
        "tls": TlsFiles(certificate=kit.tls_certificate, private_key=kit.tls_key, authority=kit.authority),
    }
    # The roster is signed, but it may be older than a rule of this program.
    return validate(content, ServerSettings, f"the roster of {kit.directory}")
