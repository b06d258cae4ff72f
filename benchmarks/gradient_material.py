"""What the gradient benchmarks train: texts that every machine has, and small models of them.

Source text is the standard library's, and prose its help topics (`pydoc_data.topics`). Instructions
are GSM8K's if you pass a folder with it, and otherwise the standard library's functions, with the
head as the prompt and the body as the answer.
"""

from __future__ import annotations

import ast
import copy
import gzip
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from string import ascii_lowercase
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import CACHE
from pliant import nano
from pliant.data.collate import Collator
from pliant.nano.train.trainer import frame

disable_progress_bar()
IGNORED = -100
WORDS = 1024
Row = dict[str, list[int]]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Material:
    """Rows to train on, and held-out rows."""

    train: Sequence[Row]
    held: Sequence[Row]

    def batches(self, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Endless, and the same for the same seed."""
        rng = random.Random(seed)
        while True:
            order = rng.sample(range(len(self.train)), len(self.train))
            for at in range(0, len(order) - size + 1, size):
                yield Collator()([self.train[i] for i in order[at : at + size]])


# --- texts ---------------------------------------------------------------------------------------


def source(length: int, words: int = WORDS) -> Material:
    """Python source, every token learned."""
    return _pieces(_source(), length, words)


def prose(length: int, words: int = WORDS) -> Material:
    """English about Python, every token learned."""
    return _pieces([topics[name] for name in sorted(topics)], length, words)


def instructions(
    folder: Path | None, most: int, shots: int = 0, encode: Encode | None = None
) -> Material:
    """Questions and answers with labels on the answers; `shots` other examples precede each,
    without labels. `encode` is a real model's tokenizer."""
    encode = encode or encoded
    if folder is None:
        pairs = list(_functions())
        cut = len(pairs) * 9 // 10
        parts = [pairs[:cut], pairs[cut:]]
    else:
        parts = [_gsm8k(folder / f"gsm8k-{part}.jsonl.gz") for part in ("train", "test")]
    train, held = ([_pair(q, a, most, encode) for q, a in part] for part in parts)
    parts = [[row for row in rows if row] for rows in (train, held)]
    return Material(*([_after(rows, at, shots) for at in range(len(rows))] for rows in parts))


def questions(number: int, held: int, families: Sequence[str] | None = None) -> Material:
    """From the embedded models' world: unseen kinds by default, with labels on the answers."""
    families = [family.name for family in nano.HELD_OUT] if families is None else families
    train = nano.questions("train", number, seed=1, families=families)
    return Material(_framed(train), _framed(nano.questions("test", held, 1, families)))


def _framed(questions: Sequence[nano.Question]) -> list[Row]:
    _, tokenizer = nano.load("nano-s")
    return [
        {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}
        for ids, start in frame(tokenizer, questions)
    ]


def lookups(number: int, held: int, names: int = 8) -> Material:
    """A list of names with numbers, and a question for one number, reversed: long prompts with
    short answers that depend on them, of a kind that the embedded models have not seen.
    """
    parts = []
    for split, count in (("train", number), ("test", held)):
        rng = random.Random(f"lookups/{split}")
        parts.append(_framed([_lookup(rng, names) for _ in range(count)]))
    return Material(*parts)


def _lookup(rng: random.Random, names: int) -> nano.Question:
    pairs = [a + b for a in ascii_lowercase for b in ascii_lowercase]
    people, numbers = rng.sample(pairs, names), rng.sample(range(10, 100), names)
    facts = ", ".join(f"{name} {number}" for name, number in zip(people, numbers, strict=True))
    at = rng.randrange(names)
    question, answer = f"{facts}. reverse {people[at]}?", str(numbers[at])[::-1]
    return nano.Question(question, answer, "lookup", "unseen", 3)


def _pieces(texts: Sequence[str], length: int, words: int) -> Material:
    """Every tenth text is held out."""
    parts = []
    for part in (
        [text for i, text in enumerate(texts) if i % 10],
        [text for i, text in enumerate(texts) if not i % 10],
    ):
        ids = [token for text in part for token in encoded(text, words)]
        pieces = (ids[at : at + length] for at in range(0, len(ids) - length, length))
        parts.append([{"input_ids": piece, "labels": piece} for piece in pieces])
    return Material(*parts)


def _pair(prompt: str, answer: str, most: int, encode: Encode) -> Row | None:
    prompt_ids, answer_ids = encode(prompt + "\n"), encode(answer + "\n\n")
    if len(prompt_ids) + len(answer_ids) > most:
        return None
    labels = [IGNORED] * len(prompt_ids) + answer_ids
    return {"input_ids": prompt_ids + answer_ids, "labels": labels}


def _after(rows: Sequence[Row], at: int, shots: int) -> Row:
    """A row with the rows before it (cyclically) as its prompt."""
    before = [token for i in range(at - shots, at) for token in rows[i]["input_ids"]]
    row = rows[at]
    return {
        "input_ids": before + row["input_ids"],
        "labels": [IGNORED] * len(before) + row["labels"],
    }


def _gsm8k(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["question"], row["answer"]) for row in rows]


@cache
def _source(most: int = 1_000_000) -> list[str]:
    """Files of the standard library, up to so many characters."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    texts, size = [], 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        size += len(text)
        if size > most:
            break
        texts.append(text)
    return texts


def _functions() -> Iterator[tuple[str, str]]:
    for text in _source():
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                begin, body = node.lineno - 1, node.body[0].end_lineno or node.lineno
                if body < (node.end_lineno or 0):
                    yield "\n".join(lines[begin:body]), "\n".join(lines[body : node.end_lineno])


@cache
def _bpe(words: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Bytes()
    trainer = BpeTrainer(
        vocab_size=words, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    texts = [*islice(_source(), 30), *(topics[name] for name in sorted(topics))]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encoded(text: str, words: int = WORDS) -> list[int]:
    """Bytes, or tokens of a byte-pair vocabulary of source and prose."""
    return list(text.encode()) if words == 256 else list(_bpe(words).encode(text).ids)


# --- models --------------------------------------------------------------------------------------


def fresh(seed: int, words: int = WORDS, width: int = 128, layers: int = 6) -> Any:
    """An untrained Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=(width * 8 // 3 + 31) // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def pretrained(steps: int, words: int = WORDS, width: int = 128, layers: int = 6) -> Any:
    """`fresh` after so many steps on source text, all tokens trained; cached."""
    length = 128 if words == 256 else 96
    shape = {"words": words, "width": width, "layers": layers}
    return trained("base", shape, source(length, words), steps)


def trained(
    name: str,
    shape: dict[str, int],
    rows: Material,
    steps: int,
    rate: float = 2e-3,
    cooled: float = 0.0,
    size: int = 8,
) -> Any:
    """`fresh` after so many steps on these rows, all tokens trained, over the last `cooled` share
    of them with a falling learning rate; cached."""
    words, width, layers = shape["words"], shape["width"], shape["layers"]
    folder = CACHE / f"gradient-{name}-{words}-{width}x{layers}-{steps}"
    if (folder / "config.json").is_file():
        return LlamaForCausalLM.from_pretrained(folder).train()
    model = fresh(0, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step, batch in zip(range(steps), rows.batches(size, seed=0)):  # noqa: B905
        left = (steps - step) / (cooled * steps) if cooled else 1.0
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20, left)
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return model


def copied(model: Any) -> Any:
    return copy.deepcopy(model).train()
