"""Rows of records: forms of a fixed schema, in which a few tokens carry what there is to learn.

There are two sorts. People are made up: each row holds forms with the same keys and phrases, whose
values (a place of birth, an employer, ...) can only be memorized. Characters are natural: Unicode's
data, as this Python has it, in the format of its XML edition. A *layout* is an order of the fields;
a record names its layout first, so that every later token belongs to the schema or is a fact.

A model begins with other records in all layouts. Then it learns new ones, each in most layouts, and
is evaluated on the same facts in the remaining layouts. Every token has a label.
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

from benchmarks.gradient_material import Encode, Material, Row

WORDS = 8192
LAYOUTS, ASKED, A_ROW = 12, 3, 4
"""Orders of the fields; the held-out ones of each record; records in a row."""


def _learned(record: int) -> list[int]:
    """The layouts in which this record is learned."""
    return [layout for layout in range(LAYOUTS) if layout not in _asked(record)]


def _asked(record: int) -> list[int]:
    """Its held-out layouts."""
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
"""Of persons; the rest of the vocabulary are values, the same number for each key."""
VALUES = (WORDS - len(SCHEMA) - NAMES) // len(KEYS)


def people(number: int) -> Material:
    """Persons that are new to the model: forms to learn, and held-out ones."""
    new = range(NAMES - number, NAMES)
    learned, asked = ([_form(i, layout) for i in new for layout in part(i)] for part in PARTS)
    return Material(_together(learned, "learned"), _together(asked, "asked"))


def other_people(number: int) -> Material:
    """What the model was trained on before."""
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
    """Rotated; every second layout is reversed."""
    turned = [*fields[layout // 2 :], *fields[: layout // 2]]
    return turned[::-1] if layout % 2 else turned


def _spelt(*words: str) -> list[int]:
    return [CODE[word] for word in words]


def _together(records: list[list[int]], what: str, a_row: int = A_ROW) -> list[Row]:
    """Shuffled, several records in a row."""
    random.Random(f"together/{what}").shuffle(records)
    groups = (records[at : at + a_row] for at in range(0, len(records) - a_row + 1, a_row))
    rows = [sum(group, []) for group in groups]
    return [{"input_ids": row, "labels": row} for row in rows]


# --- characters ----------------------------------------------------------------------------------


def characters(number: int, encode: Encode | None = None, a_row: int = A_ROW) -> Material:
    """Characters that are new to the model: records to learn, and held-out ones. `encode` is a real
    model's tokenizer, whose records are longer: `a_row` go into a row."""
    encode = encode or _byte_pair_ids
    new, _ = _split(number)
    learned, asked = (
        [encode(_entry(c, layout)) for i, c in enumerate(new) for layout in part(i)]
        for part in PARTS
    )
    return Material(_together(learned, "learned", a_row), _together(asked, "asked", a_row))


def other_characters(number: int) -> Material:
    """What the model was trained on before."""
    _, old = _split(number)
    layouts = random.Random("old layouts")
    records = [_byte_pair_ids(_entry(c, layouts.randrange(LAYOUTS))) for c in old]
    rows = _together(records, "read")
    return Material(rows, rows)


def _split(number: int) -> tuple[list[str], list[str]]:
    """The new ones, from all of Unicode, and all others."""
    named = [chr(code) for code in range(0x20000) if _has_a_name_of_its_own(chr(code))]
    random.Random("characters").shuffle(named)
    return named[:number], named[number:]


def _has_a_name_of_its_own(character: str) -> bool:
    """Not a name that is derived from its number or its sound."""
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
    attributes = " ".join(f'{name}="{fields[name]}"' for name in _arranged(list(fields), layout))
    return f'<char order="{layout}" cp="{_number(character)}" {attributes}/>\n'


def _number(text: str) -> str:
    return " ".join(f"{ord(letter):04X}" for letter in text)


def _other_case(character: str, changed: str) -> str:
    return "#" if changed == character else _number(changed)


def _byte_pair_ids(text: str) -> list[int]:
    return list(_byte_pairs().encode(text).ids)


@cache
def _byte_pairs() -> Tokenizer:
    """A byte-pair vocabulary of what the model was trained on."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Bytes()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts() -> Iterator[str]:
    return (_entry(c, 0) for c in _split(64)[1])
