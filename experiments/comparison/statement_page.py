"""A run's privacy statement as one self-contained page that a privacy officer reads, prints and signs."""

import datetime as dt
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from scipy.optimize import brentq

from fedmosaic import __version__
from fedmosaic.client.ledger import SEEN
from fedmosaic.experiments.attacks.statistics.results import AttackReport
from fedmosaic.privacy.accounting.tradeoff import gaussian_delta, gaussian_true_positive_rate
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.federation import kits
from fedmosaic.privacy.federation.install import consortium_fingerprint
from fedmosaic.privacy.ledger.ledger import LEDGER, read_ledger
from fedmosaic.privacy.ledger.rules import anchor_of, check_anchor, keeper
from fedmosaic.privacy.statement import plain
from fedmosaic.privacy.statement.models import PERSON_EXAMPLES, PrivacyStatement
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES, CHANNEL_NAMES
from fedmosaic.protos.errors import FedMosaicError

PACKAGES: Final = ("torch", "opacus", "dp-accounting", "cryptography", "numpy", "scipy")
_EXPLAINED: Final = (8.0, 4.0, 3.0, 1.0, 0.5)
TERMS: Final = (
    (
        "ε (epsilon)",
        "how much the odds of any outcome can differ between data with and without one example: "
        "by a factor of at most e^ε. Smaller is safer; 0 tells nothing",
    ),
    ("δ (delta)", "the small part of all outcomes for which ε promises nothing"),
    ("recipient", "another member, who receives a weighted sum of others' adapters"),
    ("colluding", "working together, and sharing all that they have received and all their keys"),
    ("server, honest but curious", "it does what it should and tries to learn from all that it sees"),
    ("server, malicious", "it also lies, replays, drops messages and chooses weights"),
    ("one example, in the data or not", "compared are data that differ by one example, added or removed"),
    ("task profile", "128 noisy numbers that tell the server which clients' tasks are alike"),
    ("shared adapter (P, Q)", "the small trained part of the model that others may receive"),
    ("noise σ", "standard deviation of the noise, as a multiple of the clipping norm C"),
    ("clipping norm C", "what one example moves a sum by at most; most gradients are longer and cut to it"),
    ("sampled q", "share of the examples that one step uses, drawn at random"),
    (
        "PRV, RDP, PLD",
        "three ways to compute ε from all releases. PRV is reported and never below PLD, the "
        "most exact; RDP is coarser and stands in where PRV does not work",
    ),
    (
        "found by an attacker",
        "of 100 used examples, how many any attacker finds at most who wrongly accuses "
        "1 of 100 unused ones. Guessing finds 1",
    ),
    ("anchor", "a keyed hash of the ledger's last row: it shows whether rows were cut off, and nothing else"),
)
PYRAMID: Final = (
    ("top", "privacy parameters: ε, δ", "Verdict; What ε and δ mean"),
    ("top", "unit of privacy", "Verdict: one example, and a person with 2, 5 and 10"),
    ("middle", "algorithms and correctness", "How it was computed; Attacks against their limits"),
    ("middle", "utility", "What it was good for"),
    ("middle", "bias", "not measured: accuracy is not told by group of persons"),
    ("bottom", "access control and security", "Who holds which key; Who keeps what"),
    ("bottom", "trust model", "Verdict: whom you trust; What has to be true"),
    ("bottom", "side channels", "Not covered: times, sizes, taking part; What has to be true: noise"),
    ("bottom", "data collection exposure", "examples stay at the client; nothing is collected for the run"),
)
"""Components of the pyramid of NIST SP 800-226, as a summary of it names them, and where they are here."""
REGISTRY: Final = (
    ("basic", "Signature; region and sector are left to fill in"),
    ("dp_variant", "approximate DP; its unprotected_quantities are “Not covered”"),
    ("privacy_loss", "Verdict: unit and ε with the worst; What ε and δ mean"),
    ("deployment_model", "federated; its actors are the Verdict's, with whom you trust"),
    ("accounting", "How it was computed"),
    ("implementation", "How it was computed; What has to be true; Evidence. No justification is here"),
    ("administrative", "Signature"),
)
"""Parts of a record of the deployment registry, and where they are here."""


