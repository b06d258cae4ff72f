"""The families of questions, by domain."""

from pliant.nano.families import arithmetic, logic, reading, sequences, unseen, words
from pliant.nano.question import Family

TRAINED: tuple[Family, ...] = (
    arithmetic.FAMILIES + words.FAMILIES + logic.FAMILIES + sequences.FAMILIES + reading.FAMILIES
)
HELD_OUT: tuple[Family, ...] = unseen.FAMILIES
BY_NAME: dict[str, Family] = {family.name: family for family in TRAINED + HELD_OUT}
