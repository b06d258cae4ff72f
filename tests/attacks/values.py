"""Values of options that a user, a script or an enemy may give: by type, and by what they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tests.attacks import workplace

from pliant.options import Option

FILES = ("data", "labels", "prompts", "task", "evaluate", "test", "file", "evaluation_data")
FILES += ("evaluation", "recipe", "subset")
"""Options that are a file to read, though they are texts."""
FOLDERS = ("model", "model_name", "base", "teacher", "scorer", "router", "expert", "experts")
FOLDERS += ("other", "folder", "adapters", "classifier", "ledger", "resume", "recover")
"""Options that are a folder of a model, or of what is put on one."""
OURS = ("router", "remote", "scorer", "experts", "experts/words", "experts/sums", "gates", "model")
WORDS = {"EMPTY": "", "SPACE": " "}


def _read() -> dict[str, list[str]]:
    """The pools of `values.txt`."""
    text = re.sub(r"\n +", " ", (Path(__file__).parent / "values.txt").read_text("utf-8"))
    pools: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        name, _, values = line.partition(": ")
        pools[name] = [WORDS.get(each, _plain(each)) for each in values.split(" | ")]
    return pools


def _plain(text: str) -> str:
    """With its escapes, which may be lone surrogates, in place."""
    return re.sub(r"\\(?:x..|u....|n)", lambda m: m[0].encode().decode("unicode_escape"), text)


POOLS = _read()
POOLS["numbers"].append("9" * 5000)
POOLS["texts"].append("x" * 5000)
POOLS["places"].append("x" * 300 + ".html")
POOLS["prompts"].append("1+" * 3000)
POOLS["verifier_option"].append("pattern=" + "(" * 300)


def hostile_texts(option: Option) -> st.SearchStrategy[str]:
    """Of one value: what fits the option's type and name, and what fits none."""
    pools = pools_of(option)
    return st.sampled_from(pools).flatmap(st.sampled_from)


def pools_of(option: Option) -> list[list[str]]:
    """The pools for an option, the likelier ones several times."""
    kind = option.item_type or option.type
    pools: list[list[str]] = []
    if kind in (int, float):
        pools += [POOLS["numbers"]] * 2
    elif kind is Path:
        pools += [POOLS["places"], POOLS["theirs"]]
    else:
        pools += [POOLS["texts"]]
    if option.choices:
        pools.append([str(choice) for choice in option.choices])
    if option.name in FILES:
        pools += [_inputs(), _inputs(), POOLS["places"]]
    if option.name in FOLDERS:
        pools += [[f"../ours/{name}" for name in OURS], POOLS["places"], POOLS["theirs"]]
    if option.name in POOLS:
        pools += [POOLS[option.name]] * 3
    return pools


def _inputs() -> list[str]:
    good = ("questions.jsonl", "notes.txt", "labels.jsonl", "recipe.yaml", "prompts.txt")
    odd = [*workplace.CONTENTS, "folder.jsonl", "folder.json", "loop.jsonl"]
    for name in workplace.PROMPTS:
        odd += [f"{kind}-{name}.jsonl" for kind in ("prompt", "text", "messages", "answer")]
    odd += workplace.LABEL_FILES
    return [f"../data/{name}" for name in good] + [f"../hostile/{name}" for name in odd]


def stdin_contents() -> st.SearchStrategy[bytes]:
    deep = b"[" * 100_000
    odd = [b"2+2\n", b"\xff\xfe", b"\0", b"\xed\xa0\x80", deep, b"[]", b"[{}]", b"7", b"\n\n"]
    return st.just(b"") | st.sampled_from(odd)


def yaml_values() -> st.SearchStrategy[Any]:
    odd: list[Any] = [None, True, False, 0, -1, 1.5, 10**30, -(10**30), "", "\ud800", "a\0b", "no"]
    odd += [[], {}, [None], [[]], [1, "a"], {"a": 1}, ["a\0b"], ["\udc80"]]
    odd += [float("nan"), float("inf")]
    return st.sampled_from(odd)
