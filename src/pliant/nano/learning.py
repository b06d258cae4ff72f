"""One model learning the world: steps, schedule, checkpoints that a hard kill cannot spoil."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pliant.errors import CorruptFile, InvalidInput
from pliant.nano.batches import Batch, Place, batches
from pliant.nano.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which order of difficulty one model learns."""

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
    emphasis: dict[str, float] = field(
        default_factory=lambda: {
            "pattern": 1.6,
            "fibonacci": 2.0,
            "step": 1 / 1.5,
            "reverse": 0.5,
            "sort": 0.7,
        }
    )
    """How often a family is asked, as a factor of its weight in the world: families that are soon
    learned and cost many tokens less often, the rest of the sequences all alike."""
    seed: int = 0

    def rate(self, step: int) -> float:
        done = step / self.steps
        rising = min(1.0, (done + 1 / self.steps) / self.warmup)
        falling = 1.0 if done < self.decay_from else (1 - done) / (1 - self.decay_from)
        return rising * max(0.0, falling)

    def lean(self, step: int) -> float:
        return self.tilt * max(0.0, 1 - step / self.steps / self.tilt_until)


class Learner:
    """A model, its optimizers and how far it is."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, schedule: Schedule
    ) -> None:
        self.model = model.train()
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.step = 0
        self._place = Place()
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        vectors = [p for p in model.parameters() if id(p) not in inside]
        self._peaks = (schedule.matrix_lr, schedule.vector_lr)
        self._optimizers = (
            Muon(matrices, self._peaks[0]),
            torch.optim.AdamW(vectors, self._peaks[1], betas=(0.9, 0.98), weight_decay=0.0),
        )

    def steps(self) -> Iterator[float]:
        """Learn from here to the schedule's end; yields each step's loss."""
        s = self.schedule
        endless = batches(
            self.tokenizer, s.tokens, s.seed, self._place, tilt=s.lean, emphasis=s.emphasis
        )
        for place, batch in islice(endless, max(0, s.steps - self.step)):
            loss = self._learn(batch)
            self.step, self._place = self.step + 1, place
            yield loss

    def _learn(self, batch: Batch) -> float:
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
        """Everything that the next step needs, in one file: written aside, then put in place."""
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".writing")
        progress = {
            "step": self.step,
            "place": asdict(self._place),
            "schedule": asdict(self.schedule),
        }
        save_file(self._tensors(), aside, metadata={"progress": json.dumps(progress)})
        aside.replace(file)

    def resume(self, file: Path) -> bool:
        """Go on from a checkpoint of this very model and schedule; whether there was one.

        Another run's checkpoint is refused, not overwritten: it may have cost hours.
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
                "remove it to begin anew, or keep this run's state elsewhere"
            )
        self._restore(saved)
        self.step, self._place = progress["step"], Place(**progress["place"])
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
            whole = optimizer.state_dict()
            whole["state"] = state
            optimizer.load_state_dict(whole)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as saved:
            progress = json.loads((saved.metadata() or {})["progress"])
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CorruptFile(
            f"{file} is no whole checkpoint ({error}): remove it to begin anew"
        ) from error
    return progress, tensors


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {theirs.get(name)} and is {ours.get(name)}"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name)
    ]


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy of the answers alone, each answer's mean counted once.

    The prompts are random: nothing is to be learned from guessing them. Padding is on the right,
    behind everything that is scored, so causality is mask enough.
    """
    device = model.device
    hidden = model.model(input_ids=batch.input_ids.to(device), use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.positions.to(device)])
    losses = F.cross_entropy(logits, batch.targets.to(device), reduction="none")
    return losses @ batch.weights.to(device)
