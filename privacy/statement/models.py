"""The privacy statement as data: what is told, per client, channel and adversary.

No ε stands alone: every figure sits inside these, beside its δ, unit and accountant.
"""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from fedmosaic.privacy.accounting.events import AttackBounds, Epsilon, Share
from fedmosaic.privacy.ledger.rows import Channel, LedgerRow, Unit

Protection = Literal["none", "encrypted", "dp", "dp+encrypted", "distributed-dp"]
PRIVATE: frozenset[Protection] = frozenset({"dp", "dp+encrypted", "distributed-dp"})
"""Protections whose releases an ε bounds."""
WEAKEST_FIRST: tuple[Protection, ...] = ("none", "encrypted", "distributed-dp", "dp", "dp+encrypted")
StatementChannel = Literal["profile", "adapter", "family", "joint"]
Adversary = Literal[
    "network",
    "server_honest_but_curious",
    "server_malicious",
    "recipient",
    "colluding_recipients",
    "colluding_recipients_with_server",
]
ADVERSARIES: tuple[Adversary, ...] = get_args(Adversary)
Cover = Literal["dp", "dp_and_cryptography", "mixed", "cryptography_only", "nothing", "nothing_sent"]
"""What a protection rests on; "mixed": DP for some channels or releases, cryptography only for others."""


class Frozen(BaseModel):
    """Immutable, strict about unknown keys; descriptions of fields go into the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PlannedChannel(Frozen):
    """The schedule of a channel, from which the cost of protecting it with DP can be told."""

    sampling_rate: float = Field(gt=0.0, le=1.0)
    steps: int = Field(ge=1)


class ClientInputs(Frozen):
    """What a statement needs to know about one client."""

    ledger: tuple[LedgerRow, ...] = Field(min_length=1)
    """The client's whole ledger; it holds δ, budget and accountant."""
    client_id: str = ""
    """Who the client is in this run; whoever opened the ledger first if empty."""
    target_epsilon: float | None = Field(default=None, gt=0.0)
    """Budget of this run, which may be stricter than the one that the ledger was opened with."""
    budgeted_channels: tuple[Channel, ...] = ()
    """What this run's budget bounds; as the ledger was opened if empty."""
    adapter_protection: Protection
    """How P and Q leave the client."""
    family_protection: Protection | None = None
    """How the other layers' LoRA leaves the client; None when it does not."""
    clipped_share: dict[Channel, Share] = Field(default_factory=dict)
    """Share of clipped examples; not noised, so for the client's own eyes."""
    planned: dict[Channel, PlannedChannel] = Field(default_factory=dict)
    """Schedules of channels without DP, to answer what DP would have cost."""
    expected_batch_size: int | None = Field(default=None, ge=1)
    """B of q = B/n in this run's terms, public; a shareable statement rounds with it."""
    largest_delta: float | None = Field(default=None, gt=0.0, le=1.0)
    """Bound on δ in this run's terms; as above."""
    least_noise: float | None = Field(default=None, gt=0.0)
    """Least σ that this run's terms give to any client of about this size; as above."""


class CoalitionRows(Frozen):
    """What a coalition of recipients can solve for."""

    colluding_recipients: int = Field(ge=1)
    independent_rows: int = Field(ge=0)
    """Linearly independent weight rows that it holds at most."""
    contributors: int = Field(ge=1)
    """Adapters that those rows combine."""


class StatementInputs(Frozen):
    """Everything that a statement is made from; what is not described here is as in `PrivacyStatement`."""

    run_id: str = Field(min_length=1, max_length=200)
    created: str = Field(default="", max_length=40)
    """Time of making, ISO 8601; empty where the statement must be reproducible."""
    clients: tuple[ClientInputs, ...] = Field(min_length=1)
    """The clients that the reader may know of."""
    roster_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    transport: Literal["mutual_tls", "in_process"] = "mutual_tls"
    encryption: str = Field(default="", max_length=200)
    witness: str = Field(default="", max_length=200)
    """Who countersigns every sum, by the roster; empty without one."""
    minimum_contributors: int = Field(default=3, ge=1)
    """Contributors other than the recipient that every aggregate needs."""
    weight_cap: float = Field(default=0.5, gt=0.0, le=1.0)
    """Largest share of one contributor in an aggregate."""
    squares_cap: float = Field(default=0.36, gt=0.0, le=1.0)
    """Largest sum of the squared shares of an aggregate."""
    rounds: int = Field(default=2, ge=1)
    """Rounds of the run; a recipient receives one aggregate in each but the first."""
    smallest_row: int | None = Field(default=None, ge=1)
    """Fewest contributors of any aggregate that the clients accepted; None where they accepted none."""
    coalition_rows: tuple[CoalitionRows, ...] = ()


class AccountantFigures(Frozen):
    """The same composition by independent accountants."""

    prv: Epsilon | None = None
    """Opacus PRV; None where it cannot be evaluated."""
    rdp: Epsilon
    pld: Epsilon | None = None
    """Google dp-accounting PLD; None where it cannot be evaluated."""
    note: str = ""


