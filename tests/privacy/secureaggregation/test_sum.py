"""Secure sums against plain ones, with members that vanish, and against a server that cheats."""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.privacy.secureaggregation import masks
from fedmosaic.privacy.secureaggregation.collector import SumCollector
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import _SMALL_ORDER, Unmasking, check_opening, sign_opening
from fedmosaic.privacy.secureaggregation.shamir import PRIME, combine, lagrange_weights, share
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError

SIZE = 7


class Group:
    """Members and server of one sum in one process, and who vanishes before which step (1 to 5)."""

    def __init__(
        self,
        count: int,
        minimum: int,
        colluders: int,
        *,
        bits: int = 32,
        seed: int = 0,
        vanish: Mapping[str, int] | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.names = [f"m{number:03}" for number in range(count)]
        draw = self.random.randbytes
        self.identities = {name: Ed25519PrivateKey.from_private_bytes(draw(32)) for name in self.names}
        keys = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.terms = SumTerms(bytes(32), tuple(self.names), keys, minimum, colluders, SIZE, bits)
        self.vanish = vanish or {}
        self.members = {name: SumMember(self.terms, name, self.identities[name], draw) for name in self.names}
        self.server = SumCollector(self.terms)
        numbers = np.random.default_rng(seed)
        self.vectors = {
            name: numbers.integers(-(2 ** (bits - 1)) // count, 2 ** (bits - 1) // count, SIZE)
            for name in self.names
        }

    def present(self, step: int) -> list[str]:
        return [name for name in self.names if self.vanish.get(name, 6) > step]

    def open_and_share(self) -> None:
        for name in self.present(1):
            self.server.add_opening(name, self.members[name].open())
        openings = self.server.close_openings()
        for name in self.present(2):
            self.server.add_envelopes(name, self.sealed(name, self.members[name].share(openings)))

    def sealed(self, name: str, envelopes: dict[str, bytes]) -> bytes:
        """What a member sends of its envelopes; a liar sends other ones."""
        return b"".join(envelopes[other] for other in sorted(envelopes))

    def given(self, name: str, unmasking: Unmasking) -> Unmasking:
        """What a member sends to unmask; a liar sends something else."""
        return unmasking

    def send_vectors(self) -> None:
        for name in self.present(3):
            self.members[name].accept(self.server.envelopes_for(name))
            self.server.add_vector(name, self.members[name].mask(self.vectors[name]))

    def unmask(self) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        survivors = self.server.close_vectors()
        for name in self.present(4):
            self.server.add_signature(name, self.members[name].agree(survivors))
        for name in self.present(5):
            unmasking = self.members[name].unmask(self.server.signatures())
            self.server.add_unmasking(name, self.given(name, unmasking))
        return survivors, self.server.finish()

    def run(self) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        self.open_and_share()
        self.send_vectors()
        return self.unmask()


@given(
    count=st.integers(4, 9),
    bits=st.sampled_from([9, 24, 32, 33, 40, 62]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_the_sum_is_that_of_the_contributors_whoever_vanishes(
    count: int, bits: int, seed: int, data: st.DataObject
) -> None:
    colluders = data.draw(st.integers(1, max(1, (count - 1) // 3)))
    terms_threshold = (count + colluders) // 2 + 1
    gone = data.draw(st.integers(0, count - terms_threshold))
    leavers = data.draw(st.permutations(range(count)))[:gone]
    vanish = {f"m{number:03}": data.draw(st.integers(2, 5)) for number in leavers}
    group = Group(count, max(colluders + 1, terms_threshold), colluders, bits=bits, seed=seed, vanish=vanish)
    survivors, total = group.run()
    assert survivors == tuple(group.present(3))
    assert np.array_equal(total, sum(group.vectors[name] for name in survivors))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_more_who_vanish_than_the_terms_allow_end_the_sum(step: int) -> None:
    group = Group(10, 7, 3, vanish={f"m{number:03}": step for number in range(4)})
    with pytest.raises(EncryptionError, match=r"needs 7|needed|7 must"):
        group.run()


@given(st.integers(0, PRIME - 1), st.integers(1, 8), st.integers(0, 2**32))
def test_any_k_shares_give_the_secret_and_one_fewer_another_number(
    secret: int, threshold: int, seed: int
) -> None:
    source = random.Random(seed)
    shares = share(secret, threshold, 8, source.randbytes)
    points = sorted(source.sample(range(1, 9), threshold))
    given_ = {point: shares[point - 1] for point in points}
    assert combine(list(given_.values()), lagrange_weights(points)) == secret
    if threshold > 1:
        fewer = points[1:]
        assert combine([shares[p - 1] for p in fewer], lagrange_weights(fewer)) != secret


@given(st.sampled_from([8, 13, 32, 33, 62]), st.integers(0, 2**32))
def test_packed_words_come_back(bits: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 11)
    words = masks.to_words(values, bits)
    assert len(masks.pack(words, bits)) == (11 * bits + 7) // 8
    assert np.array_equal(masks.from_words(masks.unpack(masks.pack(words, bits), 11, bits), bits), values)


def test_masks_are_uniform_in_every_bit() -> None:
    mask = masks.Masks(20_000, 62).of(bytes(range(32)))
    ones = [(mask >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(62)]
    # Five standard deviations of 20,000 fair bits, rounded up.
    assert all(abs(share_of_ones - 0.5) < 0.02 for share_of_ones in ones)


def test_what_the_server_sees_before_the_end_says_nothing() -> None:
    """Two runs that differ in the data alone send words whose difference is the data only after all masks."""
    seen = []
    for shift in (0, 1000):
        group = Group(6, 5, 1)
        group.vectors["m000"] = group.vectors["m000"] + shift
        group.open_and_share()
        group.members["m000"].accept(group.server.envelopes_for("m000"))
        masked = group.members["m000"].mask(group.vectors["m000"])
        seen.append(masks.unpack(masked, SIZE, 32))
    assert np.array_equal(seen[1] - seen[0], np.full(SIZE, 1000, np.uint32)), "one stream masks both runs"
    fresh = Group(6, 5, 1, seed=1)
    fresh.open_and_share()
    fresh.members["m000"].accept(fresh.server.envelopes_for("m000"))
    other = fresh.members["m000"].mask(fresh.vectors["m000"])
    assert not np.array_equal(masks.unpack(other, SIZE, 32), seen[0])


def _colluding_shares(group: Group, colluders: list[str], kind: int, victim: str) -> dict[int, int]:
    """What t members hold of a victim's secret, by point."""
    order = sorted(group.names)
    shares = {}
    for name in colluders:
        held = group.members[name]._held[victim]
        assert held is not None
        shares[order.index(name) + 1] = held[kind]
    return shares


def test_server_and_t_members_cannot_take_the_masks_off_one_vector() -> None:
    """They have own shares, and what honest members give for one list, and try the victim's self-mask."""
    group = Group(10, 7, 3)
    group.open_and_share()
    group.send_vectors()
    victim, colluders = "m009", ["m000", "m001", "m002"]
    # Honest members are told that the victim vanished, so they give shares of its mask key.
    without = tuple(name for name in group.names if name != victim)
    signatures = {name: group.members[name].agree(without) for name in without}
    honest = [name for name in without if name not in colluders]
    given_ = {name: group.members[name].unmask(signatures) for name in honest}
    for name, message in given_.items():
        held = group.members[name]._held[victim]
        assert held is not None
        assert message.shares[victim] == held[1], "of the mask key, not both"
    shares = _colluding_shares(group, colluders, 0, victim)
    guess = combine(list(shares.values()), lagrange_weights(list(shares)))
    assert guess != group.members[victim]._self_seed
    stripped = masks.Masks(SIZE, 32).of(masks.self_mask_key(guess, group.terms.digest))
    actual = masks.Masks(SIZE, 32).of(
        masks.self_mask_key(group.members[victim]._self_seed, group.terms.digest)
    )
    assert not np.array_equal(stripped, actual)
    # Nor will anybody give the other kind any more.
    for name in honest:
        with pytest.raises(EncryptionError, match="step"):
            group.members[name].unmask(signatures)


def test_two_lists_cannot_both_be_signed_by_enough() -> None:
    """Every honest member signs once; a list needs k signatures and t members sign everything.

    So whoever shares masks with k has an honest one among those who sign the contributors.
    """
    terms = Group(4, 3, 1).terms
    for count in range(4, 40):
        for colluders in range(1, (count - 1) // 3 + 1):
            object.__setattr__(terms, "colluders", colluders)
            threshold = terms.threshold(count)
            assert 2 * (threshold - colluders) > count - colluders
            assert count - threshold >= colluders - 1, "that many may vanish"


def test_a_server_that_shows_different_lists_gets_nothing() -> None:
    group = Group(10, 7, 3)
    group.open_and_share()
    group.send_vectors()
    first, second = tuple(group.names[:8]), tuple(group.names[2:])
    signatures: dict[tuple[str, ...], dict[str, bytes]] = {}
    for name in group.names:
        chosen = first if name in first and name not in group.names[5:8] else second
        if name in chosen:
            signatures.setdefault(chosen, {})[name] = group.members[name].agree(chosen)
    for chosen, signed in signatures.items():
        for name in signed:
            with pytest.raises(EncryptionError, match="agree on the contributors, 7 must"):
                group.members[name].unmask(signed)
        assert len(signed) < group.terms.threshold(10), chosen


def test_a_server_that_shows_different_openings_is_found_out() -> None:
    group = Group(8, 5, 1)
    openings = {name: group.members[name].open() for name in group.names}
    half = {name: openings[name] for name in group.names[:6]}
    sealed = {
        name: group.members[name].share(half if name == "m000" else openings) for name in group.names[:6]
    }
    with pytest.raises(EncryptionError, match=r"of m001, m002, .*are of another sum"):
        group.members["m000"].accept({name: sealed[name]["m000"] for name in sealed})


def test_masks_of_those_who_are_to_vanish_do_not_hide_a_vector_alone() -> None:
    """The server gives a victim envelopes of members alone whose mask keys it is about to be given.

    The others sign that the victim contributes and that those members vanished: shares of the victim's
    self-mask and of their mask keys then come, and it has a mask in common with nobody else.
    """
    group = Group(20, 6, 2)
    group.open_and_share()
    colluders, vanishing = {"m000", "m001"}, {"m016", "m017", "m018"}
    envelopes = group.server.envelopes_for("m019")
    few = {name: envelopes[name] for name in colluders | vanishing | {"m019"}}
    assert len(few) == group.terms.minimum
    with pytest.raises(EncryptionError, match="6 members shared their masks, 12 of 20 are needed"):
        group.members["m019"].accept(few)


def test_a_member_that_opens_with_anothers_key_has_no_mask_of_that_one() -> None:
    group = Group(5, 4, 1)
    own, copied = group.members["m002"]._mask_key, group.members["m001"]._mask_key
    honest, copy = (
        masks.pair_mask_key(own, copied.public_key().public_bytes_raw(), bytes(32), ("m002", other))
        for other in ("m001", "m003")
    )
    assert honest != copy
    assert honest == masks.pair_mask_key(
        copied, own.public_key().public_bytes_raw(), bytes(32), ("m001", "m002")
    )


def test_contributors_are_counted_once_each() -> None:
    group = Group(5, 4, 1)
    group.open_and_share()
    group.send_vectors()
    with pytest.raises(EncryptionError, match="a sum needs 4"):
        group.members["m000"].agree(["m000", "m000", "m001", "m001"])


def test_a_repeated_or_early_step_is_refused() -> None:
    member = Group(5, 4, 1).members["m000"]
    with pytest.raises(EncryptionError, match="the next is 'open'"):
        member.agree(["m000"])
    member.open()
    with pytest.raises(EncryptionError, match="the next is 'share'"):
        member.open()


def _changed(value: bytes) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:]


@pytest.mark.parametrize("field", ["mask_key", "envelope_key", "self_check", "signature"])
def test_an_opening_that_its_member_did_not_sign_is_refused_by_name(field: str) -> None:
    group = Group(5, 4, 1)
    openings = {name: group.members[name].open() for name in group.names}
    openings["m003"] = replace(openings["m003"], **{field: _changed(getattr(openings["m003"], field))})
    with pytest.raises(EncryptionError, match="'m003' is not signed"):
        group.members["m000"].share(openings)


def test_an_opening_of_another_round_is_refused() -> None:
    group = Group(5, 4, 1)
    context = SumTerms(b"\1" * 32, group.terms.members, group.terms.identity_keys, 4, 1, SIZE)
    late = SumMember(context, "m003", group.identities["m003"]).open()
    openings = {name: group.members[name].open() for name in group.names} | {"m003": late}
    with pytest.raises(EncryptionError, match="'m003' is not signed by it for this sum"):
        group.members["m000"].share(openings)


class Liars(Group):
    """A group in which somebody seals or gives false shares."""

    def __init__(
        self,
        *counts: int,
        sealing: Sequence[str] = (),
        giving: Sequence[str] = (),
        victims: Sequence[str] = (),
        vanish: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(*counts, vanish=vanish)
        self.sealing, self.giving, self.victims = sealing, giving, victims

    def sealed(self, name: str, envelopes: dict[str, bytes]) -> bytes:
        damaged = {other: _changed(envelopes[other]) for other in self.victims if name in self.sealing}
        return super().sealed(name, envelopes | damaged)

    def given(self, name: str, unmasking: Unmasking) -> Unmasking:
        if name not in self.giving:
            return unmasking
        shares = unmasking.shares.items()
        return Unmasking({other: None if own is None else (own + 1) % PRIME for other, own in shares})


def test_envelopes_that_do_not_hold_what_was_announced_cost_nobody_the_sum() -> None:
    group = Liars(10, 7, 3, sealing=["m002"], victims=["m000", "m005"])
    survivors, total = group.run()
    assert survivors == tuple(group.names)
    assert np.array_equal(total, sum(group.vectors.values()))
    assert group.server.disputes == {("m000", "m002"), ("m005", "m002")}
    assert not group.server.faults, "which of the two lies is not known yet"


def test_more_damaged_envelopes_than_members_may_lie_are_the_servers_doing() -> None:
    group = Group(5, 4, 1)
    group.open_and_share()
    envelopes = group.server.envelopes_for("m000")
    damaged = {name: _changed(envelopes[name]) for name in ("m001", "m002")}
    with pytest.raises(EncryptionError, match="of m001, m002 were altered"):
        group.members["m000"].accept(envelopes | damaged)


@pytest.mark.parametrize("vanish", [{}, {"m007": 3}])
def test_whoever_gives_false_shares_is_named_and_the_sum_made_of_the_true_ones(
    vanish: dict[str, int],
) -> None:
    group = Liars(10, 7, 3, giving=["m001", "m002"], vanish=vanish)
    survivors, total = group.run()
    assert np.array_equal(total, sum(group.vectors[name] for name in survivors))
    assert set(group.server.faults) == {"m001", "m002"}
    assert "another share of" in group.server.faults["m001"]


def test_shares_of_another_sum_are_false_and_whoever_replays_them_is_named() -> None:
    earlier = Group(10, 7, 3, seed=1)
    earlier.run()
    seen = earlier.server._shares

    class Replaying(Group):
        def given(self, name: str, unmasking: Unmasking) -> Unmasking:
            return Unmasking({other: seen[other][name] for other in seen}) if name == "m004" else unmasking

    group = Replaying(10, 7, 3)
    survivors, total = group.run()
    assert np.array_equal(total, sum(group.vectors[name] for name in survivors))
    assert "another share of" in group.server.faults.pop("m004")
    assert not group.server.faults


def test_malformed_second_and_foreign_shares_are_refused_by_name() -> None:
    group = Group(6, 4, 1, vanish={"m005": 3})
    names = group.names
    with pytest.raises(EncryptionError, match="95 bytes, expected 6 pieces of 16"):
        Unmasking.decoded(bytes(95), names)
    with pytest.raises(EncryptionError, match="sent as a share of 'm002' is none"):
        Unmasking.decoded(bytes(32) + PRIME.to_bytes(16, "little") + bytes(48), names)
    group.run()
    shares = Unmasking(dict.fromkeys(names, 1))
    with pytest.raises(EncryptionError, match="shares of 'm005', who sent no vector"):
        group.server.add_unmasking("m005", shares)
    with pytest.raises(EncryptionError, match="shares of 'm001', who sent no vector or has sent its shares"):
        group.server.add_unmasking("m001", shares)


def test_with_too_few_true_shares_there_is_no_sum_and_a_reason() -> None:
    group = Liars(10, 7, 3, giving=["m001"], vanish={"m007": 3, "m008": 3, "m009": 4})
    with pytest.raises(EncryptionError, match="'m001': it gave another share of"):
        group.run()


@pytest.mark.parametrize(("seed", "vanish"), [("_self_seed", {}), ("_mask_seed", {"m003": 3})])
def test_whoever_seals_shares_of_another_secret_is_named(seed: str, vanish: dict[str, int]) -> None:
    """Nobody gave a false share, so none of those who gave one is blamed."""
    group = Group(10, 7, 3, vanish=vanish)
    for name in group.names:
        group.server.add_opening(name, group.members[name].open())
    openings = group.server.close_openings()
    setattr(group.members["m003"], seed, getattr(group.members["m003"], seed) + 1)
    for name in group.names:
        group.server.add_envelopes(name, group.sealed(name, group.members[name].share(openings)))
    group.send_vectors()
    with pytest.raises(EncryptionError, match="'m003': it sealed shares that do not lead to its masks"):
        group.unmask()
    assert set(group.server.faults) == {"m003"}


def test_the_server_cannot_change_an_envelope_and_its_check_together() -> None:
    """It does not know the share, so it cannot make the hash of what a changed bit turns it into."""
    group = Group(5, 4, 1)
    group.open_and_share()
    envelopes = group.server.envelopes_for("m000")
    turned = _changed(envelopes["m001"])
    for changed in (turned, turned[:32] + bytes(32), envelopes["m002"]):
        member = copy.copy(group.members["m000"])
        member._held = {}
        member.accept(envelopes | {"m001": changed})
        assert member._held["m001"] is None


def test_the_server_refuses_what_does_not_belong_to_the_sum() -> None:
    group = Group(5, 4, 1)
    group.open_and_share()
    with pytest.raises(EncryptionError, match="'m009'"):
        group.server.add_vector("m009", bytes(4 * SIZE))
    with pytest.raises(EncryptionError, match="27 bytes, expected 28"):
        group.server.add_vector("m000", bytes(4 * SIZE - 1))
    group.send_vectors()
    with pytest.raises(EncryptionError, match="has sent one"):
        group.server.add_vector("m000", bytes(4 * SIZE))
    survivors = group.server.close_vectors()
    signature = group.members["m000"].agree(survivors)
    with pytest.raises(EncryptionError, match="'m001' did not sign"):
        group.server.add_signature("m001", signature)
    with pytest.raises(EncryptionError, match="other members than those"):
        group.server.add_unmasking("m000", Unmasking({"m000": 1}))


@pytest.mark.parametrize(("count", "minimum", "colluders"), [(6, 7, 1), (6, 3, 3), (6, 4, 0)])
def test_terms_that_protect_nobody_are_refused(count: int, minimum: int, colluders: int) -> None:
    with pytest.raises(EncryptionError, match="contributors"):
        Group(count, minimum, colluders)


@pytest.mark.parametrize("top_bit", [0, 128])
@pytest.mark.parametrize("low", sorted(_SMALL_ORDER))
def test_every_key_of_small_order_is_refused_and_is_one(low: bytes, top_bit: int) -> None:
    key = low[:31] + bytes([low[31] | top_bit])
    with pytest.raises(EncryptionError, match="no usable X25519 key"):
        masks.agree(X25519PrivateKey.generate(), key)
    group = Group(5, 4, 1)
    cheat, fine = group.identities["m003"], group.members["m003"].open()
    for content in ((key, fine.envelope_key, bytes(32)), (fine.mask_key, key, bytes(32))):
        opening = sign_opening(group.terms, "m003", content, cheat)
        with pytest.raises(EncryptionError, match="'m003' opened with a key of small order"):
            check_opening(group.terms, "m003", opening)
