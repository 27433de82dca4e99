"""Lets time pass in a run: deadlines, key epochs, sums, and from one round to the next."""

import hashlib
import json
import logging
import struct
import time
from dataclasses import replace

from fedmosaic.protos.messages import Phase
from fedmosaic.server.keys.epoch import KeyEpoch
from fedmosaic.server.keys.relay import KeyRelay
from fedmosaic.server.round import state as rounds
from fedmosaic.server.round.close import ClosedRound, Closer, DamagedUploadsError
from fedmosaic.server.run import UNDER_REVIEW, Position, Run

log = logging.getLogger(__name__)
_SECONDS_TO_SEND_AGAIN = 60.0
"""How long a member has to send an upload again that this server has lost."""


class Rounds:
    """Moves one run on; safe to call from many threads."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._tidied = 0
        self._closer = Closer(run.settings, run.store, run.blobs, run.aggregator, run.traces)

    def go_on(self) -> None:
        """Show the witness again what a stopped server had shown it."""
        self._run.traces.open_round(self._run.round.number)
        if self._run.round.phase is Phase.CLOSED:
            self._close(self._run.round.number)

    def advance(self) -> bool:
        """See `Coordinator.advance`."""
        run = self._run
        run.store.check_hold()
        keys_changed, due = False, []
        with run.lock:
            there, now = run.round.members - run.round.absent, run.clock()
            if run.keys is not None and run.round.phase is not Phase.FINISHED:
                keys_changed = run.keys.advance(run.round.sharing_key, now)
            if run.sums is not None:
                keys_changed |= run.sums.advance(there, now)
                due = run.sums.due()
        for finish in due:
            finish()  # takes the masks off, which may take minutes
        with run.lock:
            before = run.round
            if run.keys is None or run.keys.ready:
                run.round = before.ticked(run.clock())
            after = run.round
        closing, extended = after.phase is not before.phase, after.extensions > before.extensions
        if extended:
            log.warning("%s", after.extended())
        witnessed = None if closing else run.witnessing.result(run.clock())
        if closing:
            self._close(after.number)
        elif witnessed is not None:
            self._finish(*witnessed)
            closing = True
        if closing:
            run.changed("round")
        if keys_changed or due:
            run.changed("keys")
        return keys_changed or bool(due) or closing or extended

    def tidy(self) -> None:
        """Remove what nobody asks for, beside uploads of the last closed round, and write what is due."""
        number = self._run.round.number
        if number != self._tidied:
            self._run.blobs.remove_before("aggregates", number)
            self._run.blobs.remove_before("uploads", number - 1)
            self._tidied = number
        self._run.account.keep_up(self._run.round)

    def repair(self, client: str) -> None:
        """Make a client's damaged aggregate of the open round anew."""
        run = self._run
        with run.lock:
            offer = run.position.offer
            stored = {**offer.stored, client: self._closer.repair(offer, client)}
            offer = replace(offer, stored=stored, made={})
            run.position = replace(run.position, offer=offer)

    def _close(self, number: int) -> None:
        run = self._run
        log.info("%s", run.state_line())
        try:
            # Sums are made for all members, whoever takes part in them.
            sampled = run.settings.terms.schedule.sampled_clients is not None and run.sums is None
            recipients = run.taking_part(number + 1) if sampled else None
            with run.traces.span("close", number):
                closed = self._closer.close(number, recipients)
            if run.sums is not None:
                run.sums.close_round(number)
            if run.witnessing.due(number):
                with run.lock:
                    run.store.put({UNDER_REVIEW: str(number)})
                    run.witnessing.begin(number, closed, run.round.contributors, run.clock())
                log.info("%s", run.state_line())
                return
            self._finish(number, closed)
        except DamagedUploadsError as error:
            self._ask_again(number, error)
            return
        except BaseException:
            with run.lock:
                if run.round.number == number:
                    run.round = replace(run.round, phase=Phase.OPEN)
            raise

    def _finish(self, number: int, closed: ClosedRound) -> None:
        run = self._run
        with run.lock:
            self._open_next(number, closed)
        run.audit.add("closed", round=number, head=run.position.head.hex())
        for recipient in closed.offer.stored if closed.refusals else ():  # each of which has its line
            for section, _ in closed.offer.sections(run.settings, recipient):
                if section.row is None:
                    run.audit.add("withheld", client=recipient, round=number, section=section.name)
        for line in closed.refusals:
            log.warning("%s", line)
        log.info("%s", run.state_line())

    def _ask_again(self, number: int, damaged: DamagedUploadsError) -> None:
        """Open the round again for those whose upload this server has lost; they have it still."""
        run = self._run
        with run.lock:
            state = replace(run.round, phase=Phase.OPEN)
            run.store.drop_uploads(number, damaged.clients)
            run.round = state.reopened(damaged.clients, run.clock() + _SECONDS_TO_SEND_AGAIN)
        log.error("%s. They are asked to send it again, for %.0f s", damaged, _SECONDS_TO_SEND_AGAIN)

    def _open_next(self, number: int, closed: ClosedRound) -> None:
        """Close a round and open the next: a server killed at any time has all of it, or nothing."""
        run, now = self._run, self._run.clock()
        state, made = run.round.following(now), closed.offer.stored
        digests = [digest for _, digest in sorted(run.round.arrived.items())]
        digests += [aggregate.sha256 for _, aggregate in sorted(made.items())]
        before = run.position.head + struct.pack("<Q", number)
        head = hashlib.sha256(b"".join([before, *digests])).digest()
        absent = json.dumps(sorted(state.absent))
        metadata = {"round": str(state.number), "absent": absent, "head": head.hex()}
        epoch = None
        if run.keys is not None and state.phase is not Phase.FINISHED:
            epoch = self._next_epoch(run.keys, state, now)
            metadata |= {**KeyRelay.record(epoch), "rotate": "0"}
        result = {**closed.result, "closed_at": time.time(), "extensions": run.round.extensions}
        if run.sums is not None:
            result["received"] = run.sums.receivers(number)
        run.store.close_round(number, result, made, metadata, key_epoch=epoch.epoch if epoch else 0)
        if run.sums is not None:
            run.sums.open_round(state.number, now)
        if run.keys is not None and epoch is not None:
            run.keys.adopt(epoch)
        # Last: whoever sees it finds everything else in place.
        run.position, run.account.due = Position(state, head, closed.offer), True
        run.witnessing.end()
        run.traces.open_round(state.number)

    def _next_epoch(self, keys: KeyRelay, opened: rounds.Round, now: float) -> KeyEpoch:
        """The key epoch that is due for a round: a new one where a member that is there has no key.

        Of those that are not drawn, members without the key join when it is their turn, some together.
        """
        store = self._run.store
        without_key = (store.enrolled() & opened.needing_key) - opened.absent - keys.holders
        renew = bool(without_key) or store.get("rotate") == "1"
        return keys.for_round(opened.number, renew=renew, now=now)
