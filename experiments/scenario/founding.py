"""What has to be there before a scenario's first round: the public basis, identities and the roster."""

import shutil
from pathlib import Path

from rich.console import Console

from fedmosaic.experiments.scenario.children import in_own_process
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.federation.terms_checks import settled
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.mechanism.profile import ProfileMechanism
from fedmosaic.privacy.mechanism.projection import check_basis
from fedmosaic.protos.errors import MechanismError


def fit_profile(
    scenario: Scenario, directory: Path, console: Console, *, own_process: bool, kept: Path | None = None
) -> ProfileMechanism:
    """Fit the public basis of the task profile, unless the run's `profile/` holds it already.

    With a process of its own (`RunFailedError` if it gives no answer) the memory of its model is given back.
    `kept` is the folder of what an earlier run fitted to the same probe, data and settings; it is made if
    absent.
    """
    stored = directory / "profile" / federation.PROFILE
    if kept is not None and not stored.exists() and _usable(kept):
        shutil.copytree(kept, stored.parent, dirs_exist_ok=True)
    if stored.exists():
        return ProfileMechanism.model_validate_json(stored.read_text(encoding="utf-8"))
    # What follows is rare where the basis is kept, and needs the libraries of a model.
    from fedmosaic.client.profile.fit import Arguments, fit

    console.print("fitting the public basis of the task profile on public data")
    probe, profile = scenario.probe, scenario.profile
    arguments = Arguments(
        probe=probe.path,
        device=probe.device,
        dtype=probe.dtype,
        keep_layers=probe.keep_layers,
        public=profile.public_data,
        out=stored.parent,
        **profile.model_dump(exclude={"public_data"}),
    )
    with console.status("a pass over every public example"):
        if own_process:
            mechanism = in_own_process("fits the public basis", fit, arguments)
        else:
            mechanism = fit(arguments)
    if kept is not None:
        # The mechanism, which names the basis by its hash, comes last: a copy that was cut off is not used.
        kept.mkdir(parents=True, exist_ok=True)
        for name in (federation.BASIS, federation.PROFILE):
            if (stored.parent / name).exists():
                write_atomically(kept / name, (stored.parent / name).read_bytes())
    return mechanism


def _usable(kept: Path) -> bool:
    """Whether the folder holds a mechanism and the basis that it names."""
    try:
        mechanism = ProfileMechanism.model_validate_json((kept / federation.PROFILE).read_bytes())
        basis = kept / federation.BASIS
        check_basis(mechanism, basis if basis.exists() else None)
    except (OSError, ValueError, MechanismError):
        return False
    return True


def agreed_adapter(scenario: Scenario) -> AdapterTerms:
    """The adapter's terms; with the basis of the first aligned checkpoint, where clients name some."""
    named = [client.model.aligned for client in scenario.clients if client.model.aligned]
    if scenario.adapter.basis or not named:
        return scenario.adapter
    from fedmosaic.client.colora.aligned import basis_name

    return scenario.adapter.model_copy(update={"basis": basis_name(named[0])})


def found_federation(
    scenario: Scenario,
    profile: ProfileMechanism,
    directory: Path,
    port: int,
    adapter: AdapterTerms | None = None,
) -> None:
    """Make identities, certificates and the roster in a run's directory, whose `profile/` holds the basis."""
    terms = {name: getattr(scenario, name) for name in Terms.model_fields}
    terms |= {"adapter": adapter or agreed_adapter(scenario), "profile": profile}
    config = federation.FederationConfig(
        federation=scenario.name,
        members=tuple(federation.MemberEntry(id=c.id, family=c.family) for c in scenario.clients),
        server=federation.ServerEntry(port=port),
        terms=Terms.model_validate(terms),
    )
    config = config.model_copy(update={"terms": settled(config.terms, config.members)})
    basis = directory / "profile" / federation.BASIS
    consortium.create(config, directory / "federation", basis if basis.exists() else None, simulated=True)
