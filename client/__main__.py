"""`fedmosaic client CONFIG`: take part in a federation as one client."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers.utils.logging import disable_progress_bar

from fedmosaic.client.clipping import CLIPPING, ClippingRecord
from fedmosaic.client.keyring import Keyring
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.probing import ProfileProbe
from fedmosaic.client.progress import LoggedProgress
from fedmosaic.client.protection import Identity, Protection
from fedmosaic.client.releases import (
    AdapterPlan,
    Releases,
    budgeted_channels,
    plan_adapter,
    sampling_rate,
)
from fedmosaic.client.session import Session
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import build_statement
from fedmosaic.client.traffic import Traffic
from fedmosaic.client.transport import GrpcTransport
from fedmosaic.privacy.accounting import default_delta
from fedmosaic.privacy.configuration import parse_json, read_configuration
from fedmosaic.privacy.federation import Kit, open_kit
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger import Ledger, parameters_of, read_ledger
from fedmosaic.privacy.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.report_costs import shareable
from fedmosaic.privacy.terminal import guarded
from fedmosaic.protos.errors import ConfigurationError, LedgerError, ModelError, StateError

log = logging.getLogger("fedmosaic.client")
RESULT = "result.json"
STATEMENT = "statement.json"
TRAFFIC = "traffic.json"


@dataclass(frozen=True)
class Arguments:
    """Take part in a federation as one client, until its last round. Stop and start it as you like."""

    config: tyro.conf.Positional[Path]
    """The client's configuration (TOML or JSON); the README shows one."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic client` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic client")
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    settings = read_configuration(parsed.config, ClientSettings).resolved(parsed.config.parent)
    run(settings)
    return 0


def run(settings: ClientSettings) -> None:
    """Take part with these settings; see `fedmosaic.client.session.Session.run` for the errors."""
    kit = open_kit(settings.kit)
    client_id = kit.member_id()
    state = ClientState(settings.state_dir, kit.roster.federation, client_id)
    progress = LoggedProgress(settings.state_dir / "progress.jsonl")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    member = kit.roster.member(client_id)
    progress.stage(0, "loading the model")
    learner = ModelLearner(settings, kit.roster.terms, member.family, progress)
    _check_layout(learner, kit)
    with _open_ledger(settings, kit, client_id, learner.example_count) as ledger:
        plan = _plan(settings, kit, ledger, learner.example_count)
        releases = _releases(settings, kit, ledger, state, learner, plan)
        transport = GrpcTransport(
            settings.server,
            authority=kit.authority,
            certificate=kit.tls_certificate,
            private_key=kit.tls_key,
            traffic=Traffic(settings.state_dir / TRAFFIC),
        )
        try:
            identity = Identity(client_id, kit.signing_key())
            encrypted = kit.roster.terms.adapter.encrypted
            keyring = (
                Keyring(client_id, identity.signing_key, kit.roster, transport, state.directory / "keys")
                if encrypted
                else None
            )
            protection = Protection(identity, kit.roster, member.family, keyring)
            result = _Result(state.directory / RESULT)
            if not result.has("before"):
                result.put("before", learner.evaluate())
            started = time.monotonic()
            Session(identity, kit.roster, transport, learner, state, releases, protection, progress).run()
            result.put("seconds", time.monotonic() - started)
            result.put("after", scores_after(learner))
            progress.stage(0, "writing the privacy statement")
            statement = build_statement(
                kit.roster,
                state.record.run_id,
                ledger,
                plan,
                smallest_row=state.smallest_row(),
                clipped_share=releases.clipping.shares(),
            )
            write_atomically(state.directory / STATEMENT, statement.model_dump_json(indent=2).encode())
            transport.report(shareable(statement).model_dump_json().encode())
            result.put("traffic", transport.traffic().as_dict())
            progress.stage(0, "done")
        finally:
            transport.close()
            state.release()


