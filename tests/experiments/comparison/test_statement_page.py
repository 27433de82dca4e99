"""The page that an officer signs: a true verdict, every figure, a layout that fits screen and paper."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from builders import DIGEST, charge
from end_to_end import federation_of_vectors as fv
from fedmosaic.client.statement import HANDED_OVER, STATEMENT, coalition_rows
from fedmosaic.experiments.comparison import report
from fedmosaic.experiments.comparison.statement_page import explained, roster_signed
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.federation import kits
from fedmosaic.privacy.federation.install import consortium_fingerprint
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger
from fedmosaic.privacy.ledger.rows import Channel
from fedmosaic.privacy.ledger.rules import keeper
from fedmosaic.privacy.statement import plain
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import (
    ClientInputs,
    ClientStatement,
    PrivacyStatement,
    Protection,
    StatementInputs,
)
from fedmosaic.privacy.statement.shareable import shareable
from fedmosaic.protos.errors import ConfigurationError

PROFILE = GaussianEvent(8.0, 1.0, 1)
COVERED = {"encrypted": "cryptography", "dp": "dp", "none": "nothing", "distributed-dp": "dp"}
GROUP = {"minimum_contributors": 9, "colluders": 3}
SECTIONS = {
    "basic": "name data_curators intended_use data_product_type data_product_region description "
    "publication_date",
    "dp_variant": "variant_name data_domain unprotected_quantities",
    "privacy_loss": "privacy_unit privacy_unit_details privacy_parameters privacy_parameters_details",
    "deployment_model": "model_name actors release_type release_type_details data_source_type access_type",
    "accounting": "post_processing composition",
    "implementation": "preprocessing_and_hyperparameter_tuning mechanisms justification",
    "administrative": "registry_authors notes",
}
"""The registry's schema as it was read: its parts, and those of their fields that a record has here."""


def state_of(place: Path, protection: Protection, *, handed_over: bool = True) -> Path:
    """What a client leaves behind: ledger, statements, scores, and what it has seen of the ledger."""
    state = place / protection
    state.mkdir()
    private = COVERED[protection] == "dp"
    channels: tuple[Channel, ...] = ("profile", "adapter") if private else ("profile",)
    mechanism = GROUP if protection == "distributed-dp" else {}
    with Ledger.open(state / LEDGER, "north", 1e-5, 8.0, budgeted_channels=channels) as ledger:
        charge(ledger, PROFILE, "profile", 0, digest=DIGEST, covered_by="dp", clipping_norm=0.5)
        event = GaussianEvent(20.0, 1.0, 5) if private else UNPROTECTED
        covered = COVERED[protection]
        charge(ledger, event, "adapter", 1, digest=DIGEST, covered_by=covered, mechanism=mechanism)
        seen = {"ledger": str(state), "anchor": ledger.anchor(keeper("clinics", "north")).hex()}
        client = ClientInputs(
            ledger=tuple(ledger.export()),
            client_id="north",
            adapter_protection=protection,
            clipped_share={"adapter": 1.0},
            largest_delta=1e-5,
            least_noise=20.0 if private else None,
        )
    inputs = StatementInputs(
        run_id="0" * 32, clients=(client,), roster_sha256="1" * 64, coalition_rows=coalition_rows(4, 3)
    )
    (state / STATEMENT).write_text(statement(inputs).model_dump_json())
    if handed_over:
        (state / HANDED_OVER).write_text(shareable(inputs).model_dump_json())
    (state / "session.json").write_text(json.dumps({"client": "north", "federation": "clinics"}))
    (state / "ledger.json").write_text(json.dumps(seen))
    (state / "result.json").write_text(json.dumps({"before": {"self": 0.25}, "after": {"self": 0.75}}))
    return state


def written(state: Path, *options: str) -> str:
    target = state / "statement.html"
    assert report.main([str(state), "--html", str(target), *options]) == 0
    return html.unescape(target.read_text(encoding="utf-8"))


