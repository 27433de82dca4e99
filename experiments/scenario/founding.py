"""What has to be there before a scenario's first round: the public basis, identities and the roster."""

import shutil
from pathlib import Path

import tyro
from rich.console import Console

from fedmosaic.client.colora.aligned import basis_name
from fedmosaic.client.profile.fit import PROFILE, Arguments, fit
from fedmosaic.experiments.scenario.processes import ManagedProcess, RunFailedError, python_module
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.roster import AdapterTerms, Terms
from fedmosaic.privacy.federation.terms_checks import check_plan
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.mechanism.profile import ProfileMechanism
from fedmosaic.privacy.mechanism.projection import check_basis
from fedmosaic.protos.errors import MechanismError


def fit_profile(
    scenario: Scenario, directory: Path, console: Console, *, own_process: bool, kept: Path | None = None
) -> ProfileMechanism:
    """Fit the public basis of the task profile, unless the run's directory holds it already.

    Args:
        scenario: probe and public data, paths resolved.
        directory: the run's directory; the mechanism and its basis are written below it.
        console: told what happens.
        own_process: fit in a process of its own, so that its model's memory is given back.
        kept: folder of what an earlier run fitted to the same probe, data and settings; made if absent.

    Raises:
        RunFailedError: the process failed; the message shows the end of its log.
    """
    fitted = directory / "profile"
    stored = fitted / PROFILE
    if kept is not None and not stored.exists() and _usable(kept):
        shutil.copytree(kept, fitted, dirs_exist_ok=True)
    if stored.exists():
        return ProfileMechanism.model_validate_json(stored.read_text(encoding="utf-8"))
    console.print("fitting the public basis of the task profile on public data")
    arguments = {
        "--probe": scenario.probe.path,
        "--device": scenario.probe.device,
        "--dtype": scenario.probe.dtype,
        "--public": str(scenario.profile.public_data),
        "--kind": scenario.profile.kind,
        "--dimensions": str(scenario.profile.dimensions),
        "--left": str(scenario.profile.left),
        "--noise-multiplier": str(scenario.profile.noise_multiplier),
        "--max-length": str(scenario.profile.max_length),
        "--minimum-examples": str(scenario.profile.minimum_examples),
        "--out": str(fitted),
    }
    if scenario.probe.keep_layers:
        arguments["--keep-layers"] = str(scenario.probe.keep_layers)
    words = [word for pair in arguments.items() for word in pair]
    if own_process:
        with console.status("a pass over every public example"):
            _fit_apart(words, directory / "probe.log")
    else:
        fit(tyro.cli(Arguments, args=words))
    if kept is not None:
        # The mechanism, which names the basis by its hash, comes last: a copy that was cut off is not used.
        kept.mkdir(parents=True, exist_ok=True)
        for name in (federation.BASIS, PROFILE):
            if (fitted / name).exists():
                write_atomically(kept / name, (fitted / name).read_bytes())
    return ProfileMechanism.model_validate_json(stored.read_text(encoding="utf-8"))


def _fit_apart(words: list[str], log: Path) -> None:
    process = ManagedProcess("probe", python_module("fedmosaic.client.profile.fit", *words), log)
    process.start({})
    process.process.wait()
    if process.process.returncode:
        raise RunFailedError(
            f"fitting the public basis failed; {process.log} ends with:\n{process.last_lines()}"
        )


def _usable(kept: Path) -> bool:
    """Whether the folder holds a mechanism and the basis that it names."""
    try:
        mechanism = ProfileMechanism.model_validate_json((kept / PROFILE).read_bytes())
        basis = kept / federation.BASIS
        check_basis(mechanism, basis if basis.exists() else None)
    except (OSError, ValueError, MechanismError):
        return False
    return True


def agreed_adapter(scenario: Scenario) -> AdapterTerms:
    """The adapter's terms; where clients name aligned checkpoints, with the basis that the first one carries.

    Args:
        scenario: paths resolved. A basis that it names itself stays as it is.

    Raises:
        ModelError: there is no aligned checkpoint where a client names one.
    """
    named = [client.model.aligned for client in scenario.clients if client.model.aligned]
    if scenario.adapter.basis or not named:
        return scenario.adapter
    return scenario.adapter.model_copy(update={"basis": basis_name(named[0])})


def found_federation(
    scenario: Scenario,
    profile: ProfileMechanism,
    directory: Path,
    port: int,
    adapter: AdapterTerms | None = None,
) -> None:
    """Make identities, certificates and the roster.

    Args:
        scenario: members and terms.
        profile: the fitted mechanism.
        directory: the run's directory; `profile/` in it holds the basis.
        port: where the server will listen.
        adapter: the adapter's terms, if other than the scenario's.
    """
    config = federation.FederationConfig(
        federation=scenario.name,
        members=tuple(federation.MemberEntry(id=c.id, family=c.family) for c in scenario.clients),
        server=federation.ServerEntry(port=port),
        terms=Terms(
            adapter=adapter or agreed_adapter(scenario),
            adapter_privacy=scenario.adapter_privacy,
            profile=profile,
            policy=scenario.policy,
            relevance=scenario.relevance,
            schedule=scenario.schedule,
            encryption=scenario.encryption,
            allow_plaintext=scenario.allow_plaintext,
        ),
    )
    check_plan(config.terms)
    basis = directory / "profile" / federation.BASIS
    federation.create(config, directory / "federation", basis if basis.exists() else None)
