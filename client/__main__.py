"""`fedmosaic client CONFIG`: take part in a federation as one client."""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers.utils.logging import disable_progress_bar

from fedmosaic.client.clipping import CLIPPING, ClippingRecord
from fedmosaic.client.keyring import Keyring
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.ledger import DataLedger
from fedmosaic.client.model.scoring import Score
from fedmosaic.client.preflight.checks import Preflight, agreed_epsilon
from fedmosaic.client.profile.maker import ProfileProbe
from fedmosaic.client.progress import LoggedProgress
from fedmosaic.client.protection import Identity, Protection
from fedmosaic.client.releases import AdapterPlan, Releases, budgeted_channels
from fedmosaic.client.session import Session
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import for_handing_over, statement_inputs, with_warning
from fedmosaic.client.transport.traffic import Traffic
from fedmosaic.privacy.configuration import parse_json, read_configuration
from fedmosaic.privacy.federation.kits import Kit, open_kit
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.shareable import shareable
from fedmosaic.privacy.terminal import guarded
from fedmosaic.protos.errors import NOTHING_EXCHANGED, ModelError, StateError

log = logging.getLogger("fedmosaic.client")
RESULT = "result.json"
STATEMENT = "statement.json"
TRAFFIC = "traffic.json"
NOTHING_RECEIVED = (
    "YOU RECEIVED NOTHING from the other members in any of the {rounds} rounds: this client trained alone. "
    "The lines 'no … aggregate' above tell why, round by round; a policy needs enough members that contribute"
)


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
    return 0 if run(settings) else NOTHING_EXCHANGED


def run(settings: ClientSettings) -> bool:
    """Take part with these settings; see `fedmosaic.client.session.Session.run` for the errors.

    Returns:
        Whether anything was received from the others, in any round.
    """
    kit = open_kit(settings.kit)
    client_id = kit.member_id()
    state = ClientState(settings.state_dir, kit.roster.federation, client_id)
    progress = LoggedProgress(settings.state_dir / "progress.jsonl")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    member = kit.roster.member(client_id)
    counted = Traffic(settings.state_dir / TRAFFIC)
    with closing(Preflight(settings, progress, traffic=counted)) as checked, ExitStack() as held:
        held.callback(state.release)
        checked.require(log.warning)
        learner, plan, transport = checked.learner, checked.plan, checked.transport
        if kit.roster.terms.adapter.private:
            log.info(
                "planned σ = %.3f at q = %.4f for the adapter", plan.noise_multiplier, plan.sampling_rate
            )
        books = DataLedger.of(settings.data.train, settings.data.ledger, settings.state_dir, state.record)
        channels, target = budgeted_channels(kit.roster.terms), agreed_epsilon(settings, kit)
        epoch = data_epoch(learner.example_ids)
        with books.open(learner.example_count, epoch, target, channels) as ledger:
            releases = _releases(settings, kit, ledger, state, learner, plan)
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
                result.put_scores("before", learner.evaluate())
            started = time.monotonic()
            Session(identity, kit.roster, transport, learner, state, releases, protection, progress).run()
            books.remember(ledger)
            result.put("seconds", time.monotonic() - started)
            result.put_scores("after", scores_after(learner))
            progress.stage(0, "writing the privacy statement")
            facts = statement_inputs(
                kit.roster,
                state.record.run_id,
                client_id,
                ledger,
                plan,
                smallest_row=state.smallest_row(),
                clipped_share=releases.clipping.shares(),
            )
            received, rounds = state.record.received_rounds, kit.roster.terms.schedule.rounds
            result.put("received_rounds", received)
            # Whether an aggregate could be used is for this client's own eyes; the server does not learn it.
            own = statement(facts)
            own = own if received else with_warning(own, NOTHING_RECEIVED.format(rounds=rounds))
            write_atomically(state.directory / STATEMENT, own.model_dump_json(indent=2).encode())
            told = shareable(for_handing_over(facts, kit.roster.terms, learner.example_count))
            transport.report(told.model_dump_json().encode())
            result.put("traffic", transport.traffic().as_dict())
            progress.stage(0, "done")
            if not received:
                log.error(NOTHING_RECEIVED.format(rounds=rounds))
            return received > 0


def scores_after(learner: ModelLearner) -> dict[str, Score]:
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

    def put_scores(self, when: str, scores: Mapping[str, Score]) -> None:
        self.put(when, {name: score.value for name, score in scores.items()})
        self.put("measures", {name: score.measure for name, score in scores.items()})


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
