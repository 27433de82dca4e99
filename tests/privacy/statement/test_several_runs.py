"""No statement claims more than is true of the worst protected release on its ledger, of whichever run.

A table of what was released, by this run and by others on the same data, against what each adversary of the
threat model can read of it, said here anew and without the code that makes statements.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builders import DIGEST, EPOCH, charge
from fedmosaic.client.statement import person_words
from fedmosaic.privacy.accounting.epsilon import epsilon, person_epsilon
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger
from fedmosaic.privacy.ledger.move import move
from fedmosaic.privacy.ledger.rows import Channel, LedgerRow, Unit
from fedmosaic.privacy.statement import models, plain
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.shareable import shareable
from fedmosaic.protos.errors import BudgetExceededError

DELTA, RUN = 1e-5, "this-run"
SIGMA, PROFILE_SIGMA = 20.0, 40.0
GROUP = {"minimum_contributors": 9, "colluders": 3}
PROTECTIONS: tuple[models.Protection, ...] = ("none", "encrypted", "dp", "dp+encrypted", "distributed-dp")
SERVERS = ("server_honest_but_curious", "server_malicious")
HIDING = {"encrypted": (*SERVERS, "network"), "dp+encrypted": (*SERVERS, "network")}
"""From whom encryption hides; TLS alone hides from the network."""


@dataclass(frozen=True)
class Sent:
    """One release of the adapter, or, with `tells` off, of a version that did not note the encryption."""

    protection: models.Protection
    run: str = RUN
    secure: bool = True
    tells: bool = True

    @property
    def private(self) -> bool:
        return "dp" in self.protection

    def hidden(self, adversary: models.Adversary) -> bool:
        return adversary in HIDING.get(self.protection if self.tells else "", ("network",))


def put(ledger: Ledger, round_number: int, sent: Sent) -> None:
    mechanism: dict[str, object] = {"protection": sent.protection} if sent.tells else {}
    mechanism |= GROUP if sent.protection == "distributed-dp" else {}
    covered = {"none": "nothing", "encrypted": "cryptography"}.get(sent.protection, "dp")
    event = GaussianEvent(SIGMA, 1.0, 1) if sent.private else UNPROTECTED
    about: dict[str, Any] = {
        "context": sent.run,
        "secure_noise": sent.secure,
        "covered_by": covered,
        "mechanism": mechanism,
    }
    charge(ledger, event, "adapter", round_number, digest=DIGEST, **about)


def rows_of(
    place: Path,
    own: tuple[Sent, ...],
    others: tuple[Sent, ...],
    *,
    joined: bool = False,
    unit: Unit = "example",
) -> tuple[LedgerRow, ...]:
    """A ledger with a task profile and these releases; the others' of a ledger that was joined to it."""

    def opened(name: str) -> Ledger:
        path = place / name / LEDGER
        return Ledger.open(path, "north", DELTA, None, "rdp", budgeted_channels=("profile",), unit=unit)

    with opened("here") as ledger:
        charge(ledger, GaussianEvent(PROFILE_SIGMA, 1.0, 1), "profile", digest=DIGEST, context="map")
        for number, sent in enumerate((*own, *(() if joined else others))):
            put(ledger, number, sent)
    if joined:
        with opened("elsewhere") as ledger:
            for number, sent in enumerate(others):
                put(ledger, number, sent)
        move(place / "elsewhere", place / "here")
    with opened("here") as ledger:
        return tuple(ledger.export())


def noise(sent: Sent, adversary: models.Adversary) -> GaussianEvent:
    """Of a group's noise, more colluders than the terms allow for leave that of one member: σ / √(9 − 3)."""
    alone = sent.protection == "distributed-dp" and adversary.startswith("colluding")
    return GaussianEvent(SIGMA / math.sqrt(6) if alone else SIGMA, 1.0, 1)