def test_the_page_of_an_encrypted_run_says_first_that_members_are_trusted(tmp_path: Path) -> None:
    text = written(state_of(tmp_path, "encrypted"), "--organisation", "St. <b>", "--purpose", "letters")
    first = text[text.index("<body>") : text.index("Not covered")]
    assert "You trust the other members, and that none of them helps the server." in first
    assert "NOT protected against one recipient; colluding recipients;" in first
    assert "shared adapter (P, Q) by encryption alone, all others by differential privacy" in first
    rows = re.findall(r"<tr.*?</tr>", first, re.DOTALL)
    assert "(worst)" in rows[1], "the worst adversary stands in the first row"
    assert "∞" in rows[1]
    assert "all of them" in rows[1]
    assert "(worst)" not in "".join(rows[2:])
    for words in ("0.445 + encryption", "0.927", "2.560", "5.680", "1.4 of 100", "δ = 1e-05"):
        assert words in first
    assert (
        "One recipient alone cannot in general compute a single adapter, while the server is honest" in text
    )
    assert "right on 25 of 100 of its own test rows before, 75 after" in " ".join(text.split())
    assert "group key" in text
    assert "fedmosaic attack" in text
    assert "chain of hashes whole, nothing was charged since" in text
    assert "NOT CHECKED: no roster is here" in text
    assert "St. <b>" in text
    for outside in ("http://", "https://", "src=", "<script", "@import", "clipped"):
        assert outside not in text


def test_verdicts_follow_the_protection_and_name_the_worst(tmp_path: Path) -> None:
    words = written(state_of(tmp_path, "dp"))
    assert "You trust nobody but your own machine and this software." in words
    assert "NOT protected" not in words
    assert "∞" not in words[: words.index("Not covered")]
    assert "nothing protects what is sent" in written(state_of(tmp_path, "none"))
    sums = statement_of(state_of(tmp_path, "distributed-dp"))
    told = plain.verdict(sums)
    assert "colluding recipients" in told[0]
    assert len({plain.epsilon_text(each.epsilon) for each in plain.worst_first(sums)}) == 2
    assert all(
        f"at most {plain.epsilon_text(each.epsilon)}" in " ".join(told) for each in plain.worst_first(sums)
    )
    loose = tuple(each.model_copy(update={"epsilon": 34.4}) for each in sums.guarantees)
    assert plain.verdict(sums.model_copy(update={"guarantees": loose}))[0].startswith("HARDLY protected")
    void = sums.model_copy(update={"test_noise": True})
    assert plain.trust(void).startswith("NO GUARANTEE HOLDS")


def statement_of(state: Path) -> ClientStatement:
    return PrivacyStatement.model_validate_json((state / STATEMENT).read_text()).clients[0]


def test_a_ledger_that_goes_on_or_is_gone_is_told(tmp_path: Path) -> None:
    state = state_of(tmp_path, "dp")
    with Ledger.open(state / LEDGER, "north", 1e-5, 8.0, budgeted_channels=("profile", "adapter")) as ledger:
        charge(ledger, GaussianEvent(20.0, 1.0, 5), "adapter", 9, digest=DIGEST)
    assert "MORE WAS CHARGED SINCE" in written(state)
    seen = json.loads((state / "ledger.json").read_text())
    (state / "ledger.json").write_text(json.dumps(seen | {"anchor": "00" * 32}))
    assert "NOT CHECKED: LEDGER_BEHIND" in written(state)
    (state / "ledger.json").write_text("[]")
    assert "NOT CHECKED:" in written(state)


def test_the_rosters_signature_is_checked_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(tmp_path, "encrypted")
    kit = kits.open_kit(fv.make_federation(tmp_path / "f", fv.terms("mask", 2)) / "server")
    kits.keep_signed(kit.directory, kit.roster, state)
    own = PrivacyStatement.model_validate_json((state / STATEMENT).read_text())
    assert roster_signed(own, state)[1].startswith(f"NOT VALID: the roster in {state} is another")
    own = own.model_copy(update={"roster_sha256": kit.roster.hash.hex()})
    (state / STATEMENT).write_text(own.model_dump_json())
    assert report.main([str(state)]) == 0
    assert (
        "The roster's signature: valid, checked just now: roster 1 of vectors is signed by the consortium "
        f"with the fingerprint {consortium_fingerprint(kit.directory)}"
    ) in " ".join(capsys.readouterr().out.split())
    roster = (state / "roster.json").read_text()
    for name, content, words in (
        ("roster.json", roster.replace('"ada"', '"ida"'), "(serial 1) is not signed by the consortium key"),
        ("roster.json", "[]", "roster.json"),
        ("authority.pem", "", "authority.pem"),
        ("consortium.pub", "00", "consortium.pub"),
    ):
        (state / name).write_text(content)
        valid, told = roster_signed(own, state)
        assert (valid, told.startswith("NOT VALID: "), words in told) == (False, True, True), told
        kits.keep_signed(kit.directory, kit.roster, state)


