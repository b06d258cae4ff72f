"""Who is compared: ways to compute a step's gradient on one batch, all on the same model.

    with Field(model, contenders_for(config)) as field:
        field.step(contender, batch, draw=0)     # gradients stand in the parameters' .grad

B is rows of a batch.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from pliant import adapters
from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.find import unwrap
from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig, Score
from pliant.gradients.engines.split_forward import SplitForward
from pliant.gradients.engines.trials import label_alignment
from pliant.gradients.labelled_batch import EXTRAS, LabelledBatch, labelled_batch, source_of
from pliant.gradients.model import Gradients, GradientsWarning, all_attached_to
from pliant.gradients.selection.rules import wide
from pliant.gradients.selection.scores import in_chunks
from pliant.gradients.selector import Router, spread

Batch = Mapping[str, Any]
Kind = Literal["tokens", "standard", "rows", "hardest_rows", "custom"]
LossOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to train a batch."""

    kind: Kind
    config: GradientConfig | None = None
    """Of "tokens": which of them, and how."""
    share: float = 1.0
    """Of "rows" and "hardest_rows": how many of a batch's."""
    title: str = ""
    """Of "custom": its name."""
    prepare: Callable[[nn.Module], LossOf] | None = None
    """Of "custom": takes the model and returns the function that gives a batch's loss."""

    @property
    def name(self) -> str:
        if self.kind == "standard":
            return "standard"
        if self.config is not None:
            return label(self.config)
        if self.kind == "custom":
            return self.title
        sort = "random" if self.kind == "rows" else "hardest"
        return f"{sort} sequences, {self.share:.0%}"

    @property
    def draws(self) -> bool:
        """Whether another draw gives another gradient."""
        if self.config is not None:
            return self.config.selection in ("sampled", "uniform", "stratified")
        return self.kind == "rows"

    def rows_of(self, count: int) -> int:
        """How many sequences of so many."""
        return max(1, round(count * self.share))


STANDARD = Contender("standard")


def label(config: GradientConfig) -> str:
    """`sampled .25, sparse`: the rule, how much of it, the engine, and what else is unusual."""
    if config.engine == "completion":
        return "completion only"
    parts = [f"{config.selection} {config.ratio:g}".replace(" 0.", " ."), config.engine]
    usual, idle = asdict(GradientConfig()), set(NAMED)
    if not config.needs_scores:
        idle |= {"score", "mix", "exit_layer", "sensitivity"}
    if config.engine != "sparse":
        idle.add("kv_grad")
    for name, value in asdict(config).items():
        if name not in idle and value != usual[name]:
            parts.append(value if isinstance(value, str) else f"{name} {value:g}")
    return ", ".join(parts)


NAMED = ("engine", "ratio", "selection", "seed")
"""Fields that a label always or never mentions."""


def steady(config: GradientConfig) -> GradientConfig:
    """The configuration after its schedule has ended."""
    return replace(config, warmup_steps=0, dense_first=0, dense_every=0)


def contenders_for(
    config: GradientConfig, share: float | None = None, rows: int = 1
) -> list[Contender]:
    """The configuration itself, the other rules and engines at its ratio, and the controls.

    `share` is what a step costs of a standard one: so many of a batch's `rows` make the smaller
    batch.
    """
    ours = steady(config)
    plain = replace(GradientConfig(), ratio=config.ratio, seed=config.seed)
    configs = [
        ours,
        plain,
        replace(plain, selection="uniform"),
        replace(plain, engine="exact"),
        replace(plain, engine="exact", selection="uniform"),
        replace(plain, engine="exact", selection="topk"),
    ]
    different = dict.fromkeys(configs)
    tokens = [Contender("tokens", choice) for choice in different]
    return [*tokens, *fewer_rows(config, share, rows), STANDARD]


def fewer_rows(config: GradientConfig, share: float | None, rows: int) -> list[Contender]:
    """Batches of whole sequences: the hardest, as many as the ratio says, and random ones, as many
    as a step's cost says. None of a single sequence, and none that would be the whole batch."""
    hardest, random = math.ceil(rows * config.ratio), max(1, round(rows * (share or 1.0)))
    batches = [
        Contender("hardest_rows", share=hardest / rows),
        Contender("rows", share=random / rows),
    ]
    return [batch for batch in batches if batch.share < 1]


