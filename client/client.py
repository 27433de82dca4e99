"""A client, put together: the one place where kit, keys, ledger, releases and session meet.

    result = Client("client.toml").run()
    result = Client("client.toml", model=model, tokenizer=tokenizer, examples=rows, ledger="books").run()

`Participant` is the part that does not care where its model, its data and its server come from; simulations,
attacks and tests stand on it. `Client` brings a client's own: its configuration, its model, gRPC.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedmosaic.client import statement as statements
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.ledger import NO_LEDGER, DataLedger, audited
from fedmosaic.client.model.scoring import Score
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.preflight.checks import Given, Preflight, agreed_epsilon
from fedmosaic.client.profile.release import client_probe
from fedmosaic.client.progress import LoggedProgress, Progress, Tracker
from fedmosaic.client.result.comparison import ALONE, BASE, FEDERATED, Comparison, compare
from fedmosaic.client.result.ending import ResultFile
from fedmosaic.client.result.saved import SavedModel
from fedmosaic.client.round.group_session import GroupSession
from fedmosaic.client.round.keyring import Keyring
from fedmosaic.client.round.membership import Learner
from fedmosaic.client.round.protection import Identity, Protection
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.round.session import Session
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import ClientState
from fedmosaic.client.transport.connection import open_channel
from fedmosaic.client.transport.grpc import Connect, Traffic, Transport
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation.kits import Kit, keep_signed, open_kit
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import PrivacyStatement, StatementInputs
from fedmosaic.privacy.statement.shareable import shareable
from fedmosaic.protos.errors import ConfigurationError, ModelError, RefusedError, TransportError

log = logging.getLogger("fedmosaic.client")
RESULT = "result.json"
TRAFFIC = "traffic.json"
NOTHING_RECEIVED = (
    "YOU RECEIVED NOTHING from the other members in any of the {rounds} rounds: this client trained alone. "
    "The lines 'no … aggregate' above tell why, round by round; a policy needs enough members that contribute"
)
_NOT_HANDED_OVER = (
    "the run is over and all of yours is here; the server did not get your statement (%s). It may have ended "
    "after its grace_seconds: if its operator starts it again, so start this client again"
)


class Participant:
    """A member's `session` in a federation, and what its statement is made from."""

    def __init__(
        self,
        kit: Kit,
        transport: Transport,
        learner: Learner,
        state: ClientState,
        ledger: Ledger,
        plan: AdapterPlan,
        releases: Releases,
        progress: Progress,
    ) -> None:
        """Put the session together; nothing is sent yet. The caller closes the ledger."""
        roster, client_id = kit.roster, kit.member_id()
        identity = Identity.of(kit)
        encrypted = roster.terms.adapter.encrypted
        keys = state.directory / "keys"
        keyring = Keyring(client_id, identity.signing_key, roster, transport, keys) if encrypted else None
        protection = Protection(identity, roster, roster.member(client_id).family, keyring)
        self.state = state
        ledger.tell(audited(state.audit, client_id, roster))
        kind = GroupSession if roster.terms.adapter.in_group_sums else Session
        self.session = kind(kit, identity, transport, learner, state, releases, protection, progress)
        self._ledger, self._plan = ledger, plan

    def statement_inputs(self) -> StatementInputs:
        """What the statements of this member are made from, as the ledger stands now."""
        return statements.statement_inputs(self.session.roster, self.state, self._ledger, self._plan)