def test_what_epsilon_means_is_computed_at_the_statements_delta() -> None:
    table = dict(explained(1e-5))
    assert table["4"] == "8.1"
    assert table["8"] == "25.5"
    assert float(dict(explained(1e-3))["4"]) > 8.1


def test_the_registrys_record_has_its_fields_and_is_made_of_what_may_be_handed_over(tmp_path: Path) -> None:
    made = {}
    for protection in ("dp", "encrypted"):
        state = state_of(tmp_path, protection)
        target = tmp_path / f"{protection}.json"
        options = ["--organisation", "Clinic", "--purpose", "letters"] if protection == "dp" else []
        assert report.main([str(state), "--json", str(target), *options]) == 0
        made[protection] = json.loads(target.read_text())
        assert made[protection].keys() == {"url_slug", "status", "tier", "deployment"}
        sections = {name: set(fields.split()) for name, fields in SECTIONS.items()}
        assert {name: set(part) for name, part in made[protection]["deployment"].items()} == sections
    private, encrypted = (made[name]["deployment"] for name in ("dp", "encrypted"))
    assert private["basic"]["data_curators"] == private["administrative"]["registry_authors"] == ["Clinic"]
    assert encrypted["basic"]["intended_use"] == "TO BE FILLED IN"
    handed = PrivacyStatement.model_validate_json((tmp_path / "dp" / HANDED_OVER).read_text()).clients[0]
    worst = plain.worst_first(handed)[0].epsilon
    assert private["privacy_loss"]["privacy_parameters"] == {"epsilon": worst, "delta": 1e-5}
    assert encrypted["privacy_loss"]["privacy_parameters"] == {"delta": 1e-5}, "∞ is no number of the schema"
    assert (
        "ε = ∞ for north, shared adapter (P, Q), against one recipient"
        in encrypted["privacy_loss"]["privacy_parameters_details"]
    )
    own = state_of(tmp_path, "none", handed_over=False)
    with pytest.raises(ConfigurationError, match="may be handed over"):
        report.main([str(own), "--json", str(tmp_path / "own.json")])
    (own / STATEMENT).unlink()
    with pytest.raises(ConfigurationError, match="no usable privacy statement"):
        report.main([str(own), "--html", str(tmp_path / "own.html")])


_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(_BROWSER is None, reason="no Chromium on this machine")
def test_the_page_fits_a_screen_a_telephone_and_paper(tmp_path: Path) -> None:
    page = state_of(tmp_path, "encrypted") / "statement.html"
    assert report.main([str(page.parent), "--html", str(page)]) == 0
    # Frames of both widths measure the page in one start of the browser.
    frames = "".join(
        f'<iframe src="{page.as_uri()}" width="{width}" height="800"></iframe>' for width in (1280, 420)
    )
    measure = (
        "onload = () => document.title = [...document.querySelectorAll('iframe')].map(frame => {"
        "const inside = frame.contentDocument; const worst = inside.querySelector('tr.worst');"
        "return inside.documentElement.scrollWidth + ' ' + Math.round(worst.getBoundingClientRect().bottom);"
        "}).join(' ')"
    )
    (tmp_path / "frames.html").write_text(f"<title></title>{frames}<script>{measure}</script>")
    browser = [str(_BROWSER), "--headless", "--no-sandbox", "--disable-gpu"]
    looked = subprocess.run(
        [*browser, "--allow-file-access-from-files", "--dump-dom", (tmp_path / "frames.html").as_uri()],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    title = re.search(r"<title>([\d ]+)</title>", looked.stdout)
    assert title is not None, looked.stdout[:300]
    wide, wide_bottom, narrow, narrow_bottom = map(int, title.group(1).split())
    assert (wide <= 1280, narrow <= 420) == (True, True), title.group(1)
    assert max(wide_bottom, narrow_bottom) <= 900, "verdict and worst ε are on the first screen"
    printed = tmp_path / "statement.pdf"
    subprocess.run(
        [*browser, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri()],
        check=True,
        timeout=120,
        capture_output=True,
    )
    content = printed.read_bytes()
    width, height = map(float, re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content).groups())  # type: ignore[union-attr]
    assert (math.isclose(width, 595, abs_tol=1), math.isclose(height, 842, abs_tol=1)) == (True, True), "A4"
    assert content.count(b"/Type /Page\n") <= 8
