"""Rows of records: forms of a fixed schema, in which a few tokens carry what there is to learn.

Two sorts. People are made up: each row holds forms with the same keys and phrases, whose values
(a place of birth, an employer, ...) are facts that can only be known by heart. Characters are
natural: Unicode's own data, as this Python has it, in the way of its XML edition. A *layout* is an
order of the fields; a record names its layout first, so that what follows is the schema, or a fact.

A model begins with records of others in all layouts; then come new ones, each in most layouts, and
in those that are left over the same facts are asked again. Every token is learned by everybody.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from benchmarks.gradient_material import Material, Row

WORDS = 8192
LAYOUTS, ASKED, A_ROW = 12, 3, 4
"""Ways to order the fields; those of each record that are kept for the exam; records in a row."""


def _learned(record: int) -> list[int]:
    """The layouts in which this one is read."""
    return [layout for layout in range(LAYOUTS) if layout not in _asked(record)]


def _asked(record: int) -> list[int]:
    """Those in which it is asked for."""
    return [(record + i * LAYOUTS // ASKED) % LAYOUTS for i in range(ASKED)]


PARTS = _learned, _asked

# --- people --------------------------------------------------------------------------------------

KEYS = (
    "place of birth",
    "current employer",
    "field of study",
    "mother tongue",
    "favourite dish",
    "owner of a",
)
MARKS = ("{", "}", '"', ":", ",", "\n", "person", *(f"form-{i}" for i in range(LAYOUTS)))
SCHEMA = (*MARKS, *dict.fromkeys(word for key in KEYS for word in key.split()))
CODE = {word: i for i, word in enumerate(SCHEMA)}
NAMES = 1024
"""Of persons; what is left of the vocabulary are values, as many for each key."""
VALUES = (WORDS - len(SCHEMA) - NAMES) // len(KEYS)


def people(number: int) -> Material:
    """So many persons that the model has not met: forms that it learns, and the exam."""
    new = range(NAMES - number, NAMES)
    known, asked = ([_form(i, layout) for i in new for layout in some(i)] for some in PARTS)
    return Material(_together(known, "learned"), _together(asked, "asked"))


def other_people(number: int) -> Material:
    """What the model has read before."""
    forms = [_form(person, layout) for person in range(number) for layout in range(LAYOUTS)]
    rows = _together(forms, "read")
    return Material(rows, rows)


def _form(person: int, layout: int) -> list[int]:
    """`{ form-3 "person" : "A" , "place of birth" : "C" , ... }`"""
    facts = random.Random(f"person/{person}")
    values = [facts.randrange(VALUES) for _ in KEYS]
    name = len(SCHEMA) + person
    row = _spelt("{", f"form-{layout}", '"', "person", '"', ":", '"') + [name] + _spelt('"')
    for i in _arranged(range(len(KEYS)), layout):
        value = len(SCHEMA) + NAMES + i * VALUES + values[i]
        row += _spelt(",", '"', *KEYS[i].split(), '"', ":", '"') + [value] + _spelt('"')
    return row + _spelt("}", "\n")


def _arranged(fields: Sequence[Any], layout: int) -> list[Any]:
    """From another field on, round the corner; every other layout backwards."""
    turned = [*fields[layout // 2 :], *fields[: layout // 2]]
    return turned[::-1] if layout % 2 else turned


def _spelt(*words: str) -> list[int]:
    return [CODE[word] for word in words]


def _together(records: list[list[int]], what: str) -> list[Row]:
    """Some to a row, in an order of their own."""
    random.Random(f"together/{what}").shuffle(records)
    groups = (records[at : at + A_ROW] for at in range(0, len(records) - A_ROW + 1, A_ROW))
    rows = [sum(group, []) for group in groups]
    return [{"input_ids": row, "labels": row} for row in rows]


# --- characters ----------------------------------------------------------------------------------


def characters(number: int) -> Material:
    """So many characters that the model has not met, and the exam."""
    new, _ = _split(number)
    known, asked = (
        [_encoded(one, layout) for i, one in enumerate(new) for layout in some(i)] for some in PARTS
    )
    return Material(_together(known, "learned"), _together(asked, "asked"))


def other_characters(number: int) -> Material:
    """What the model has read before."""
    _, old = _split(number)
    layouts = random.Random("old layouts")
    rows = _together([_encoded(one, layouts.randrange(LAYOUTS)) for one in old], "read")
    return Material(rows, rows)


def _split(number: int) -> tuple[list[str], list[str]]:
    """The new ones, from all over Unicode, and all others."""
    named = [chr(code) for code in range(0x20000) if _has_a_name_of_its_own(chr(code))]
    random.Random("characters").shuffle(named)
    return named[:number], named[number:]


def _has_a_name_of_its_own(character: str) -> bool:
    """Not one that is made from its number, or from its sound."""
    name = unicodedata.name(character, "")
    return bool(name) and not name.startswith(("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU"))


def _entry(character: str, layout: int) -> str:
    """`<char order="3" cp="0041" na="LATIN CAPITAL LETTER A" gc="Lu" ... />`"""
    fields = {
        "na": unicodedata.name(character),
        "gc": unicodedata.category(character),
        "ccc": str(unicodedata.combining(character)),
        "dm": unicodedata.decomposition(character) or "#",
        "nv": f"{unicodedata.numeric(character, -1):g}".replace("-1", "NaN"),
        "bc": unicodedata.bidirectional(character),
        "Bidi_M": "NY"[unicodedata.mirrored(character)],
        "suc": _other_case(character, character.upper()),
        "slc": _other_case(character, character.lower()),
        "stc": _other_case(character, character.title()),
        "ea": unicodedata.east_asian_width(character),
    }
    told = " ".join(f'{name}="{fields[name]}"' for name in _arranged(list(fields), layout))
    return f'<char order="{layout}" cp="{_number(character)}" {told}/>\n'


def _number(text: str) -> str:
    return " ".join(f"{ord(one):04X}" for one in text)


def _other_case(character: str, other: str) -> str:
    return "#" if other == character else _number(other)


def _encoded(character: str, layout: int) -> list[int]:
    return list(_words().encode(_entry(character, layout)).ids)


@cache
def _words() -> Tokenizer:
    """Byte pairs of what the model has read."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Bytes()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts() -> Iterator[str]:
    return (_entry(one, 0) for one in _split(64)[1])