class Mechanism(Frozen):
    """Releases with the same noise."""

    noise_multiplier: float = Field(ge=0.0)
    """σ: noise standard deviation over clipping norm; 0 without differential privacy."""
    sampling_rate: float = Field(gt=0.0, le=1.0)
    """q: probability with which an example enters a step."""
    steps: int = Field(ge=1)
    """Steps in all releases together."""
    clipping_norm: float | None
    """C, in the unit of what is clipped."""
    dimensions: int | None
    releases: int = Field(ge=1)
    """Reservations that were charged."""


class Protected(Frozen):
    """Releases of one channel that left under one protection."""

    protection: Protection
    run: Literal["this", "others", "any"]
    """Whose they are. A task profile is of its public map, and whichever run needs it sends it."""
    releases: int = Field(ge=0)
    """Reservations that were charged; 0 where this run's terms name a protection, and nothing left."""


class ChannelStatement(Frozen):
    """What one client released on one channel (or on all, `joint`), whoever reads it."""

    channel: StatementChannel
    protection: Protection | None
    """The weakest of `protected`; None for `joint`."""
    protected: tuple[Protected, ...] = ()
    """What protected which releases; none for `joint`, and in statements from before this was told."""
    epsilon: Epsilon
    """ε of this channel alone towards a reader of its plaintext."""
    nominal_epsilon: Epsilon
    """What `epsilon` would be with secure noise; equal to it in a real run."""
    accountant: Literal["prv", "rdp", "pld"]
    accountants: AccountantFigures | None
    """Cross-check; None when a release had no noise."""
    attack: AttackBounds
    """Bounds for an attacker who reads the plaintext."""
    mechanisms: tuple[Mechanism, ...]
    parallel_composition: bool
    """Whether releases over data epochs that share no example were proved and composed in parallel."""
    reservations_never_released: int
    """Charged, but never recorded as sent (a crash)."""
    resends: int
    """The same bytes sent again, at no cost."""
    refusals: int
    clipped_share: Share | None
    """Share of clipped examples; local, removed from a shareable statement."""
    planned: PlannedChannel | None
    """Schedule, for what DP would have cost."""


class PersonFigure(Frozen):
    """ε of somebody with several examples: all of them added or removed at once."""

    examples: int = Field(ge=2)
    epsilon: Epsilon
    """ε at the δ beside it; "infinity" also where it is beyond what is computed."""


PERSON_EXAMPLES = (2, 5, 10)
"""For so many examples of one person a statement has figures."""


class Guarantee(Frozen):
    """What holds for one client, on one channel, against one adversary."""

    channel: StatementChannel
    """Which channel."""
    adversary: Adversary
    """Against whom."""
    cover: Cover
    """What the protection rests on, that of the least protected release of any run."""
    epsilon: Epsilon | None
    """ε against this adversary; None where only cryptography covers, and ε does not apply."""
    delta: float = Field(gt=0.0, lt=1.0)
    """δ of `epsilon`."""
    unit: Unit
    """What is protected: one example, unless said otherwise."""
    neighbouring_relation: str
    """In which sense two data sets differ by one unit."""
    accountant: Literal["prv", "rdp", "pld"]
    """Accountant of `epsilon`."""
    cryptography_only: tuple[StatementChannel, ...]
    """Channels for which this guarantee also needs the encryption to hold."""
    attack: AttackBounds | None
    """Bounds for this adversary; None where only cryptography covers."""
    persons: tuple[PersonFigure, ...] = ()
    """ε of somebody with several examples, where `epsilon` is one example's and finite."""
    test_noise: bool
    """Differential privacy was claimed, but its noise came from a test generator and counts for nothing."""
    words: str
    """The same in a sentence."""


class ClientStatement(Frozen):
    """Everything about one client."""

    client_id: str
    delta: float = Field(gt=0.0, lt=1.0)
    unit: Unit
    neighbouring_relation: str
    """In which sense two data sets differ by one unit."""
    target_epsilon: float | None
    """Budget; None without one."""
    budgeted_channels: tuple[str, ...]
    """Channels that the budget bounds together."""
    spent_epsilon: Epsilon
    """ε of the budgeted channels so far."""
    remaining_epsilon: Epsilon | None
    """Target less spent; ε does not add up, so this is no allowance for a single release."""
    refusals: int
    test_noise: bool
    """Some noise came from a seeded generator: no guarantee holds."""
    channels: tuple[ChannelStatement, ...]
    guarantees: tuple[Guarantee, ...]
    warnings: tuple[str, ...]
    """What the ledger shows that the configuration does not."""


class PrivacyStatement(Frozen):
    """The privacy statement of a run."""

    schema_version: Literal[1] = 1
    run_id: str
    created: str
    roster_sha256: str
    """Hash of the roster that fixed the terms."""
    transport: Literal["mutual_tls", "in_process"]
    """Whether bytes crossed a network, and how."""
    encryption: str
    """Name of the encryption scheme and its parameters."""
    no_guarantee: bool
    """True when any client's noise was a test's: then nothing here holds for it."""
    clients: tuple[ClientStatement, ...]
    coalition_rows: tuple[CoalitionRows, ...]
    assumptions: tuple[str, ...]
    """What has to be true for the figures to hold."""
    leaks: tuple[str, ...]
    """What is disclosed whatever the protection."""
    shareable: bool = False
    """Whether it is the one to hand over: made from rounded numbers, without unnoised figures."""
