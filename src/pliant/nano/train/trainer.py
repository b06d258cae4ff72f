"""Training one model: batches, schedule, optimizers, and checkpoints that survive a hard kill."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pliant.data.collate import pad_rows
from pliant.errors import CorruptFile, InvalidInput
from pliant.nano import by_length
from pliant.nano.families import Question
from pliant.nano.world import stream

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
_POOL = 8_192  # questions that are sorted by length together: little padding, yet mixed batches
EMPHASIS = {"pattern": 1.6, "fibonacci": 2.0, "step": 1 / 1.5, "reverse": 0.5, "sort": 0.7}
# Newton-Schulz coefficients that push every singular value to about 1 in five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True)
class Schedule:
    """How long, at which rates and in which order of difficulty one model is trained."""

    steps: int
    tokens: int = 4096
    """Padded tokens a step."""
    matrix_lr: float = 0.02
    """For Muon; .04 (and twice the other rate) was behind after a minute: docs/nano.md."""
    vector_lr: float = 3e-3
    """For AdamW: embeddings and norms."""
    warmup: float = 0.02
    decay_from: float = 0.3
    """The share of the steps after which both rates fall in a straight line to 0."""
    tilt: float = 1.5
    """At first each step of difficulty is e^tilt times rarer ..."""
    tilt_until: float = 0.7
    """... and after this share of the steps all are as frequent as in the world."""
    emphasis: dict[str, float] = field(default_factory=lambda: dict(EMPHASIS))
    """Factors of the families' weights in the world: families that are soon learned and cost many
    tokens come less often, the other sequences equally often."""
    seed: int = 0

    def rate(self, step: int) -> float:
        done = step / self.steps
        rising = min(1.0, (done + 1 / self.steps) / self.warmup)
        falling = 1.0 if done < self.decay_from else (1 - done) / (1 - self.decay_from)
        return rising * max(0.0, falling)

    def lean(self, step: int) -> float:
        return self.tilt * max(0.0, 1 - step / self.steps / self.tilt_until)


class Trainer:
    """A model, its optimizers and its position in the schedule."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, schedule: Schedule
    ) -> None:
        self.model = model.train()
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.step = 0
        self._position = Position()
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        vectors = [p for p in model.parameters() if id(p) not in inside]
        self._peaks = (schedule.matrix_lr, schedule.vector_lr)
        self._optimizers = (
            Muon(matrices, self._peaks[0]),
            torch.optim.AdamW(vectors, self._peaks[1], betas=(0.9, 0.98), weight_decay=0.0),
        )

    def steps(self) -> Iterator[float]:
        """Train to the schedule's end; yields each step's loss."""
        s = self.schedule
        stream = batches(
            self.tokenizer, s.tokens, s.seed, self._position, tilt=s.lean, emphasis=s.emphasis
        )
        for position, batch in islice(stream, max(0, s.steps - self.step)):
            loss = self._train_step(batch)
            self.step, self._position = self.step + 1, position
            yield loss

    def _train_step(self, batch: Batch) -> float:
        rate = self.schedule.rate(self.step)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        loss = answer_loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.item()

    @property
    def done(self) -> bool:
        return self.step >= self.schedule.steps

    def save(self, file: Path) -> None:
        """Everything that the next step needs, in one file: written aside, then renamed."""
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".writing")
        where = {"step": self.step, "place": asdict(self._position)}
        progress = {**where, "schedule": asdict(self.schedule)}
        save_file(self._tensors(), aside, metadata={"progress": json.dumps(progress)})
        aside.replace(file)

    def resume(self, file: Path) -> bool:
        """Load a checkpoint of this model and schedule; False if there is none.

        Another run's checkpoint is an error and is not overwritten: it may have cost hours.
        """
        if not file.exists():
            return False
        progress, saved = _read(file)
        differences = _differences(progress["schedule"], asdict(self.schedule))
        if not self._fits(saved):
            differences.append("the model has other shapes")
        if differences:
            raise InvalidInput(
                f"{file} belongs to another run ({'; '.join(differences)}): "
                "remove it to start over, or store this run's state elsewhere"
            )
        self._restore(saved)
        self.step, self._position = progress["step"], Position(**progress["place"])
        return True

    def _fits(self, saved: dict[str, Tensor]) -> bool:
        ours = {f"model.{name}": p.shape for name, p in self.model.named_parameters()}
        theirs = {name: t.shape for name, t in saved.items() if name.startswith("model.")}
        return ours == theirs

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": p.detach().cpu() for name, p in self.model.named_parameters()}
        for i, optimizer in enumerate(self._optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{i}.{key}.{name}"] = value.detach().cpu().contiguous()
        return tensors

    @torch.no_grad()
    def _restore(self, saved: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(saved[f"model.{name}"])
        for i, optimizer in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for path, value in saved.items():
                if path.startswith(f"optimizer.{i}."):
                    _, _, key, name = path.split(".")
                    state.setdefault(int(key), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as saved:
            progress = json.loads((saved.metadata() or {})["progress"])
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CorruptFile(
            f"{file} is not a complete checkpoint ({error}): remove it to start over"
        ) from error
    return progress, tensors


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {theirs.get(name)} and is {ours.get(name)}"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name)
    ]


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy of the answers only; every answer's mean counts equally.

    The prompts are random, so there is nothing to learn from predicting them. Padding is on the
    right, behind everything that is scored, so the causal mask is enough.
    """
    device = model.device
    hidden = model.model(input_ids=batch.input_ids.to(device), use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.positions.to(device)])
    losses = F.cross_entropy(logits, batch.targets.to(device), reduction="none")
    return losses @ batch.weights.to(device)


# --- batches -------------------------------------------------------------------------------------


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


# --- the optimizer of the matrices ---------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the matrices inside a transformer.

    Nesterov momentum; a tall matrix takes a larger step, as its rows do. In the same three minutes
    a two-layer model reached an accuracy of .23 with it and .09 with AdamW. `torch.optim.Muon` runs
    its iteration in bf16, which takes ten times as long as fp32 on a CPU without bf16 units. Left
    out: weight decay schedules, parameter groups, anything but matrices.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "decay": 0.05})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    direction = self._direction(matrix, matrix.grad, group["momentum"])
                    tallness = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                    matrix.mul_(1 - group["lr"] * group["decay"])
                    matrix.add_(direction, alpha=-group["lr"] * tallness)

    def _direction(self, matrix: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        return orthogonal(gradient.lerp(average, momentum))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T of the matrix's U S V^T, by an iteration that only multiplies."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide else x.T