@dataclass(frozen=True)
class ClientResult:
    """What a client has after the last round. All of it is for the client's own people.

    Attributes:
        before: share of right answers before the first round, in [0, 1], by test set; "self" is the own one.
        after: the same after the last round; empty if no scores could be computed.
        statement: who learns what about the client's data, at which ε.
        traffic: bytes sent and received, by channel.
        received_rounds: rounds that began with an aggregate of the others; 0 if this client trained alone.
        adapter: folder of the trained adapter, which PEFT loads; None if none was trained.
        state: the state directory, which `fedmosaic report`, `export`, `chat` and `predict` read.
        comparison: base, alone and federated on the own test rows; None without such rows.
        model: with the adapter, ready to generate; it stays in memory as long as this result does.
        tokenizer: of the model.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    statement: PrivacyStatement
    traffic: Mapping[str, Mapping[str, int]]
    received_rounds: int
    adapter: Path | None
    state: Path
    comparison: Comparison | None
    model: PeftModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)


class Client:
    """One client of a federation."""

    def __init__(
        self,
        settings: ClientSettings | Path | str,
        *,
        model: Any = None,
        tokenizer: Any = None,
        examples: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        ledger: Path | str | None = None,
        connect: Connect = open_channel,
    ) -> None:
        """Prepare; nothing is opened yet. What is handed over passes the same checks as what is in files.

        Args:
            settings: the client's, or the file that they are in (TOML or JSON; its relative paths are taken
                from the file's directory).
            model: a loaded causal language model of transformers, instead of `[model] path`. `run` puts
                adapter layers into this very model and freezes its weights, which stay as they are; it runs
                on the device and in the type that it has. A model that carries adapters is refused.
            tokenizer: of the model; it is copied.
            examples: training examples instead of `data.train`: dictionaries with the columns of a file, or a
                `datasets.Dataset`.
            test: examples to score, instead of `data.test`.
            ledger: directory of the data's privacy ledger, as `data.ledger`; one of them is needed for
                examples that are handed over.
            connect: opens the channel to the server, for what carries calls another way than TCP.

        Raises:
            ConfigurationError: the file cannot be read, a setting is wrong or missing, or something is both
                named and handed over.
        """
        if not isinstance(settings, ClientSettings):
            file = Path(settings)
            settings = read_configuration(file, ClientSettings).located(file.parent)
        if (model is None) != (tokenizer is None):
            raise ConfigurationError("hand over model and tokenizer together, or name both in [model] path")
        if ledger is not None:
            data = settings.data.model_copy(update={"ledger": Path(ledger)})
            settings = settings.model_copy(update={"data": data})
        self._given = Given(None if model is None else (model, tokenizer), examples, test, connect)
        self.settings = settings
        settings.check_complete(model=model is not None, train=examples is not None, test=test is not None)
        if examples is not None and settings.data.ledger is None:
            raise ConfigurationError(NO_LEDGER.format("handed over in Python"))

    def run(self) -> ClientResult:
        """Take part until the last round, from where an earlier process stopped.

        Raises:
            FedMosaicError: a check before the first round fails, or see `Session.run`.
        """
        settings, seed = self.settings, self.settings.unsafe_test_noise_seed
        if seed is not None:
            log.warning("TEST NOISE from seed %d: predictable, so no privacy guarantee holds", seed)
        kit = open_kit(settings.kit)
        state = ClientState(settings.state_dir, kit.roster.federation, kit.member_id())
        with ExitStack() as held:
            held.callback(state.release)
            progress = LoggedProgress(settings.state_dir / "progress.jsonl")
            if settings.threads:
                torch.set_num_threads(settings.threads)
            traffic = Traffic(settings.state_dir / TRAFFIC)
            preflight = Preflight(settings, progress, traffic=traffic, given=self._given)
            checked = held.enter_context(closing(preflight))
            checked.require(log.warning)
            for line in checked.reading:
                log.info("%s", line)
            learner, plan = checked.learner, checked.plan
            tracker = held.enter_context(closing(Tracker(settings.report_to, settings.state_dir)))
            learner.track = tracker.log
            if kit.roster.terms.adapter.private:
                log.info("adapter: planned σ = %.3f, q = %.4f", plan.noise_multiplier, plan.sampling_rate)
            books = DataLedger.of(settings.data, settings.state_dir, state.record)
            target = agreed_epsilon(settings, kit)
            ledger = held.enter_context(books.open(kit.roster.terms, learner.example_ids, target))
            randomness = SecureNoise() if seed is None else SeededTestNoise(seed)
            probe = client_probe(settings, kit, learner.examples, randomness, progress.advance)
            releases = Releases(ledger, kit.roster.terms, state, learner.example_ids, probe, randomness, plan)
            member = Participant(kit, checked.transport, learner, state, ledger, plan, releases, progress)
            SavedModel.of(settings, kit.roster, kit.member_id()).write(state.directory)
            result = ResultFile(state.directory / RESULT)
            result.put("certificate_expires", kit.expires.isoformat())
            if not result.has("before"):
                result.put_scores("before", learner.evaluate())
                tracker.log_scores(result.scores("before"))
            started = time.monotonic()
            member.session.run()
            books.remember(ledger)
            result.put("seconds", time.monotonic() - started)
            result.put_scores("after", scores_after(learner))
            tracker.log_scores(result.scores("after"))
            return self._finish(checked, member, result)

    def _finish(self, checked: Preflight, member: Participant, result: ResultFile) -> ClientResult:
        """Statements, the last message to the server, and what this client's own people learn."""
        learner, state, progress = checked.learner, member.state, checked.progress
        progress.stage(0, "writing the privacy statement")
        own = _conclude(checked, member, result)
        traffic = checked.transport.traffic().as_dict()
        # The connection is closed first, so that no time which the server sees depends on what follows.
        checked.close()
        rounds = checked.kit.roster.terms.schedule.rounds
        comparison = _compare(result, learner, rounds, alone=self.settings.compare_alone)
        progress.stage(0, "done")
        newest, (model, tokenizer) = state.latest_adapter(), learner.trained
        return ClientResult(
            before=result.scores("before"),
            after=result.scores("after"),
            statement=own,
            traffic=traffic,
            received_rounds=state.record.received_rounds,
            adapter=newest[1] if newest else None,
            state=state.directory,
            comparison=comparison,
            model=model,
            tokenizer=tokenizer,
        )


