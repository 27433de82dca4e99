"""Founding a federation: its terms are tried before anything is written."""

from pathlib import Path

from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation.kits import FederationConfig, create
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms_checks import settled


def create_federation(
    config: FederationConfig | Path | str,
    out: Path | str = "federation",
    basis: Path | str | None = None,
) -> Roster:
    """Found a federation, as `fedmosaic keys init` does: make authority, kits and roster.

    Args:
        config: the founding configuration, or its file (TOML or JSON).
        out: directory to create; its kits are handed to their owners, its `consortium` stays.
        basis: file of the public basis, if the terms name one.

    Raises:
        ConfigurationError: the file is wrong, no client's noise could be planned, or `out` is not empty.
        MechanismError: the basis is damaged, or not the one that the terms name.
    """
    if not isinstance(config, FederationConfig):
        config = read_configuration(Path(config), FederationConfig)
    names = [member.id for member in config.members]
    config = config.model_copy(update={"terms": settled(config.terms, names)})
    return create(config, Path(out), Path(basis) if basis is not None else None)
