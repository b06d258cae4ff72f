"""API keys: read from the environment, checked before they are sent, and masked in every message.

    key = api_key("OPENAI_API_KEY")
    message = masked(reply, key)

A server may repeat a key in any form: as it is, in JSON, in an address, in base64. None of them
appears in a message, a file or an error.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from html.entities import codepoint2name

from pliant.errors import InvalidInput

MASK = "***"
_SHORTEST = 4  # letters: masking the dummy key "x" would make every message unreadable
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_variable(name: str) -> None:
    """Refuse what cannot name an environment variable. It may be the key itself, so the message
    does not show it."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "an API key is named by its environment variable (letters, digits and _, as in "
            "OPENAI_API_KEY), and this is no such name: is it the key itself?"
        )


def api_key(variable: str) -> str | None:
    """The key in an environment variable, without white space around it; None if there is none."""
    key = os.environ.get(variable, "").strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InvalidInput(
            f"{variable} holds no API key: a key is one word of printable ASCII letters, and this "
            "has a space, a line break or another letter inside"
        )
    return key


def masked(text: str, *secrets: str | None) -> str:
    """The text with *** in place of each secret, in whatever form it appears."""
    for secret in secrets:
        if secret and len(secret) >= _SHORTEST:
            text = _any_form(secret).sub(MASK, text)
    return text


@lru_cache(maxsize=64)
def _any_form(secret: str) -> re.Pattern[str]:
    """Letter by letter in any escape, or encoded as a whole; in capitals, too."""
    encoded = [*_in_base64(secret), secret[::-1], *_in_hex(secret)]
    forms = ["".join(map(_letter, secret)), *map(re.escape, encoded)]
    return re.compile("|".join(forms), re.IGNORECASE)


def _letter(letter: str) -> str:
    """One letter as JSON, Python, addresses and HTML write it, several times over too."""
    code = ord(letter)
    forms = [
        re.escape(letter),
        rf"(?<=\\)(?:u00|x){code:02x}",
        rf"%(?:25){{0,4}}{code:02x}",
        rf"&(?:amp;){{0,4}}#0{{0,6}}{code};",
        rf"&(?:amp;){{0,4}}#x0{{0,6}}{code:x};",
    ]
    if code in codepoint2name:
        forms.append(f"&(?:amp;){{0,4}}{codepoint2name[code]};")
    if letter == "+":
        forms.append(" ")  # as it is read from an address
    return rf"\\{{0,8}}(?:{'|'.join(forms)})"


def _in_base64(secret: str) -> Iterator[str]:
    """Also inside longer content: at each of three offsets, without the letters at both ends that
    depend on what is around it."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for offset, start in enumerate((0, 2, 3)):
            encoded = encode(b"\0" * offset + secret.encode()).decode().rstrip("=")
            shared = 1 if (offset + len(secret)) % 3 else 0
            yield encoded[start : len(encoded) - shared]


def _in_hex(secret: str) -> Iterator[str]:
    octets = secret.encode()
    yield from (octets.hex(), octets.hex(" "), octets.hex(":"))