def check_claim(
    client: models.ClientStatement,
    adversary: models.Adversary,
    configured: models.Protection,
    sent: tuple[Sent, ...],
    *,
    exact: bool,
) -> None:
    """What is claimed against one adversary is no more than holds of the worst of what was or may be sent."""
    found = {g.channel: g for g in client.guarantees if g.adversary == adversary}
    adapter, joint = found["adapter"], found["joint"]
    allowed = (Sent(configured), *sent)
    clear = [s for s in allowed if not s.hidden(adversary) and not (s.private and s.secure)]
    noisy = [s for s in sent if s.private and s.secure]
    only_hidden = [s for s in allowed if s.hidden(adversary) and not (s.private and s.secure)]
    if clear:
        assert adapter.cover == joint.cover == "nothing"
        assert adapter.epsilon == joint.epsilon == math.inf
        return
    if only_hidden:
        assert adapter.cover in ("mixed", "cryptography_only")
        assert "adapter" in joint.cryptography_only
    if not noisy:
        assert adapter.epsilon is None or adapter.epsilon == 0.0
        return
    read = [s for s in noisy if not s.hidden(adversary)]
    if read:
        assert adapter.cover != "dp_and_cryptography"
        assert joint.cover != "dp_and_cryptography"
    events = [noise(s, adversary) for s in noisy]
    least = epsilon(events, DELTA, "rdp")
    whole = epsilon([GaussianEvent(PROFILE_SIGMA, 1.0, 1), *events], DELTA, "rdp")
    assert adapter.epsilon is not None
    assert joint.epsilon is not None
    if exact:
        assert (adapter.epsilon, joint.epsilon) == pytest.approx((least, whole))
    assert adapter.epsilon >= least * 0.999
    assert joint.epsilon >= whole * 0.999


OWN = [(), *((Sent(mode),) for mode in PROTECTIONS)]
OTHERS = [
    (),
    *((Sent(mode, "another"),) for mode in PROTECTIONS),
    (Sent("dp+encrypted", "another"), Sent("dp", "a third")),
    (Sent("dp+encrypted", "another", tells=False),),
    (Sent("dp+encrypted", "another", secure=False),),
]


def test_a_statement_claims_no_more_than_holds_of_the_worst_release(tmp_path: Path) -> None:
    for number, (own, others) in enumerate(itertools.product(OWN, OTHERS)):
        rows = rows_of(tmp_path / str(number), own, others, joined=bool(others) and number % 2 == 1)
        for configured in PROTECTIONS:
            if others and own not in ((), (Sent(configured),)):
                continue  # a ledger that contradicts this run's own terms is looked at by itself
            bounds = {"least_noise": SIGMA, "largest_delta": DELTA}
            inputs = models.ClientInputs(ledger=rows, adapter_protection=configured, **bounds)
            facts = models.StatementInputs(run_id=RUN, clients=(inputs,), encryption="ckks", witness="notary")
            for made in (statement(facts), shareable(facts)):
                for adversary in models.ADVERSARIES:
                    exact = not made.shareable
                    check_claim(made.clients[0], adversary, configured, (*own, *others), exact=exact)
                check_words(made, configured, own, others)


def check_words(
    made: models.PrivacyStatement,
    configured: models.Protection,
    own: tuple[Sent, ...],
    others: tuple[Sent, ...],
) -> None:
    """Whom the client trusts, which keys there are, and what is said to be of this run alone."""
    (client,) = made.clients
    modes = {configured, *(s.protection if s.tells else "dp" for s in (*own, *others))}
    encrypted = any("encrypted" in mode for mode in modes)
    assert any("aggregation key is shared" in line for line in made.assumptions) == encrypted
    assert any(name == "group key" for name, *_ in plain.keys(made)) == encrypted
    assert any("whoever adds none" in line for line in made.assumptions) == ("distributed-dp" in modes)
    assert any("not known here" in line for line in made.leaks) == bool(others)
    if not client.test_noise:
        weakest = next(words for mode, words in plain.TRUST.items() if mode in modes)
        assert plain.trust(client) == weakest
    adapter = next(c for c in client.channels if c.channel == "adapter")
    told = {(p.protection, p.run): p.releases for p in adapter.protected}
    for sent in others:
        assert told[sent.protection if sent.tells else "dp", "others"] >= 1
    seen = [g.words for g in client.guarantees if (g.channel, g.adversary) == ("adapter", "server_malicious")]
    assert ("of other runs on the same data" in seen[0]) == bool(others)


