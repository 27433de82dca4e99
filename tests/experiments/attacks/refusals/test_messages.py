"""Every attempt of a malicious server or client is refused, and a hole would be counted as one."""

import pytest

from fedmosaic.experiments.attacks.refusals import messages as attack_malicious
from fedmosaic.experiments.attacks.refusals.keys import key_refusals
from fedmosaic.experiments.attacks.refusals.messages import AGGREGATE_ATTACKS, UPLOAD_ATTACKS
from fedmosaic.protos.errors import ConfigurationError


def test_every_cheat_in_the_key_agreement_is_refused_with_a_reason() -> None:
    found = key_refusals()
    assert len(found) == 10
    assert not any(result.broken for result in found)
    assert all(len(result.answer) > 20 for result in found)


def test_a_tampered_aggregate_is_not_loaded() -> None:
    attempt = "one-hot weight row"
    result = attack_malicious._against_client(attempt, AGGREGATE_ATTACKS[attempt])
    assert not result.broken
    assert result.answer


def test_a_forged_upload_is_refused() -> None:
    attempt = "an upload altered after it was signed"
    result = attack_malicious._against_server(attempt, UPLOAD_ATTACKS[attempt])
    assert not result.broken
    assert "not signed" in result.answer


def test_an_attempt_that_goes_through_counts_as_broken() -> None:
    """The control for all the others: nothing changed, so the victim loads it, so it is no refusal."""
    assert attack_malicious._against_client("nothing", lambda _line, aggregate: aggregate).broken
    assert attack_malicious._against_server("nothing", lambda _line, upload: upload).broken


def test_an_attempt_in_a_federation_that_does_not_run_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = attack_malicious._run()
    run[0].received.clear()
    monkeypatch.setattr(attack_malicious, "_run", lambda **_: run)
    with pytest.raises(ConfigurationError, match="did not run"):
        attack_malicious._honest()
    with pytest.raises(ConfigurationError, match="not loaded either"):
        attack_malicious._against_client("x", lambda _line, aggregate: aggregate)