def statement_page(
    statement: PrivacyStatement,
    directory: Path,
    results: Mapping[str, Mapping[str, Any]],
    attacked: AttackReport | None,
    *,
    organisation: str = "",
    purpose: str = "",
) -> str:
    """The page as HTML, of one client's statement, or of several, as a server has them.

    It comes from a state directory, with its `result.json` by client, and what `fedmosaic attack` found.
    Organisation and purpose are lines to fill in if empty.
    """
    environment = Environment(
        loader=PackageLoader("fedmosaic.experiments.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"epsilon": plain.epsilon_text, "delta": plain.delta_text}
    return environment.get_template("statement.html.j2").render(
        statement=statement,
        plain=plain,
        adversary_names=ADVERSARY_NAMES,
        channel_names=CHANNEL_NAMES,
        examples=PERSON_EXAMPLES,
        explained=explained(max(client.delta for client in statement.clients)),
        results=results,
        attacks=attack_rows(attacked),
        attacked=attacked,
        evidence=evidence(statement, directory),
        software=[("fedmosaic", __version__), ("Python", platform.python_version())]
        + [(name, version(name)) for name in PACKAGES],
        terms=TERMS,
        pyramid=PYRAMID,
        registry=REGISTRY,
        organisation=organisation,
        purpose=purpose,
        date=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        directory=directory,
    )


def explained(delta: float) -> list[tuple[str, str]]:
    """What any attacker finds at most of 100 used examples, by ε, for one Gaussian release at this δ."""
    rows = []
    for epsilon in _EXPLAINED:
        mu = float(brentq(lambda mu, e=epsilon: float(gaussian_delta(mu, e)) - delta, 1e-3, 50.0))
        rows.append((f"{epsilon:g}", f"{100 * gaussian_true_positive_rate(mu, 0.01):.1f}"))
    return rows


def attack_rows(attacked: AttackReport | None) -> list[tuple[str, str, str, str, str]]:
    """Every figure that a guarantee limits: attack, release, figure, value and limit, broken or not."""
    results = attacked.results if attacked is not None else ()
    return [
        (
            result.attack,
            result.release,
            figure.name,
            f"{figure.value:.3g} ≤ {plain.epsilon_text(figure.bound)}",
            "BROKEN" if figure.broken else "no",
        )
        for result in results
        for figure in result.figures
        if figure.bound is not None
    ]


def roster_signed(statement: PrivacyStatement, directory: Path) -> tuple[bool, str]:
    """Whether the consortium has signed the roster that a statement names, checked anew, and in words."""
    places = [place for place in (directory, directory / "federation") if (place / kits.ROSTER).exists()]
    if not places:
        return False, (
            "NOT CHECKED: no roster is here, as versions before kept none. Compare the SHA-256 with what "
            "`fedmosaic keys show` says of your kit, which checks the signature"
        )
    try:
        roster, fingerprint = kits.open_kit(places[0]).roster, consortium_fingerprint(places[0])
    except (FedMosaicError, OSError) as error:
        return False, f"NOT VALID: {error}"
    if roster.hash.hex() != statement.roster_sha256:
        return False, f"NOT VALID: the roster in {places[0]} is another, {roster.hash.hex()}"
    return True, (
        f"valid, checked just now: roster {roster.serial} of {roster.federation} is signed by the consortium "
        f"with the fingerprint {fingerprint}. That it is yours, only the telephone tells"
    )


def evidence(statement: PrivacyStatement, directory: Path) -> list[tuple[str, str]]:
    """What a second reader can compare: roster, and the ledger as it stands where the state says it is."""
    found = [
        ("roster: members and signed terms, SHA-256", statement.roster_sha256),
        ("its signature", roster_signed(statement, directory)[1]),
        ("run", statement.run_id),
    ]
    seen = directory / SEEN
    if not seen.is_file():
        return [*found, ("privacy ledger", "not here: it stays with each member")]
    try:
        noted, session = (parse_json((directory / name).read_bytes()) for name in (SEEN, "session.json"))
        rows = read_ledger(Path(noted["ledger"]) / LEDGER)
        who = keeper(session["federation"], session["client"])
        check_anchor(rows, who, bytes.fromhex(noted["anchor"]), "the state directory")
    except (FedMosaicError, OSError, ValueError, KeyError, TypeError) as error:
        return [*found, ("privacy ledger", f"NOT CHECKED: {error}")]
    since = "nothing was charged since"
    if anchor_of(rows, who).hex() != noted["anchor"]:
        since = "MORE WAS CHARGED SINCE, by another run on the same data: its own statement counts both"
    return [
        *found,
        ("privacy ledger", f"{len(rows)} rows, chain of hashes whole, {since}"),
        ("its anchor at the end of this run", noted["anchor"]),
        ("who signed it", "this member's identity key, with every upload; the server keeps the newest"),
        (
            "the server's history as last seen, SHA-256, for audit verify --holds there",
            session.get("server_head") or "none",
        ),
    ]
