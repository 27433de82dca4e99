"""Text, JSON and TOML that somebody else wrote: all faults are one family of errors, and quote nothing."""

import math
from pathlib import Path

import pytest

from fedmosaic.privacy import configuration
from fedmosaic.protos.errors import ConfigurationError


class Settings(configuration.Frozen):
    name: str = ""
    store: int = 0


BAD_JSON = {
    "empty": b"",
    "cut": b'{"name": "secr',
    "half a character": b'{"name": "secret \\ud83d"}',
    "half a character in a key": b'{"\\uDC00secret": 1}',
    "5,000 digits": b'{"store": ' + b"9" * 5000 + b"}",
    "deep nesting": b"[" * 100_000 + b"]" * 100_000,
    "NaN": b'{"store": NaN}',
    "Infinity": b'{"store": -Infinity}',
    "too large": b'{"store": 1e999}',
    "UTF-16": '{"name": "secret"}'.encode("utf-16"),
    "not UTF-8": b'{"name": "secret \xff"}',
    "NUL": b"\x00",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_a_value_error_that_quotes_nothing(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        configuration.parse_json(content)
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None
    assert type(error.value) is ValueError, "no error that carries the text with it"
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"x\.json"):
        configuration.read_configuration(tmp_path / "x.json", Settings)


@pytest.mark.parametrize("ending", ["json", "toml"])
def test_a_byte_order_mark_is_no_fault(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings.{ending}"
    text = '{"name": "é"}' if ending == "json" else 'name = "é"'
    path.write_text(text, encoding="utf-8-sig")
    assert configuration.read_configuration(path, Settings).name == "é"


def test_whole_characters_beyond_the_first_plane_pass() -> None:
    assert configuration.parse_json(b'["\\ud83d\\ude00"]') == ["\U0001f600"]
    assert configuration.parse_json("[1, -2.5, 1e300, 12345678901234567890]") == [
        1,
        -2.5,
        1e300,
        12345678901234567890,
    ]


@pytest.mark.parametrize(
    "content",
    [b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000, b"\xff\xfea", b"\xe9", b"", b"\x00"],
    ids=["deep", "digits", "UTF-16", "Latin-1", "empty", "NUL"],
)
def test_bad_toml_is_a_configuration_error(content: bytes, tmp_path: Path) -> None:
    class Needs(configuration.Frozen):
        a: str

    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"x\.toml"):
        configuration.read_configuration(tmp_path / "x.toml", Needs)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "none/x"])
def test_a_path_that_cannot_be_is_a_configuration_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        configuration.read_configuration(tmp_path / f"{name}.toml", Settings)


def test_utf_16_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="save it as UTF-8"):
        configuration.decode_text("text".encode("utf-16"))


def test_a_password_in_a_wrong_value_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as error:
        configuration.validate({"store": "postgresql://me:secret@host/db"}, Settings, "server.toml")
    assert "secret" not in str(error.value)
    assert "postgresql://***@host/db" in str(error.value)


def test_canonical_json_has_one_spelling_and_no_number_that_is_not_finite() -> None:
    assert configuration.canonical_json({"b": 1.0, "a": ["ε", None]}) == '{"a":["\\u03b5",null],"b":1.0}'
    assert configuration.canonical_json({"a": "ε"}, ascii_only=False) == '{"a":"ε"}'
    with pytest.raises(ValueError, match="JSON compliant"):
        configuration.canonical_json(math.nan)
