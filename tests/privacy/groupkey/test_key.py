"""The group key as a value: sub-keys, silence, storage."""

import json

import pytest

from fedmosaic.privacy.groupkey.key import GroupKey, commitment_to
from fedmosaic.protos.errors import StateError

MASTER, SECRET = b"\xa5" * 32, b"\x5a" * 64


def key(**changes: object) -> GroupKey:
    fields: dict[str, object] = {
        "federation": "f",
        "epoch": 3,
        "members": ("a", "b", "c", "d"),
        "parameters_hash": b"P" * 32,
        "transcript": b"T" * 32,
        "fingerprint": commitment_to(b"T" * 32, MASTER, SECRET),
        "master": MASTER,
        "ckks_secret": SECRET,
    }
    return GroupKey(**(fields | changes))  # type: ignore[arg-type]  # fields are changed one at a time


def test_subkeys_differ_by_purpose_salt_epoch_and_master() -> None:
    subkeys = [
        key().subkey(b"pad"),
        key().subkey(b"confirm"),
        key().subkey(b"pad", salt=b"1"),
        key(transcript=b"U" * 32).subkey(b"pad"),
        key(master=b"\xa6" * 32).subkey(b"pad"),
    ]
    assert len(set(subkeys)) == len(subkeys)
    assert all(len(subkey) == 32 for subkey in subkeys)
    assert key().subkey(b"pad") == subkeys[0]
    assert MASTER not in subkeys


def test_printing_a_key_shows_no_secret() -> None:
    for text in (repr(key()), str(key()), f"{key()}"):
        assert "master" not in text
        assert "ckks_secret" not in text
        assert repr(MASTER)[2:-1] not in text
        assert repr(SECRET)[2:-1] not in text


def test_a_stored_key_comes_back() -> None:
    restored = GroupKey.load(key().dump())
    assert vars(restored) == vars(key())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-5],
        lambda content: b"[]",
        lambda content: b"\xff" + content,
        lambda content: json.dumps(json.loads(content) | {"master": "zz"}).encode(),
        lambda content: json.dumps(json.loads(content) | {"epoch": None}).encode(),
        lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != "members"}).encode(),
    ],
)
def test_a_damaged_key_is_refused(damage) -> None:  # type: ignore[no-untyped-def]  # parametrised functions
    with pytest.raises(StateError, match="damaged"):
        GroupKey.load(damage(key().dump()))


@pytest.mark.parametrize("field", ["master", "ckks_secret", "transcript", "fingerprint"])
def test_a_key_with_altered_secrets_is_refused(field: str) -> None:
    content = json.loads(key().dump())
    content[field] = "00" + content[field][2:]
    with pytest.raises(StateError, match="does not match its fingerprint"):
        GroupKey.load(json.dumps(content).encode())