class Field:
    """Contenders on one model: one at a time is active, and no other adapter."""

    def __init__(
        self,
        model: nn.Module,
        contenders: Sequence[Contender],
        router: Router | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.contenders = list(contenders)
        self.router = router
        self.handles: dict[Contender, Gradients] = {}
        self._custom: dict[Contender, LossOf] = {}
        self.notes: dict[Contender, list[str]] = {}
        """What was computed in another way than configured."""

    def __enter__(self) -> Self:
        self._before = all_attached_to(self.model)
        try:
            for contender in self.contenders:
                self._add(contender)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles.values():
            handle.detach()
        self.handles.clear()
        self._custom.clear()

    def _add(self, contender: Contender) -> None:
        if contender.prepare is not None:
            self._custom[contender] = contender.prepare(self.model)
        if contender.config is None:
            return
        name = f"contender-{len(self.handles)}"
        acting = Gradients(self.model, contender.config, self.router)
        self.handles[contender] = adapters.attach(self.model, acting, name)

    def restart(self, contender: Contender, at_end: bool = False) -> None:
        """Restart its schedule, or move it to its end."""
        if contender.config is not None:
            handle = self.handles[contender]
            handle.switch(steady(contender.config) if at_end else contender.config)
            handle.selector.schedule.load_state({"steps": 0, "by_hand": False})

    def step(self, contender: Contender, batch: Batch, draw: int = 0) -> None:
        """Forward and backward; adds to the gradients that are there."""
        with self.only(contender):
            self.loss(contender, batch, draw).backward()

    @contextmanager
    def only(self, contender: Contender) -> Iterator[None]:
        acting = self.handles.get(contender)
        with ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GradientsWarning)
            for other in (*self._before, *self.handles.values()):
                if other is not acting:
                    stack.enter_context(other.disabled())
            yield
        self._note(contender, caught)

    def loss(self, contender: Contender, batch: Batch, draw: int) -> Tensor:
        """Of this draw; inside of `only`."""
        batch = {k: v for k, v in batch.items() if k != "num_items_in_batch"}
        if contender.config is not None:
            self.handles[contender].selector.draws = draw
        else:
            batch = {k: v for k, v in batch.items() if k not in EXTRAS}
        if contender.kind == "custom":
            return self._custom[contender](batch)
        count = rows_in(batch)
        if contender.kind == "rows":
            generator = torch.Generator().manual_seed(draw)
            rows = torch.randperm(count, generator=generator)[: contender.rows_of(count)]
            batch = select_rows(batch, rows.sort().values)
        elif contender.kind == "hardest_rows":
            scores_B, tokens_B = row_sums(self.model, batch, "combined")
            hardness_B = scores_B / tokens_B.clamp(min=1)
            rows = hardness_B.argsort(descending=True)[: contender.rows_of(count)]
            batch = select_rows(batch, rows.sort().values)
        loss: Tensor = self.model(**batch).loss
        return loss

    def _note(self, contender: Contender, caught: Sequence[warnings.WarningMessage]) -> None:
        notes = self.notes.setdefault(contender, [])
        for w in caught:
            if issubclass(w.category, GradientsWarning):
                if str(w.message) not in notes:
                    notes.append(str(w.message))
            else:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@torch.no_grad()
def row_sums(model: nn.Module, batch: Batch, score: Score) -> tuple[Tensor, Tensor]:
    """(B,): the scores of each row's labelled tokens, summed, and how many these are.

    No logits of a whole batch exist.
    """
    split, labelled = split_and_labelled(model, batch)
    decoded, valid_BT = split.backbone(labelled.inputs), labelled.valid_BT
    scores_N = in_chunks(
        lambda rows: split.logits(decoded, rows, labelled.inputs),
        last_hidden_state(decoded)[valid_BT],
        labelled.targets_BT[valid_BT],
        score,
    ).scores_N
    return spread(scores_N.to(wide(scores_N)), valid_BT).sum(1), valid_BT.sum(1)


def split_and_labelled(model: nn.Module, batch: Batch) -> tuple[SplitForward, LabelledBatch]:
    """The model's forward in pieces, and the batch with its labels as this model means them."""
    split = SplitForward(Anatomy.of(model), model.forward)
    return split, labelled_batch(dict(batch), label_alignment(split).aligned)


def rows_in(batch: Batch) -> int:
    source = source_of(batch)
    if not isinstance(source, Tensor):
        raise InvalidInput(f"a batch has input_ids and labels; this one {', '.join(batch) or '-'}")
    return len(source)


def select_rows(batch: Batch, rows: Tensor) -> dict[str, Any]:
    """Some rows of a batch, without columns of padding alone."""
    count = rows_in(batch)
    selected = {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == count
        else value
        for name, value in batch.items()
    }
    return narrowed(selected)


def narrowed(batch: dict[str, Any]) -> dict[str, Any]:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return batch
    used = mask.any(0).nonzero().flatten()
    if not len(used):
        return batch
    begin, end, width = int(used[0]), int(used[-1]) + 1, mask.shape[1]
    return {
        name: value[:, begin:end]
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width
        else value
        for name, value in batch.items()
    }


# --- the model is restored afterwards -------------------------------------------------------------


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Train mode inside; afterwards modes, gradients, buffers and random state are as before.

    It does not restore weights: see `SavedWeights`.
    """
    modes = {module: module.training for module in model.modules()}
    grads = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().to("cpu", copy=True) for b in model.buffers()}
    with same_randomness(model):
        try:
            model.train()
            clear_gradients(model)
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for p, grad in grads.items():
                p.grad = grad
            for buffer, before in buffers.items():
                if not torch.equal(buffer.cpu(), before):
                    buffer.data.copy_(before)


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Random numbers of torch, numpy and Python are afterwards as if none was drawn inside."""
    plain, numpys = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpys)


def clear_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def trained(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput("no parameter of this model is trained: there is nothing to compare")
    return parameters
