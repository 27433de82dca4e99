"""The accounting rules where they are enforced: one charge per draw, before it, none for a resend."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import tiny_mechanism
from fedmosaic.client.ledger import budgeted_channels
from fedmosaic.client.planning import AdapterPlan, plan_adapter, sampling_rate
from fedmosaic.client.round.releases import ProfileSum, Releases
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Protection, Terms
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger, read_ledger
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import Float64Array, SecureNoise
from fedmosaic.protos.errors import LedgerError, PrivacyError, StateError

DELTA = 1e-5
MECHANISM = tiny_mechanism(noise_multiplier=2.0)
EVENT = GaussianEvent(1.0, 0.02, 5)
IDS = tuple(f"e{i}" for i in range(400))


def terms(protection: Protection = "dp", **changes: object) -> Terms:
    adapter = AdapterTerms(rank=4, blocks=2, target_modules=("a",), protection=protection)
    fields = {"adapter": adapter, "adapter_privacy": {"expected_batch_size": 8, "steps_per_round": 5}}
    fields |= {"profile": MECHANISM, "schedule": {"rounds": 3}, "encryption": {"backend": "plain"}}
    return Terms.model_validate(fields | {"allow_plaintext": True} | changes)


class Client:
    """A client on one disk; every `opened` is a new process. The ledger stands beside the data."""

    def __init__(
        self, place: Path, agreed: Terms, target: float | None = 8.0, books: Path | None = None
    ) -> None:
        self.place = place
        self.books = books or place.with_name("train.jsonl.ledger")
        self.terms = agreed
        self.target = target
        self.accountant = "rdp"
        self.draws = 0
        self.charges_before_draws: list[int] = []

    def profile_sum(self) -> ClippedSum:
        return ClippedSum(np.full(MECHANISM.dimensions, 2**20, dtype=np.int64), 0, 0, len(IDS))

    def gaussian(self, size: int, standard_deviation: float) -> Float64Array:
        self.charges_before_draws.append(len(self.reserved("profile")))
        self.draws += 1
        return SecureNoise().gaussian(size, standard_deviation)

    @contextmanager
    def opened(
        self, ids: tuple[str, ...] = IDS, summed: ProfileSum | None = None, *, disjoint_epochs: bool = False
    ) -> Iterator[Releases]:
        state = ClientState(self.place, "f", "ada")
        path, channels = self.books / LEDGER, budgeted_channels(self.terms)
        budget: dict[str, Any] = {"accountant": self.accountant, "budgeted_channels": channels}
        ledger = Ledger.open(path, "ada", DELTA, self.target, **budget)
        noise = SecureNoise()
        noise.gaussian = self.gaussian  # type: ignore[method-assign]  # counts the draws
        plan = AdapterPlan(1.0 if self.terms.adapter.private else 0.0, 0.02)
        try:
            summing = summed or self.profile_sum
            yield Releases(
                ledger, self.terms, state, ids, summing, noise, plan, disjoint_epochs=disjoint_epochs
            )
        finally:
            ledger.close()
            state.release()

    def reserved(self, channel: str) -> list[GaussianEvent]:
        rows = read_ledger(self.books / LEDGER)
        return [
            GaussianEvent(row.noise_multiplier or 0.0, row.sampling_rate or 0.0, row.steps or 0)
            for row in rows
            if row.kind == "RESERVED" and row.channel == channel
        ]


def released(releases: Releases, event: GaussianEvent = EVENT) -> list[str]:
    """Release an adapter of round 1; what was done for it, in order."""
    done: list[str] = []
    releases.release_adapter(1, event, lambda: done.append("sum"), lambda _: done.append("noise"))
    return done


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "state", terms())


def test_the_charge_stands_in_the_ledger_before_the_noise_is_drawn(client: Client) -> None:
    with client.opened() as releases:
        assert releases.profile(1) is not None
    assert client.charges_before_draws == [1]


def test_an_adapter_is_summed_charged_noised_and_stored_in_this_order(client: Client) -> None:
    seen: list[tuple[str, int]] = []

    def note(what: str) -> str:
        seen.append((what, len(client.reserved("adapter"))))
        return "0" * 64

    def fail() -> None:
        raise PrivacyError("a private tensor takes part")

    with client.opened() as releases:
        with pytest.raises(PrivacyError, match="takes part"):
            releases.release_adapter(1, EVENT, fail, lambda _: note("noise"))
        releases.release_adapter(
            1, EVENT, lambda: note("sum"), lambda _: note("noise"), lambda _: note("store")
        )
    assert seen == [("sum", 0), ("noise", 1), ("store", 1)]
    assert client.reserved("adapter") == [EVENT]


def test_the_ledger_tells_whether_a_release_under_dp_was_encrypted(tmp_path: Path) -> None:
    """Or a later run on the same data could not tell who has read it."""
    for number, protection in enumerate(("dp", "dp+encrypted")):
        encryption = {"backend": "mask" if number else "plain"}
        client = Client(tmp_path / protection, terms(protection, encryption=encryption))  # type: ignore[arg-type]  # two of them
        with client.opened() as releases:
            released(releases)
        *_, row = (row for row in read_ledger(client.books / LEDGER) if row.kind == "RESERVED")
        assert json.loads(row.mechanism or "")["protection"] == protection


def test_a_damaged_record_of_clipping_costs_nothing(client: Client) -> None:
    with client.opened() as releases:
        releases.clipping.add("adapter", 1, 2)
    (client.place / "clipping.json").write_text("{")
    with pytest.raises(StateError, match=r"clipping\.json is damaged"), client.opened() as releases:
        releases.profile(1)
    assert (client.draws, client.reserved("profile")) == (0, [])


def test_later_rounds_and_restarts_reuse_the_release_of_a_data_epoch(client: Client) -> None:
    with client.opened() as releases:
        first, again = releases.profile(1), releases.profile(1)
    with client.opened() as releases:
        later = releases.profile(3)
    assert first is not None
    assert again is not None
    assert later is not None
    np.testing.assert_array_equal(first.vector, again.vector)
    np.testing.assert_array_equal(first.vector, later.vector)
    assert (client.draws, len(client.reserved("profile"))) == (1, 1)


def _second_run(client: Client) -> Client:
    """The same client and data with a new state directory."""
    return Client(client.place.with_name("second"), client.terms, client.target, client.books)


def _join(client: Client, run: str) -> None:
    state = ClientState(client.place, "f", "ada")
    state.join_run(run)
    state.release()


@pytest.mark.parametrize("protection", ["none", "dp"])
def test_a_second_run_goes_on_with_the_ledger_of_the_first(tmp_path: Path, protection: Protection) -> None:
    client = Client(tmp_path / "first", terms(protection), target=40.0)
    vectors = {"shared": np.ones(4, dtype=np.float32)}
    for number in (1, 2):
        client = client if number == 1 else _second_run(client)
        _join(client, f"run-{number}")
        with client.opened() as releases:
            if protection == "dp":
                released(releases)
            assert releases.profile(1) is not None
            assert releases.adapter(1, {"shared": vectors["shared"] * number})
    assert len(client.reserved("adapter")) == 2, "each run's first round is a release of its own"
    assert len(client.reserved("profile")) == 1, "the profile of unchanged data is one release"
    assert client.draws == 0


def test_another_public_map_makes_another_profile(tmp_path: Path) -> None:
    client = Client(tmp_path / "first", terms("none"))
    with client.opened() as releases:
        releases.profile(1)
    second = _second_run(client)
    second.terms = terms("none", profile=MECHANISM.model_copy(update={"noise_multiplier": 3.0}))
    with second.opened() as releases:
        releases.profile(1)
    assert second.draws == 1
    assert len(second.reserved("profile")) == 2


def test_a_refusal_is_remembered_by_the_next_process(tmp_path: Path) -> None:
    client = Client(tmp_path / "state", terms("dp"), target=0.5)
    with client.opened() as releases:
        assert released(releases, GaussianEvent(0.5, 0.5, 50)) == ["sum"]
        assert releases.receive_only
        assert released(releases) == [], "in receive-only mode nothing is even summed"
    with client.opened() as releases:
        # Trained before the process ended, so `PrivateRound.train` does not run again.
        assert releases.adapter(1, {"shared": np.ones(4, dtype=np.float32)}) == {}
        with pytest.raises(PrivacyError, match="not charged"):
            releases.adapter(2, {"shared": np.ones(4, dtype=np.float32)})


def test_an_acknowledged_profile_is_not_sent_again_until_the_data_changes(client: Client) -> None:
    with client.opened() as releases:
        releases.profile(1)
        releases.profile_acknowledged()
        assert releases.profile(2) is None
    with client.opened(ids=(*IDS, "new")) as releases:
        assert releases.profile(2) is not None
    assert (client.draws, len(client.reserved("profile"))) == (2, 2)


def test_the_average_is_taken_over_noised_releases_and_costs_nothing_more(client: Client) -> None:
    with client.opened() as releases:
        first = releases.profile(1)
    with client.opened(ids=(*IDS, "new")) as releases:
        average = releases.profile(2)
    assert first is not None
    assert average is not None
    stored = [np.load(path) for path in client.books.glob("profile-*.npy")]
    (second,) = (vector for vector in stored if not np.array_equal(vector, first.vector))
    decay = client.terms.relevance.average_decay
    np.testing.assert_allclose(average.vector, decay * first.vector + (1 - decay) * second, rtol=1e-6)
    # Noise added to the average instead would leave its variance at σ²C², and cost a release each time.
    expected = (decay**2 + (1 - decay) ** 2) * MECHANISM.noise_variance
    assert average.noise_variance == pytest.approx(expected)
    assert len(client.reserved("profile")) == 2


def test_bytes_stored_by_a_process_that_died_are_released_as_they_are(client: Client) -> None:
    class Killed(BaseException):
        pass

    with client.opened() as releases:

        def die(sequence: int, digest: str) -> None:
            raise Killed

        original, releases._ledger.released = releases._ledger.released, die  # type: ignore[method-assign]  # a crash
        with pytest.raises(Killed):
            releases.profile(1)
        releases._ledger.released = original  # type: ignore[method-assign]  # put back
    stored = np.load(next(client.books.glob("profile-*.npy")))
    with client.opened() as releases:
        profile = releases.profile(1)
    assert profile is not None
    np.testing.assert_array_equal(profile.vector, stored)
    assert (client.draws, len(client.reserved("profile"))) == (1, 1)


def test_a_draw_that_was_lost_before_it_was_stored_stays_charged_beside_the_new_one(client: Client) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        client.draws += 1
        raise Killed

    with client.opened() as releases:
        releases.randomness.gaussian = killed  # type: ignore[method-assign, assignment]  # a crash
        with pytest.raises(Killed):
            releases.profile(1)
    with client.opened() as releases:
        assert releases.profile(1) is not None
    assert (client.draws, len(client.reserved("profile"))) == (2, 2)


@pytest.mark.parametrize("change", ["one value", "another draw", "another shape", "lost"])
def test_a_stored_profile_that_is_not_the_released_one_is_not_sent(client: Client, change: str) -> None:
    with client.opened() as releases:
        releases.profile(1)
    (path,) = client.books.glob("profile-*.npy")
    vector = np.load(path)
    if change == "one value":
        vector[3] = np.nextafter(vector[3], np.float32(np.inf))
    elif change == "another draw":
        vector = vector + np.random.default_rng(0).normal(size=vector.shape).astype(np.float32)
    else:
        vector = vector[:-1]
    np.save(path, vector)
    if change == "lost":
        path.unlink()
    told = r"not the one that was released|shape|and was released"
    with client.opened() as releases, pytest.raises(StateError, match=told):
        releases.profile(2)
    assert (client.draws, len(client.reserved("profile"))) == (1, 1)


def test_two_runs_at_once_release_one_profile_and_both_send_it(tmp_path: Path) -> None:
    first = Client(tmp_path / "first", terms("none"))
    second = _second_run(first)
    begun, sent = threading.Event(), {}

    def slow() -> ClippedSum:
        begun.set()
        time.sleep(0.2)  # the other run asks meanwhile
        return first.profile_sum()

    def run(client: Client) -> None:
        with client.opened(summed=slow) as releases:
            profile = releases.profile(1)
            assert profile is not None
            sent[client.place] = profile.vector

    threads = [threading.Thread(target=run, args=(client,)) for client in (first, second)]
    threads[0].start()
    begun.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    np.testing.assert_array_equal(sent[first.place], sent[second.place])
    assert first.draws + second.draws == len(first.reserved("profile")) == 1


def test_resending_an_upload_is_free_and_other_bytes_are_refused(client: Client) -> None:
    sent = {"shared": np.ones(4, dtype=np.float32)}
    with client.opened() as releases:
        released(releases)
        releases.adapter(1, sent)
        releases.adapter(1, sent)
    with client.opened() as releases:
        releases.adapter(1, sent)
        with pytest.raises(PrivacyError, match="bytes"):
            releases.adapter(1, {"shared": np.zeros(4, dtype=np.float32)})
    assert client.reserved("adapter") == [EVENT]


def test_in_receive_only_mode_nothing_of_the_adapter_leaves(client: Client) -> None:
    with client.opened() as releases:
        releases.receive_only = True
        assert releases.adapter(1, {"shared": np.ones(4, dtype=np.float32)}) == {}
    assert client.reserved("adapter") == []


def test_epochs_that_share_an_example_are_not_taken_for_disjoint(client: Client) -> None:
    half = len(IDS) // 2
    with client.opened(ids=IDS[:half], disjoint_epochs=True) as releases:
        assert releases.profile(1) is not None
    with (
        client.opened(ids=IDS[half - 1 :], disjoint_epochs=True) as releases,
        pytest.raises(LedgerError, match="is also in an earlier one"),
    ):
        releases.profile(2)
    assert client.draws == 1
    with client.opened(ids=IDS[half:], disjoint_epochs=True) as releases:
        assert releases.profile(2) is not None


def test_a_spent_budget_withholds_the_profile_before_any_noise(tmp_path: Path) -> None:
    client = Client(tmp_path / "state", terms(), target=0.5)
    with client.opened() as releases:
        assert releases.profile(1) is None
    assert client.draws == 0


def test_fewer_examples_than_the_minimum_release_no_profile(client: Client) -> None:
    few = IDS[: MECHANISM.minimum_examples - 1]
    with client.opened(ids=few) as releases:
        assert releases.profile(1) is None
    assert client.draws == 0


@pytest.mark.parametrize(("protection", "covered"), [("none", "nothing"), ("encrypted", "cryptography")])
def test_an_adapter_without_dp_is_recorded_as_infinite_with_what_covers_it(
    tmp_path: Path, protection: Protection, covered: str
) -> None:
    encryption = {"backend": "plain"} if protection == "none" else {"backend": "mask"}
    agreed = terms(protection, encryption=encryption)
    client = Client(tmp_path / "state", agreed)
    with client.opened() as releases:
        releases.adapter(1, {"shared": np.ones(4, dtype=np.float32)})
    rows = [row for row in read_ledger(client.books / LEDGER) if row.kind == "RESERVED"]
    assert [(row.channel, row.covered_by) for row in rows] == [("adapter", covered)]


def test_the_plan_spends_the_target_over_both_channels_and_all_rounds() -> None:
    agreed = terms()
    plan = plan_adapter(agreed, 400, DELTA, 4.0, agreed.private_steps(4))
    assert plan.sampling_rate == sampling_rate(agreed, 400) == 8 / 400
    events = [GaussianEvent(2.0, 1.0, 1), GaussianEvent(plan.noise_multiplier, plan.sampling_rate, 15)]
    spent = epsilon(events, DELTA, "prv")
    assert 3.9 < spent <= 4.0


def test_a_roster_that_shrinks_brings_more_turns_but_no_more_epsilon(tmp_path: Path) -> None:
    """σ was planned for one turn in two rounds; with half of the members every round is one's own."""
    agreed = terms(schedule={"rounds": 4, "sampled_clients": 4})
    assert (agreed.schedule.turns(8), agreed.schedule.turns(4)) == (2, 4)
    sigma = plan_adapter(agreed, 400, DELTA, 2.5, agreed.private_steps(8)).noise_multiplier
    client = Client(tmp_path / "state", agreed, target=2.5)
    client.accountant = "prv"
    event = GaussianEvent(sigma, 8 / 400, agreed.adapter_privacy.steps_per_round)
    with client.opened() as releases:
        assert releases.profile(1) is not None
        done = [releases.release_adapter(n, event, lambda: 0, lambda _: "noisy") for n in range(1, 5)]
        assert releases.receive_only
    charged = client.reserved("profile") + client.reserved("adapter")
    assert done == ["noisy"] * (len(charged) - 1) + [None] * (5 - len(charged))
    assert len(charged) >= 3, "all the turns that noise was planned for"
    assert epsilon(charged, DELTA, "prv") <= 2.5


def test_a_batch_larger_than_the_data_samples_everything() -> None:
    assert sampling_rate(terms(), 4) == 1.0