def _conclude(checked: Preflight, member: Participant, result: ResultFile) -> PrivacyStatement:
    """Write the own statement, hand the shareable one over, and say what came of the run."""
    terms, transport = checked.kit.roster.terms, checked.transport
    facts, state, most = member.statement_inputs(), member.state, checked.data.train.most_of_one_person
    received, rounds = state.record.received_rounds, terms.schedule.rounds
    result.put("received_rounds", received)
    result.put("certificate_expires", checked.kit.expires.isoformat())
    # Whether an aggregate could be used is for this client's own eyes; the server does not learn it.
    own = statement(facts)
    own = own if received else statements.with_warning(own, NOTHING_RECEIVED.format(rounds=rounds))
    if most > 1 and terms.unit == "example":
        own = statements.with_warning(own, statements.person_words(facts, most))
    keep_signed(checked.kit.directory, member.session.roster, state.directory)
    write_atomically(state.directory / statements.STATEMENT, own.model_dump_json(indent=2).encode())
    told = shareable(statements.for_handing_over(facts, terms, checked.learner.example_count))
    write_atomically(state.directory / statements.HANDED_OVER, told.model_dump_json(indent=2).encode())
    try:
        transport.report(told.model_dump_json().encode())
    except RefusedError:
        raise
    except TransportError as error:  # nothing of this client waits for the server any more
        log.error(_NOT_HANDED_OVER, error)
    result.put("traffic", transport.traffic().as_dict())
    if not received:
        log.error(NOTHING_RECEIVED.format(rounds=rounds))
    return own


def _compare(result: ResultFile, learner: ModelLearner, rounds: int, *, alone: bool) -> Comparison | None:
    """Compare base, alone and federated on the own test rows; None without rows that all were scored on."""
    if alone and result.score(ALONE, "self") is None:
        found = learner.score_alone(rounds)
        if found is not None:
            result.put_scores(ALONE, {"self": found})
    stored = {BASE: "before", FEDERATED: "after"} | ({ALONE: ALONE} if alone else {})
    scores = {name: score for name, when in stored.items() if (score := result.score(when, "self"))}
    if not {BASE, FEDERATED} <= scores.keys() or len({len(score.right) for score in scores.values()}) > 1:
        return None
    ordered = {name: scores[name] for name in (BASE, ALONE, FEDERATED) if name in scores}
    comparison = compare(ordered)
    result.put("comparison", comparison.model_dump() | {"verdict": comparison.verdict()})
    return comparison


def scores_after(learner: ModelLearner) -> dict[str, Score]:
    """The scores with what was received; none, and still no other end, if they cannot be computed with it."""
    try:
        return learner.evaluate()
    except ModelError as error:
        log.error("no scores after the run: %s", error)
        return {}
