"""One model learning the world: steps, schedule, checkpoints that a hard kill cannot spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pliant.nano.batches import Batch, Place, batches
from pliant.nano.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which order of difficulty one model learns."""

    steps: int
    tokens: int = 4096
    """Padded tokens a step."""
    matrix_lr: float = 0.02
    """For Muon: .04 was slower, .02 and .01 alike (three-minute runs)."""
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
        default_factory=lambda: {"pattern": 0.4, "reverse": 0.5, "sort": 0.7}
    )
    """Families that are learned soon and cost many tokens are asked less often."""
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
        for place, batch in endless:
            if self.step >= s.steps:
                return
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

    def save(self, folder: Path) -> None:
        """Everything that the next step needs, written aside first and then put in place."""
        aside = folder.with_name(folder.name + ".writing")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(self._tensors(), aside / "state.safetensors")
        progress = {
            "step": self.step,
            "place": asdict(self._place),
            "schedule": asdict(self.schedule),
        }
        (aside / "progress.json").write_text(json.dumps(progress, indent=2))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self, folder: Path) -> bool:
        """Go on from a checkpoint of this very schedule; whether there was one."""
        folder = folder if folder.exists() else folder.with_name(folder.name + ".old")
        if not folder.exists():
            return False
        progress = json.loads((folder / "progress.json").read_text())
        if progress["schedule"] != asdict(self.schedule):
            return False
        saved = load_file(folder / "state.safetensors")
        if not self._fits(saved):
            return False
        self._restore(saved)
        self.step, self._place = progress["step"], Place(**progress["place"])
        return True

    def _fits(self, saved: dict[str, Tensor]) -> bool:
        ours = {f"model.{name}": p.shape for name, p in self.model.named_parameters()}
        return all(name in saved and saved[name].shape == shape for name, shape in ours.items())

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