def scores_after(learner: ModelLearner) -> dict[str, float]:
    """The scores with what was received; none, and still no other end, if they cannot be computed with it."""
    try:
        return learner.evaluate()
    except ModelError as error:
        log.error("no scores after the run: %s", error)
        return {}


class _Result:
    """What a client's own people read afterwards; it stays in the state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = _read_result(path) if path.exists() else {}

    def has(self, key: str) -> bool:
        return key in self._content

    def put(self, key: str, value: object) -> None:
        self._content[key] = value
        write_atomically(self._path, json.dumps(self._content, indent=2).encode())


def _read_result(path: Path) -> dict[str, object]:
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} is damaged ({error}); delete it: only the scores before training are lost"
        ) from None


def _check_layout(learner: ModelLearner, kit: Kit) -> None:
    if learner.adapter_spec_hash != kit.roster.terms.adapter.spec_hash:
        raise ModelError(
            "this model's adapter has another layout than the roster's: compare adapter.target_modules, "
            "rank, alpha, blocks, basis and basis_seed with the linear modules of this model's decoder layers"
        )


def _open_ledger(settings: ClientSettings, kit: Kit, client_id: str, examples: int) -> Ledger:
    agreed = kit.roster.terms.adapter_privacy.target_epsilon
    target = settings.target_epsilon or agreed
    if target > agreed:
        raise ConfigurationError(
            f"target_epsilon is {target}, the federation's is {agreed}; a client may be stricter, not looser"
        )
    path = settings.state_dir / "ledger.sqlite"
    return Ledger.open(
        path,
        client_id,
        ledger_delta(path, examples),
        target,
        budgeted_channels=budgeted_channels(kit.roster.terms),
    )


def ledger_delta(path: Path, examples: int) -> float:
    """δ of the ledger that is there, for as long as it is at most 1/n; of a new one, n^-1.1.

    Args:
        path: the ledger, there or not.
        examples: n, the client's number of examples now.

    Raises:
        LedgerError: its δ is above 1/n, or it is damaged.
    """
    if not path.exists():
        return default_delta(examples)
    delta = parameters_of(read_ledger(path)).delta
    if delta * examples > 1.0:
        raise LedgerError(
            f"{path}: δ = {delta:g} was fixed when there were fewer examples, and {examples} need one below "
            f"1/{examples}; take part with at most {int(1 / delta)} examples. A fresh ledger would forget "
            "what this one has spent; it is right only for data that share no example"
        )
    return delta


def _plan(settings: ClientSettings, kit: Kit, ledger: Ledger, examples: int) -> AdapterPlan:
    terms = kit.roster.terms
    if not terms.adapter.private:
        return AdapterPlan(0.0, sampling_rate(terms, examples))
    target = settings.target_epsilon or terms.adapter_privacy.target_epsilon
    plan = plan_adapter(terms, examples, ledger.parameters.delta, target)
    log.info("planned σ = %.3f at q = %.4f for the adapter", plan.noise_multiplier, plan.sampling_rate)
    return plan


def _releases(
    settings: ClientSettings,
    kit: Kit,
    ledger: Ledger,
    state: ClientState,
    learner: ModelLearner,
    plan: AdapterPlan,
) -> Releases:
    terms = kit.roster.terms
    seed = settings.unsafe_test_noise_seed
    if seed is not None:
        log.warning("TEST NOISE from seed %d: predictable, so no privacy guarantee holds", seed)
    randomness = SecureNoise() if seed is None else SeededTestNoise(seed)
    probe = ProfileProbe(
        settings.probe,
        terms.profile,
        kit.basis,
        learner.examples,
        settings.profile_max_length,
        randomness,
        ClippingRecord(state.directory / CLIPPING),
    )
    return Releases(ledger, terms, state, learner.example_ids, probe, randomness, plan)


if __name__ == "__main__":
    sys.exit(guarded("fedmosaic client", lambda: main(sys.argv[1:])))
