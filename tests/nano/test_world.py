"""The world keeps its promises: right answers, splits that never meet, the same by the seed."""

import re
from collections import Counter
from hashlib import sha256
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import InvalidInput
from pliant.nano import DIFFICULTIES, HELD_OUT, TRAINED, questions, stream
from pliant.nano.families import BY_NAME


def numbers(prompt: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", prompt)]


# What a person would compute from the words of the prompt alone, not from the generator's state.
def solve(family: str, prompt: str) -> str:
    return SOLVERS[family](prompt)


def solve_boolean(prompt: str) -> str:
    given = dict(re.findall(r"\b([a-z])([+-])", prompt))
    spoken = re.split(r"[+-](?![ ,]?[a-z][+-])[:, ]+", prompt)[-1].rstrip("?").split()
    value, operator, negate = None, None, False
    for word in spoken:
        if word in ("and", "or"):
            operator = word
        elif word == "not":
            negate = True
        else:
            operand = (given[word] == "+") != negate
            negate = False
            if operator is None:
                value = operand
            else:
                value = (value and operand) if operator == "and" else (value or operand)
    return "yes" if value else "no"


def solve_order(prompt: str) -> str:
    pairs = re.findall(r"([a-z])>([a-z])", prompt)
    rank = {c: 0 for pair in pairs for c in pair}
    for _ in rank:
        for a, b in pairs:
            rank[b] = max(rank[b], rank[a] + 1)
    chain = sorted(rank, key=rank.get)
    end = re.search(r"top|low|2nd", prompt).group()
    return {"top": chain[0], "low": chain[-1], "2nd": chain[1]}[end]


def solve_count(prompt: str) -> str:
    letter = re.search(r"count (\w) in|many (\w) in|^(\w) in", prompt)
    c = next(g for g in letter.groups() if g)
    return str(re.search(r"in (\w+)", prompt).group(1).count(c))


def solve_pattern(prompt: str) -> str:
    asked = numbers(prompt)[0]
    row = max(re.findall(r"[a-z]+", re.sub(r"\b(more|after|and|on)\b", "", prompt)), key=len)
    periods = {1: 2, 2: 3, 3: 4, 5: 5, 8: 7}
    unit = row[: periods[asked]]
    return (unit * 9)[len(row) : len(row) + asked]


def solve_reading(prompt: str) -> tuple[str, str]:
    """The text, and what is asked of it, for each of the reading wordings."""
    prompt = prompt.removeprefix("read ")
    at = max(prompt.rfind(". "), prompt.rfind("; "))
    what = prompt[at + 2 :]
    for word in ("?", " has", " in all", "sum ", "all "):
        what = what.replace(word, "")
    return prompt[:at], what


def solve_find(prompt: str) -> str:
    told, name = solve_reading(prompt)
    return dict(fact.split() for fact in told.split(", "))[name]


def solve_total(prompt: str) -> str:
    told, name = solve_reading(prompt)
    facts = [fact.split() for fact in told.split(", ")]
    return str(sum(int(value) for who, value in facts if who == name))


def solve_cell(prompt: str) -> str:
    told, what = solve_reading(prompt)
    row, column = what.split()
    for line in told.split("; "):
        name, *cells = line.split()
        if name == row:
            return next(cell[1:] for cell in cells if cell[0] == column)
    raise AssertionError(prompt)


def word_of(prompt: str) -> str:
    said = r"\b(reverse|backwards|turn|round|sort|in order|from a to z|shift|one letter on)\b"
    return re.sub(said + r"|next letter of each of", "", prompt).strip()


SOLVERS = {
    "add": lambda p: str(sum(numbers(p))),
    "subtract": lambda p: str(max(numbers(p)) - min(numbers(p))),
    "multiply": lambda p: str(numbers(p)[0] * numbers(p)[1]),
    "remainder": lambda p: str(numbers(p)[0] % numbers(p)[1]),
    "reverse": lambda p: "".join(reversed(word_of(p))),
    "sort": lambda p: "".join(sorted(word_of(p))),
    "count": solve_count,
    "boolean": solve_boolean,
    "order": solve_order,
    "largest": lambda p: str(max(numbers(p))),
    "step": lambda p: str(2 * numbers(p)[-1] - numbers(p)[-2]),
    "fibonacci": lambda p: str(numbers(p)[-1] + numbers(p)[-2]),
    "pattern": solve_pattern,
    "find": solve_find,
    "total": solve_total,
    "cell": solve_cell,
    "smallest": lambda p: str(min(numbers(p))),
    "double": lambda p: str(2 * numbers(p)[0]),
    "shift": lambda p: "".join(chr(ord(c) + 1) for c in word_of(p)),
}


@pytest.mark.parametrize("family", BY_NAME)
def test_answers_follow_from_the_words_of_the_prompt(family):
    asked = questions("train", 400, seed=3, families=[family])
    wrong = [(q.prompt, q.answer) for q in asked if solve(family, q.prompt) != q.answer]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("family", BY_NAME)
def test_splits_never_meet_in_any_wording(family):
    """Whatever is drawn, a content's split is decided once: no wording of it crosses over."""
    seen = {s: {q.prompt for q in questions(s, 600, 1, [family])} for s in ("train", "dev", "test")}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["dev"]
    assert not seen["dev"] & seen["test"]


@given(st.integers(0, 2**31), st.sampled_from(sorted(BY_NAME)))
def test_the_hash_of_the_canonical_wording_decides_the_split(seed, family):
    import random

    from pliant.nano.world import _draw, _hashes

    rng = random.Random(seed)
    question = _draw(BY_NAME[family], rng.choice(DIFFICULTIES), _hashes("test"), rng)
    rng = random.Random(seed)
    difficulty = rng.choice(DIFFICULTIES)
    while True:  # draw the same again, and look at the first wording ourselves
        draft = BY_NAME[family].make(rng, difficulty)
        byte = sha256(f"{family}/{draft.wordings[0]}".encode()).digest()[0]
        if byte >= 224:
            break
    assert question.prompt in draft.wordings and question.answer == draft.answer


def test_the_same_seed_gives_the_same_questions_and_another_seed_others():
    assert questions("test", 50, seed=4) == questions("test", 50, seed=4)
    assert questions("test", 50, seed=4) != questions("test", 50, seed=5)
    assert questions("test", 20, seed=4) == questions("test", 50, seed=4)[:20]


def test_the_world_is_as_wide_as_it_says():
    assert len(TRAINED) >= 12 and len({f.domain for f in TRAINED}) >= 4
    assert len(HELD_OUT) >= 2
    assert not {f.domain for f in TRAINED} & {f.domain for f in HELD_OUT}
    asked = questions("train", 20_000, seed=0)
    lengths = [len(q.prompt) for q in asked]
    assert min(lengths) <= 12 and max(lengths) > 1000
    assert sum(lengths) / len(lengths) < 25
    assert sum(length > 200 for length in lengths) / len(lengths) < 0.05
    assert {q.difficulty for q in asked} == set(DIFFICULTIES)


def test_prompts_of_a_test_set_are_distinct_and_every_family_has_several_wordings():
    asked = questions("test", 6000, seed=0)
    assert len({q.prompt for q in asked}) == len(asked)
    import random

    for family in BY_NAME.values():
        for difficulty in DIFFICULTIES:
            draft = family.make(random.Random(0), difficulty)
            assert len(set(draft.wordings)) >= 3


def test_families_are_asked_by_their_weight():
    drawn = Counter(q.family for q in islice(stream("train", seed=2), 20_000))
    total = sum(f.weight for f in TRAINED)
    for family in TRAINED:
        expected = 20_000 * family.weight / total
        assert abs(drawn[family.name] - expected) < 6 * expected**0.5


def test_no_prompt_comes_twice_until_there_is_nothing_else():
    from pliant.nano.world import _distinct

    three = questions("test", 3)
    five = list(islice(_distinct(cycle([three[0], *three])), 5))
    assert five[:3] == three and set(five[3:]) <= set(three)


def test_check_wants_the_answer_and_nothing_else():
    question = questions("test", 1, seed=0, families=["add"])[0]
    assert question.check(question.answer) and question.check(f" {question.answer}\n")
    assert not question.check("") and not question.check(question.answer + "0")
    assert not question.check(f"it is {question.answer}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "valid", "n": 1}, "'valid'"),
        ({"split": "test", "n": -1}, "-1"),
        ({"split": "test", "n": 1, "families": ["adding"]}, "'adding'"),
        ({"split": "test", "n": 1, "families": []}, "empty"),
    ],
)
def test_bad_input_is_named(arguments, said):
    with pytest.raises(InvalidInput, match=said):
        questions(**arguments)


def test_wordings_can_be_chosen_and_the_stream_stays_as_it_is() -> None:
    every = questions("test", 300, seed=3)
    drawn = list(islice(stream("test", seed=3), 300))
    assert {question.wording for question in every} == {0, 1, 2}
    second = questions("test", 60, seed=3, wordings=[1])
    assert {question.wording for question in second} == {1}
    assert second == [q for q in every if q.wording == 1][:60]
    assert every[:100] == drawn[:100]


@pytest.mark.parametrize("wordings", [[], [3], [0, -1]])
def test_an_unknown_wording_is_refused(wordings: list[int]) -> None:
    with pytest.raises(InvalidInput, match="wordings is"):
        questions("test", 3, wordings=wordings)
