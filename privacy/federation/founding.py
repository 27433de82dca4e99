"""Founding a federation: its terms are tried before anything is written."""

from pathlib import Path

from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation.consortium import create
from fedmosaic.privacy.federation.kits import FederationConfig
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms_checks import settled, with_bounded_delta


def create_federation(
    config: FederationConfig | Path | str,
    out: Path | str = "federation",
    basis: Path | str | None = None,
) -> Roster:
    """Found a federation on one machine, as `fedmosaic keys init --for-demo` does: every party's keys.

    Whoever holds `out` can pose as any member. Members on machines of their own make their keys there:
    `fedmosaic keys request`. `basis` is the file of the public basis, if the terms name one.

    Raises:
        ConfigurationError: the file is wrong, no client's noise could be planned, or `out` is not empty.
        MechanismError: the basis is damaged, or not the one that the terms name.
    """
    return create(planned(config), Path(out), Path(basis) if basis is not None else None)


def planned(config: FederationConfig | Path | str) -> FederationConfig:
    """A founding configuration, or that of a file, whose terms were tried and have their noise written in."""
    if not isinstance(config, FederationConfig):
        config = read_configuration(Path(config), FederationConfig)
    terms = settled(with_bounded_delta(config.terms), [member.id for member in config.members])
    return config.model_copy(update={"terms": terms})
