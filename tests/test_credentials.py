"""A key is checked before it is sent, and shows in no form in which somebody may repeat it."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.credentials import api_key, check_variable, masked
from pliant.errors import InvalidInput

KEY = "sk-\"Ab'9\\x<&>/+%=~_Zq"
LETTERS = st.characters(min_codepoint=33, max_codepoint=126)


def in_go(text: str) -> str:
    """Go writes these letters of JSON as escapes."""
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text))


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "a header": lambda key: f"Authorization: Bearer {key}",
    "lower case": str.lower,
    "upper case": str.upper,
    "reversed": lambda key: key[::-1],
    "twice": lambda key: key + key,
    "JSON": lambda key: json.dumps({"key": key}),
    "JSON in JSON": lambda key: json.dumps(json.dumps({"key": key})),
    "JSON in JSON in JSON": lambda key: json.dumps(json.dumps(json.dumps([key]))),
    "JSON of Go": in_go,
    "JSON of PHP": lambda key: json.dumps(key).replace("/", "\\/"),
    "escapes": lambda key: "".join(f"\\u{ord(letter):04X}" for letter in key),
    "Python": repr,
    "bytes": lambda key: repr(key.encode()),
    "bytes in hex": lambda key: "".join(f"\\x{ord(letter):02x}" for letter in key),
    "shell": lambda key: "'" + key.replace("'", "'\\''") + "'" if "'" not in key else repr(key),
    "an address": quote,
    "a part of an address": lambda key: quote(key, safe=""),
    "a form": quote_plus,
    "an address in an address": lambda key: quote(quote(key, safe=""), safe=""),
    "a form as it is read": lambda key: key.replace("+", " "),
    "every letter percent": lambda key: "".join(f"%{ord(letter):02x}" for letter in key),
    "HTML": html.escape,
    "HTML text": lambda key: html.escape(key, quote=False),
    "HTML in HTML": lambda key: html.escape(html.escape(key)),
    "references": lambda key: "".join(f"&#{ord(letter)};" for letter in key),
    "hex references": lambda key: "".join(f"&#x{ord(letter):X};" for letter in key),
    "JSON in HTML": lambda key: html.escape(json.dumps(key)),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "basic authentication": lambda key: base64.b64encode(f"api:{key}:x".encode()).decode(),
    "base64 of a header": lambda key: base64.b64encode(f"Bearer {key}\n".encode()).decode(),
    "base64 for addresses": lambda key: base64.urlsafe_b64encode(f"?{key}".encode()).decode(),
    "hex": lambda key: key.encode().hex(),
    "HEX WITH SPACES": lambda key: key.encode().hex(" ").upper(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_masked_in_every_form(form: str) -> None:
    message = f"before {FORMS[form](KEY)} after"
    hidden = masked(message, KEY)
    assert "***" in hidden and hidden.startswith("before ") and hidden.endswith(" after")
    left = hidden.replace("before ", "").replace(" after", "").replace("Authorization: Bearer", "")
    assert len(left) <= 24, left  # quotes, a name, the ends of base64


@given(key=st.text(LETTERS, min_size=8, max_size=60), form=st.sampled_from(sorted(FORMS)))
def test_any_key_is_masked_in_every_form(key: str, form: str) -> None:
    assert "***" in masked(FORMS[form](key), key)


def test_text_without_the_key_stays() -> None:
    assert masked("the server says 401: no such key", KEY, None, "", "e") == (
        "the server says 401: no such key"
    )


def test_masking_takes_no_time_in_a_text_made_for_it() -> None:
    for text in ("\\" * 20_000, "%25" * 7_000, "&amp;" * 4_000, KEY[:-1] * 1_000):
        assert masked(text, KEY) == text


@pytest.mark.parametrize("around", ["{}", "{}\n", "\r\n{}", "\t{} "])
def test_white_space_around_a_key_is_dropped(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    monkeypatch.setenv("MY_KEY", around.format(KEY))
    assert api_key("MY_KEY") == KEY


@pytest.mark.parametrize("inside", ["\n", "\r", "\t", " ", "\x7f", "é", "’", "\u200b", "\x1b"])
def test_a_key_with_other_letters_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.setenv("MY_KEY", f"sk-abc{inside}def")
    with pytest.raises(InvalidInput, match="MY_KEY holds no API key") as caught:
        api_key("MY_KEY")
    assert "abc" not in str(caught.value) and "def" not in str(caught.value)


def test_no_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " \n")
    assert api_key("MY_KEY") is None
    monkeypatch.delenv("MY_KEY")
    assert api_key("MY_KEY") is None


@pytest.mark.parametrize("name", ["sk-123", "", "A B", "9A", "A\n", "clé"])
def test_a_key_in_place_of_its_variable_is_not_shown(name: str) -> None:
    with pytest.raises(InvalidInput, match="is it the key itself") as caught:
        check_variable(name)
    assert not name or name not in str(caught.value)
    check_variable("MY_KEY_2")
