"""Questions as tensors: a byte tokenizer, and batches of chats, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pliant.data.collate import pad_rows
from pliant.nano import by_length
from pliant.nano.families import Question
from pliant.nano.world import stream

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"

# One token a role and one to end: a short question must not cost more to frame than to ask.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_POOL = 8_192  # questions that are sorted by length together: little padding, yet mixed batches


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """256 bytes and four special tokens; byte-level, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in (PAD, END, USER, ASSISTANT)]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@dataclass(frozen=True)
class Batch:
    """Right-padded ids; the tokens after `positions` (in the flattened ids) are the `targets`.

    `weights` make every answer count equally, however long: a reversed word is twenty tokens that
    are soon learned, a sum three that are not.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Position:
    """A position in the stream of batches, to continue from."""

    pool: int = 0
    """Which pool of questions."""
    before: int = 0
    """Batches in the pools before this one."""
    used: int = 0
    """Batches of this pool that were read."""


def batches(
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    seed: int,
    position: Position = Position(),  # noqa: B008 - frozen, so one default serves all
    tilt: Callable[[int], float] = lambda number: 0.0,
    emphasis: Mapping[str, float] | None = None,
) -> Iterator[tuple[Position, Batch]]:
    """An endless stream of batches of at most `tokens` padded tokens, each with its end position.

    `tilt` gives a pool's tilt towards easy questions from the number of batches before it;
    `emphasis` is that of `stream`.
    """
    while True:
        rng = random.Random(f"{seed}/{position.pool}")
        lean = tilt(position.before)
        pool = stream("train", rng.getrandbits(48), tilt=lean, emphasis=emphasis)
        framed = frame(tokenizer, list(islice(pool, _POOL)))
        lengths = [len(ids) for ids, _ in framed]
        groups = [[framed[i] for i in rows] for rows in by_length(lengths, tokens)]
        rng.shuffle(groups)
        for group in groups[position.used :]:
            position = replace(position, used=position.used + 1)
            yield position, _collate(group, tokenizer.pad_token_id)
        position = Position(position.pool + 1, position.before + position.used)


def frame(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> list[tuple[list[int], int]]:
    """Each question's ids, answer and end token included, and where the answer starts."""
    user, assistant = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    prompts = tokenizer([q.prompt for q in questions])["input_ids"]
    answers = tokenizer([q.answer for q in questions])["input_ids"]
    framed = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [user, *prompt, assistant, *answer, tokenizer.eos_token_id]
        framed.append((ids, len(prompt) + 2))
    return framed


def _collate(group: list[tuple[list[int], int]], pad: int) -> Batch:
    rows_BT, _ = pad_rows([ids for ids, _ in group], pad)
    width = rows_BT.shape[1]
    positions, targets, weights = [], [], []
    for row, (ids, start) in enumerate(group):
        for at in range(start, len(ids)):
            positions.append(row * width + at - 1)
            targets.append(ids[at])
            weights.append(1 / (len(ids) - start) / len(group))
    return Batch(rows_BT, *map(torch.tensor, (positions, targets, weights)))
