"""Everything that can be found out before a client enrols, cheap things first.

A client runs it before its first round, so that nothing is refused after training that could have been
refused before; `fedmosaic doctor` goes on where a check fails. Nothing is spent or changed, and nothing sent
but one question: whether the server would enrol this client.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from fedmosaic.client.data.records import ClientData, read_sets, unit_ids
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.ledger import DataLedger, ledger_parameters
from fedmosaic.client.model.load import LoadedModel, accept_model, load_tokenizer
from fedmosaic.client.planning import AdapterPlan, plan_adapter
from fedmosaic.client.preflight.data import Lengths, check_sets, read_lengths
from fedmosaic.client.preflight.memory import check_memory
from fedmosaic.client.profile.release import client_probe, public_map, read_as_text
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.membership import ask_to_enrol
from fedmosaic.client.round.protection import Identity
from fedmosaic.client.round.records import profile_path
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import SessionRecord, check_run, check_server, read_record
from fedmosaic.client.transport.connection import open_channel
from fedmosaic.client.transport.grpc import Connect, GrpcTransport, Traffic
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.encryption.records import upload_payload_bytes
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.kits import Kit, open_kit, unaligned
from fedmosaic.privacy.federation.terms_checks import plan_inputs
from fedmosaic.privacy.ledger.ledger import LEDGER, data_epoch, has_begun, read_ledger
from fedmosaic.privacy.ledger.rows import Charge, charges
from fedmosaic.privacy.ledger.rules import LedgerParameters, Release, bound_of, check_parameters
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.protos.errors import ConfigurationError, ModelError, StateError

_SPARE_BYTES: Final = 1 << 28
"""Room for adapters, ledger and logs beside what is sent and received."""


@dataclass(frozen=True)
class Check:
    """One thing that is checked.

    It needs the success of other checks, by name; `run` returns what was found in a few words, or raises.
    """

    name: str
    needs: tuple[str, ...]
    run: Callable[[], str]


@dataclass(frozen=True)
class Given:
    """What a caller in Python hands over instead of naming it in the settings.

    A loaded causal language model of transformers with its tokenizer, examples to train on and to score, and
    what opens the channel to the server.
    """

    model: tuple[Any, Any] | None = None
    train: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    connect: Connect = open_channel


class Preflight:
    """The checks of one client, and what they have read and loaded on the way.

    `warnings` has what was found that stops nobody, one line each; `reading` what was read, one line per set.
    """

    def __init__(
        self,
        settings: ClientSettings,
        progress: Progress,
        *,
        server_patience_seconds: float = 300.0,
        scratch: Path | None = None,
        traffic: Traffic | None = None,
        given: Given | None = None,
    ) -> None:
        """Prepare; nothing is read yet. The settings passed `ClientSettings.check_complete`.

        `scratch` is where the model's side may write instead of the state directory.
        """
        self._given = given or Given()
        self.settings = settings
        self.progress = progress
        self.warnings: list[str] = []
        self.reading: list[str] = []
        self._lengths: Lengths | None = None
        self._kept = b""  # what the server has of the ledger
        self._patience = server_patience_seconds
        self._scratch = scratch
        self._traffic = traffic or Traffic()

    def checks(self) -> tuple[Check, ...]:
        """All checks, in order."""
        return (
            Check("kit", (), self._check_kit),
            Check("certificate", ("kit",), self._check_certificate),
            Check("state", ("kit",), self._check_state),
            Check("disk", ("kit",), self._check_disk),
            Check("data", (), self._check_data),
            Check("texts", ("data",), self._check_texts),
            Check("server", ("kit", "certificate", "state"), self._check_server),
            Check("budget", ("kit", "data"), self._check_budget),
            Check("memory", ("kit",), self._check_memory),
            Check("probe", ("kit", "data", "texts"), self._check_probe),
            Check("model", ("kit", "data", "texts"), self._check_model),
        )

    def require(self, warn: Callable[[str], None]) -> None:
        """Make every check and `warn` of each warning; the first that fails raises."""
        for check in self.checks():
            self.progress.stage(0, f"checking {check.name}")
            told = len(self.warnings)
            check.run()
            for warning in self.warnings[told:]:
                warn(warning)

    @cached_property
    def kit(self) -> Kit:
        """The kit, its roster verified."""
        return open_kit(self.settings.kit)

    @cached_property
    def data(self) -> ClientData:
        """The client's examples."""
        return read_sets(self.settings.data, self._given.train, self._given.test)

    @cached_property
    def base(self) -> LoadedModel | None:
        """The model that was handed over; None if the settings name one."""
        return None if self._given.model is None else accept_model(*self._given.model)

    @cached_property
    def plan(self) -> AdapterPlan:
        """DP-SGD parameters of this client; AccountingError if there are none."""
        target = agreed_epsilon(self.settings, self.kit)
        delta = self._parameters(target).delta
        roster = self.kit.roster
        return plan_adapter(roster.terms, len(self._unit_ids), delta, target, roster.private_steps)

    @cached_property
    def learner(self) -> ModelLearner:
        """The model with a fresh adapter, and the encoded examples."""
        roster = self.kit.roster
        settings = self.settings
        if self._scratch is not None:
            settings = settings.model_copy(update={"state_dir": self._scratch})
        family = roster.member(self.kit.member_id()).family
        return ModelLearner(settings, roster.terms, family, self.progress, base=self.base, data=self.data)

    @cached_property
    def transport(self) -> GrpcTransport:
        """The way to the server; whoever asks for it closes it."""
        kit = self.kit
        return GrpcTransport(
            self.settings.server,
            authority=kit.authority,
            certificate=kit.tls_certificate,
            private_key=kit.tls_key,
            retry_seconds=self._patience,
            traffic=self._traffic,
            connect=self._given.connect,
        )

    @cached_property
    def record(self) -> SessionRecord | None:
        """How far an earlier process got; None before the first."""
        return read_record(self.settings.state_dir)

    def close(self) -> None:
        """Close the connection, if one was made."""
        if "transport" in self.__dict__:
            self.transport.close()

    def _check_kit(self) -> str:
        kit, roster = self.kit, self.kit.roster
        member = Identity.of(kit).client_id
        public_map(roster.terms.profile, kit.basis)
        if warning := unaligned(roster):
            self.warnings.append(warning)
        schedule, turns = roster.terms.schedule, roster.terms.schedule.turns(len(roster.members))
        words = (
            f"{schedule.rounds} rounds"
            if schedule.sampled_clients is None
            else (f"in at most {turns} of {schedule.rounds} rounds")
        )
        return (
            f"{member} of federation {roster.federation}, roster {roster.serial}, protection "
            f"{roster.terms.adapter.protection!r}, {words}"
        )

    def _check_certificate(self) -> str:
        certificate = identity.check_certificate(self.kit.tls_certificate, self.kit.authority)
        identity.read_private(self.kit.tls_key)
        if words := identity.expires_soon(certificate.not_valid_after_utc):
            self.warnings.append(words)
        return f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}"

    def _check_state(self) -> str:
        directory, roster = self.settings.state_dir, self.kit.roster
        place = _existing(directory)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise StateError(f"{place} cannot be written to; give a state_dir that this user may write")
        record = self.record
        if record is None:
            return f"{directory} will be made" if place != directory else f"{directory} is fresh"
        if (record.federation, record.client) != (roster.federation, self.kit.member_id()):
            raise StateError(
                f"{directory} belongs to client {record.client!r} of federation {record.federation!r}; give "
                "each client its own state_dir"
            )
        return f"{directory} is at round {record.completed_round} of {roster.terms.schedule.rounds}"

    def _check_disk(self) -> str:
        terms = self.kit.roster.terms
        sections = [terms.adapter.shared_dimensions, *terms.adapter.family_dimensions.values()]
        needed = _SPARE_BYTES + sum(3 * upload_payload_bytes(terms.encryption, n) + 12 * n for n in sections)
        place = _existing(self.settings.state_dir)
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StateError(
                f"{place} has {_size(free)} free, and a round needs about {_size(needed)}; make room, or "
                "give a state_dir on another disk"
            )
        return f"{_size(free)} free, about {_size(needed)} needed"

    def _check_data(self) -> str:
        data = self.data
        self.warnings += check_sets(data, self.settings.data.pictures, self.kit.roster.terms.unit)
        tests = sum(len(found.examples) for found in data.tests.values())
        return f"{len(data.train.examples):,} training examples, {tests:,} to score"

    def _check_texts(self) -> str:
        settings, data = self.settings, self.data
        named, probe = settings.model, settings.probe
        own = self.base[1] if self.base else load_tokenizer(named.path, gguf_file=named.gguf_file)
        for found in (data.train, *data.tests.values()):
            read = read_lengths(own, found, settings.training.max_length, "training.max_length")
            self._lengths = self._lengths or read
            share = f"{100 * read.cut / len(found.examples):.3g} % of them cut" if read.cut else "none cut"
            self.reading.append(f"{found.words()}; the longest has {read.longest:,} tokens, {share}")
            self.warnings += [read.warning] if read.warning else []
        if self._releases_profile:
            same = self.base is None and (probe.path, probe.gguf_file) == (named.path, named.gguf_file)
            tokenizer = own if same else load_tokenizer(probe.path, gguf_file=probe.gguf_file)
            plain = read_as_text(tokenizer, data.train.examples)
            told = replace(data.train, examples=plain)
            read = read_lengths(tokenizer, told, settings.profile_max_length, "profile_max_length")
            self.warnings += [read.warning] if read.warning else []
        return "; ".join(self.reading)

    def _check_server(self) -> str:
        roster = self.kit.roster
        family = roster.member(self.kit.member_id()).family
        adapter = roster.terms.adapter
        enrolled = ask_to_enrol(self.transport, roster, adapter.spec_hash, family, check_only=True)
        if self.record is not None:
            check_run(self.record, self.settings.state_dir, enrolled.run_id)
            check_server(self.record, enrolled.round, enrolled.head)
        self._kept = enrolled.ledger_head
        return f"{self.settings.server} accepts us; round {enrolled.round} of {enrolled.rounds}"

    def _check_budget(self) -> str:
        target = agreed_epsilon(self.settings, self.kit)
        wanted = self._parameters(target)
        if has_begun(self._ledger):
            check_parameters(wanted, read_ledger(self._ledger))
        self._books.check(self._unit_ids, self._kept)
        plan = self.plan
        self._warn_of_earlier_runs(wanted, plan)
        budget = f"ε = {target:g} at δ = {wanted.delta:.1e}"
        if not self.kit.roster.terms.adapter.private:
            return f"{budget}, for the task profile"
        return f"{budget}; planned σ = {plan.noise_multiplier:.3f} at q = {plan.sampling_rate:.4f}"

    def _warn_of_earlier_runs(self, wanted: LedgerParameters, plan: AdapterPlan) -> None:
        """Say that other runs have left too little of the budget for all that this one is to release."""
        terms, run = self.kit.roster.terms, self.record.run_id if self.record else ""
        rows = read_ledger(self._ledger) if has_begun(self._ledger) else []
        earlier = charges([row for row in rows if row.context != run], wanted.budgeted_channels)
        release = Release("profile", None, data_epoch(self._unit_ids), terms.profile.sha256)
        profile, _ = plan_inputs(terms, len(self._unit_ids))
        planned = [] if release.made(rows) else profile
        if terms.adapter.private:
            steps = self.kit.roster.private_steps
            planned.append(GaussianEvent(plan.noise_multiplier, plan.sampling_rate, steps))
        if not earlier or not planned:
            return
        bound = bound_of([*earlier, *map(Charge, planned)], wanted.delta, wanted.accountant)
        if wanted.target_epsilon is not None and not bound.epsilon <= wanted.target_epsilon:
            self.warnings.append(
                f"earlier runs have spent a part of the budget of these data: with all that this one is to "
                f"release, ε would be {bound.epsilon:.3g}, above {wanted.target_epsilon:g}. Once the budget "
                "is spent, this client only receives; data that share no example with these have a budget of "
                "their own"
            )

    def _check_memory(self) -> str:
        if self._given.model is not None:
            return "not worked out: the model that was handed over is in memory already"
        words, fits = check_memory(self.settings, self.kit.roster.terms.adapter, self._lengths)
        if not fits:
            self.warnings.append(words)
        return words if fits else "this may not suffice"

    def _parameters(self, target: float) -> LedgerParameters:
        terms, units = self.kit.roster.terms, len(self._unit_ids)
        return ledger_parameters(self._ledger, self.kit.member_id(), terms, units, target)

    @property
    def _books(self) -> DataLedger:
        settings, member = self.settings, self.kit.member_id()
        record = self.record or SessionRecord(federation=self.kit.roster.federation, client=member)
        return DataLedger.of(settings.data, settings.state_dir, record)

    @property
    def _ledger(self) -> Path:
        return self._books.place / LEDGER

    @property
    def _releases_profile(self) -> bool:
        return len(self._unit_ids) >= self.kit.roster.terms.profile.minimum_examples

    @property
    def _unit_ids(self) -> tuple[str, ...]:
        """What the terms protect: examples, or persons."""
        return unit_ids(self.data.train.examples, self.kit.roster.terms.unit)

    def _check_probe(self) -> str:
        settings, mechanism, train = self.settings, self.kit.roster.terms.profile, self.data.train.examples
        if not self._releases_profile:
            return f"not needed: fewer than {mechanism.minimum_examples} examples release no profile"
        epoch = data_epoch(self._unit_ids)
        if profile_path(self._ledger.parent, epoch, mechanism).exists():
            return "not needed: the profile of these examples was released"
        client_probe(settings, self.kit, train, SecureNoise()).check()
        return f"{mechanism.probe}, fingerprint {mechanism.probe_sha256[:16]}…"

    def _check_model(self) -> str:
        learner, adapter = self.learner, self.kit.roster.terms.adapter
        if learner.adapter_spec_hash != adapter.spec_hash:
            raise ModelError(
                "this model's adapter has another layout than the roster's: compare adapter.target_modules, "
                "rank, alpha, blocks, basis and basis_seed with the linear modules of this model's decoder "
                "layers"
            )
        learner.check_tests()
        path = self.base[0].name_or_path if self.base else self.settings.model.path
        return f"{path}, adapter of {adapter.shared_dimensions:,} values"


def agreed_epsilon(settings: ClientSettings, kit: Kit) -> float:
    """The client's budget for the run; ConfigurationError if it is looser than the federation's."""
    agreed = kit.roster.terms.adapter_privacy.target_epsilon
    target = settings.target_epsilon or agreed
    if target > agreed:
        raise ConfigurationError(
            f"target_epsilon is {target}, the federation's is {agreed}; a client may be stricter, not looser"
        )
    return target


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), path)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