def test_what_an_unencrypted_server_has_read_is_told_beside_an_encrypted_run(tmp_path: Path) -> None:
    """ε is the same; who has read what is not."""
    rows = rows_of(tmp_path, (Sent("dp+encrypted"),), (Sent("dp", "another"),))
    inputs = models.ClientInputs(ledger=rows, adapter_protection="dp+encrypted")
    (client,) = statement(models.StatementInputs(run_id=RUN, clients=(inputs,))).clients
    (of_server,) = [
        g for g in client.guarantees if (g.channel, g.adversary) == ("adapter", "server_honest_but_curious")
    ]
    assert of_server.cover == "dp"
    assert "sees size and timing of ciphertexts" in of_server.words
    assert "1 release of other runs on the same data: reads the tensors, differentially" in of_server.words
    assert "had the protection 'dp'" in client.warnings[0]
    adapter = client.channels[1]
    assert adapter.protection == "dp"
    assert plain.protected_words(adapter) == (
        "this run: 1 under dp+encrypted; other runs on the same data: 1 under dp"
    )


def test_a_network_that_this_run_has_not_used_has_carried_others(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, (Sent("none"),), (Sent("dp", "another"),))
    inputs = models.ClientInputs(ledger=rows, adapter_protection="none")
    (client,) = statement(
        models.StatementInputs(run_id=RUN, clients=(inputs,), transport="in_process")
    ).clients
    (network,) = [g for g in client.guarantees if (g.channel, g.adversary) == ("adapter", "network")]
    assert network.cover == "dp_and_cryptography"
    assert network.epsilon == epsilon([GaussianEvent(SIGMA, 1.0, 1)], DELTA, "rdp")
    (joint,) = [g for g in client.guarantees if (g.channel, g.adversary) == ("joint", "network")]
    both = [GaussianEvent(PROFILE_SIGMA, 1.0, 1), GaussianEvent(SIGMA, 1.0, 1)]
    assert joint.epsilon == epsilon(both, DELTA, "rdp"), "other runs have sent the profile, too"


@pytest.mark.parametrize("unit", ["example", "person"])
def test_the_budget_of_a_statement_is_that_of_its_run(tmp_path: Path, unit: Unit) -> None:
    """An encrypted run has opened the ledger; this one has a stricter budget, over the adapter as well."""
    event = GaussianEvent(SIGMA, 1.0, 1)
    path = tmp_path / LEDGER
    both: tuple[Channel, ...] = ("adapter", "profile")
    with Ledger.open(path, "north", DELTA, 8.0, "rdp", budgeted_channels=("profile",), unit=unit) as ledger:
        charge(ledger, GaussianEvent(PROFILE_SIGMA, 1.0, 1), "profile", digest=DIGEST, context="map")
    target = epsilon([GaussianEvent(PROFILE_SIGMA, 1.0, 1), event], DELTA, "rdp") + 1e-6
    with Ledger.open(path, "north", DELTA, target, "rdp", budgeted_channels=both, unit=unit) as ledger:
        charge(ledger, event, context=RUN, digest=DIGEST)
        with pytest.raises(BudgetExceededError):
            charge(ledger, event, round=1, context=RUN)
        parameters, rows = ledger.parameters, tuple(ledger.export())
    inputs = models.ClientInputs(
        ledger=rows,
        adapter_protection="dp",
        target_epsilon=parameters.target_epsilon,
        budgeted_channels=parameters.budgeted_channels,
        least_noise=SIGMA / 2,
    )
    facts = models.StatementInputs(run_id=RUN, clients=(inputs,))
    for made in (statement(facts), shareable(facts)):
        (client,) = made.clients
        assert (client.budgeted_channels, client.target_epsilon) == (both, target)
        assert target - 1e-5 < client.spent_epsilon <= target
        assert client.refusals == 1
        joint = [g.epsilon for g in client.guarantees if g.channel == "joint"]
        assert max(value or 0.0 for value in joint) <= target, "told as at most the budget"


def test_the_person_with_most_rows_is_told_what_is_left_when_all_others_collude(tmp_path: Path) -> None:
    sent = Sent("distributed-dp")
    rows = rows_of(tmp_path, (sent,), ())
    client = models.ClientInputs(ledger=rows, adapter_protection="distributed-dp")
    words = person_words(models.StatementInputs(run_id=RUN, clients=(client,)), 3)
    left = [GaussianEvent(PROFILE_SIGMA, 1.0, 1), noise(sent, "colluding_recipients")]
    assert f"ε = {person_epsilon(left, DELTA, 3):.3g} " in words
    assert EPOCH not in words
