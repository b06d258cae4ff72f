"""How each score is measured: by gradients of gates, by leaving units out, or by hooks.

Each measure is a function of a `Job`, and all sites of all kinds are measured at once. MEASURES
lists them by name, and RANKS the kinds of units that each of them ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pliant.adapters import attached
from pliant.adapters.fingerprint import fingerprint
from pliant.anatomy import Anatomy
from pliant.anatomy.modes import attention_among
from pliant.data import Journal
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.calibration import Sample, digest, predicted, sequence_losses
from pliant.structure.config import KINDS, GateConfig, Kind
from pliant.structure.gates import Gates, attach
from pliant.structure.ranking.meters import (
    ChoiceMeter,
    EntropyMeter,
    ExpertMeter,
    InfluenceMeter,
    InputMeter,
    Meter,
    RelativeExpertMeter,
    column_squares,
    expert_norms,
    slice_norms,
)
from pliant.structure.units import Site, check_projections

Score = Literal[
    "fisher",
    "taylor",
    "activation",
    "relative_activation",
    "leave_one_out",
    "entropy",
    "magnitude",
    "block_influence",
    "frequency",
    "random",
]
SCORES: tuple[Score, ...] = get_args(Score)
Progress = Callable[[int, int], None]
"""Called with how many steps are done, and how many there are."""
Values = list[Tensor]
"""(units,) for each site of the job."""


@dataclass(eq=False)
class Job:
    """What is to be measured, and what it has cost so far."""

    anatomy: Anatomy
    sites: list[Site]
    samples: list[Sample]
    seed: int = 0
    progress: Progress | None = None
    resume: Path | None = None
    forwards: int = 0
    """Passes over the calibration text."""
    backwards: int = 0
    loss: float | None = None
    """The mean loss of a predicted token."""
    tokens: int = field(init=False)
    """How many tokens are predicted."""

    def __post_init__(self) -> None:
        self.tokens = predicted(self.samples)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(site.kind for site in self.sites))

    @property
    def units(self) -> int:
        return sum(site.count for site in self.sites)

    def report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


# --- gradients -----------------------------------------------------------------------------------


def fisher(job: Job) -> Values:
    """Half the sum of the squared gradients of the sequences' losses, for each predicted token.

    It estimates to second order what leaving a unit out costs.
    """
    return [squares / (2 * job.tokens) for _, squares in _gradients(job)]


def taylor(job: Job) -> Values:
    """The absolute gradient of the mean loss: what leaving a unit out changes, to first order."""
    return [sums.abs() / job.tokens for sums, _ in _gradients(job)]


def _gradients(job: Job) -> list[tuple[Tensor, Tensor]]:
    """For each site the sum over sequences of the gates' gradients, and of their squares."""
    sums = [torch.zeros(2, site.count, dtype=torch.float64) for site in job.sites]
    # Each sequence of a batch has gates of its own, so one backward pass gives all gradients.
    patterns = tuple(f"row_{i}" for i in range(max(len(s.targets_BT) for s in job.samples)))
    total, reached = 0.0, False
    with temporary_gates(job, patterns) as gates, torch.enable_grad():
        samples = job.samples
        if not _sequences_are_apart(job, gates):
            samples = [own for sample in samples for own in sample.sequences()]
        for done, sample in enumerate(samples, start=1):
            loss, gradients = _gates_gradients(job, gates, sample)
            reached |= any(g is not None for own in gradients for g in own)
            for sum_, site, own in zip(sums, job.sites, gradients, strict=True):
                stacked = torch.stack([_or_zeros(g, site.count) for g in own])
                sum_ += torch.stack([stacked.sum(dim=0), stacked.square().sum(dim=0)])
            total += loss
            job.report(done, len(samples))
    if not reached:
        raise UnsupportedModel(
            f"{type(job.anatomy.model).__name__}: the loss has no gradient with respect to gates. "
            "Use a score without gradients, such as activation or leave_one_out"
        )
    job.forwards, job.backwards, job.loss = 1, 1, total / job.tokens
    return [(pair[0], pair[1]) for pair in sums]


Gradient = Tensor | None
"""None of an expert that no token chose."""


def _gates_gradients(
    job: Job, gates: Gates, sample: Sample
) -> tuple[float, list[Sequence[Gradient]]]:
    """The batch's loss, and for each site the gradient of each sequence."""
    losses, rows = _losses_with_own_gates(job, gates, sample)
    loss = losses.sum()
    own = [gates.pattern(row)[s.kind, s.key] for s in job.sites for row in rows]
    gradients = _gradients_of(loss, own)
    count = len(rows)
    by_site = [gradients[i * count : (i + 1) * count] for i in range(len(job.sites))]
    return loss.item(), by_site


def _losses_with_own_gates(job: Job, gates: Gates, sample: Sample) -> tuple[Tensor, Sequence[str]]:
    rows = gates.config.patterns[: len(sample.targets_BT)]
    with gates.rows(rows):
        return sequence_losses(job.anatomy.model, sample), rows


def _sequences_are_apart(job: Job, gates: Gates) -> bool:
    """Whether a sequence's gates act on no other, which depends on how a model lays out batches."""
    sample = max(job.samples, key=lambda sample: len(sample.targets_BT))
    if len(sample.targets_BT) == 1:
        return True
    try:
        losses, rows = _losses_with_own_gates(job, gates, sample)
    except (InvalidInput, UnsupportedModel):  # a module in whose tensors the rows are not apart
        return False
    others = [gates.pattern(row)[s.kind, s.key] for s in job.sites for row in rows[1:]]
    return not any(g is not None and bool(g.any()) for g in _gradients_of(losses[0], others))


def _gradients_of(loss: Tensor, gates: Sequence[Tensor]) -> Sequence[Gradient]:
    if not loss.requires_grad:
        return [None] * len(gates)
    return torch.autograd.grad(loss, gates, allow_unused=True)


def _or_zeros(gradient: Gradient, count: int) -> Tensor:
    return torch.zeros(count).double() if gradient is None else gradient.cpu().double()


@contextmanager
def temporary_gates(job: Job, patterns: tuple[str, ...] = ("default",)) -> Iterator[Gates]:
    """Gates at 1 on the job's units, inside the block."""
    model = job.anatomy.model
    name, taken = "importance", attached(model)
    while name in taken:
        name += "_"
    gates = attach(model, GateConfig(job.kinds, patterns), name)
    try:
        yield gates
    finally:
        gates.detach()


# --- leaving units out ---------------------------------------------------------------------------


def leave_one_out(job: Job) -> Values:
    """The change of the mean loss with the unit's gate at 0."""
    values = [torch.zeros(site.count, dtype=torch.float64) for site in job.sites]
    names = [f"{site.kind} {site.key}" for site in job.sites]
    with (
        temporary_gates(job) as gates,
        torch.no_grad(),
        _journal(job) as journal,
    ):
        measured = {row["key"]: row["loss"] for row in journal.rows()} if journal else {}
        job.loss = _mean_loss(job)
        _check_same_run(job, journal, measured)
        done, total = 1, 1 + job.units
        job.report(done, total)
        for value, name, site in zip(values, names, job.sites, strict=True):
            gate = gates.pattern()[site.kind, site.key]
            for unit in range(site.count):
                key = f"{name} {unit}"
                if key not in measured:
                    gate[unit] = 0
                    measured[key] = _mean_loss(job)
                    gate[unit] = 1
                    if journal:
                        journal.add({"key": key, "loss": measured[key]})
                value[unit] = measured[key] - job.loss
                done += 1
                job.report(done, total)
    return values


def _mean_loss(job: Job) -> float:
    total = sum(sequence_losses(job.anatomy.model, sample).sum().item() for sample in job.samples)
    job.forwards += 1
    return total / job.tokens


def _journal(job: Job) -> Any:
    return nullcontext() if job.resume is None else Journal(job.resume, start='{"key": "loss of ')


CLOSE = 1e-3
"""Relative: the same model's loss on the same text, on another machine."""


def _check_same_run(job: Job, journal: Journal | None, measured: dict[str, float]) -> None:
    """Refuse to go on with what was measured on another model or text."""
    if journal is None:
        return
    assert job.loss is not None
    base = fingerprint(job.anatomy.model)
    key = f"loss of {base.model} on {digest(job.samples)}"
    if not measured:
        journal.add({"key": key, "loss": job.loss})
    elif key not in measured or abs(measured[key] - job.loss) > CLOSE * abs(job.loss):
        raise InvalidInput(
            f"{journal.path}: was measured on another model or another calibration text; name "
            "another file to resume from, or delete this one"
        )


# --- hooks ---------------------------------------------------------------------------------------


def activation(job: Job) -> Values:
    """The root mean square of a unit's features times the norms of their weights (as in Wanda);
    of an expert, the mean norm of what it adds to a token."""
    check_projections(job.sites, "the score by activation")
    meters: dict[Kind, type[Meter]] = {"experts": ExpertMeter}
    for kind in RANKS["activation"]:
        meters.setdefault(kind, InputMeter)
    return _metered(job, meters)


def relative_activation(job: Job) -> Values:
    """The mean norm of what an expert adds to a token, relative to its hidden state."""
    return _metered(job, {"experts": RelativeExpertMeter})


def frequency(job: Job) -> Values:
    """The share of tokens for which the router chooses the expert."""
    return _metered(job, {"experts": ChoiceMeter})


def block_influence(job: Job) -> Values:
    """One minus the mean cosine of a layer's input and output."""
    return _metered(job, {"layers": InfluenceMeter})


def entropy(job: Job) -> Values:
    """One minus a head's mean attention entropy, as a share of that of uniform attention."""
    check_projections(job.sites, "the score by entropy")
    with attention_among(job.anatomy.model, "eager"):
        return _metered(job, {"heads": EntropyMeter})


def _metered(job: Job, meters_of: dict[Kind, type[Meter]], **options: Any) -> Values:
    meters = [meters_of[site.kind](site) for site in job.sites]
    total = 0.0
    with ExitStack() as stack, torch.no_grad():
        for meter in meters:
            for handle in meter.connect(job.anatomy.layers[meter.site.layer]):
                stack.callback(handle.remove)
        for done, sample in enumerate(job.samples, start=1):
            for meter in meters:
                meter.mask_BT = sample.mask_BT
            total += sequence_losses(job.anatomy.model, sample, **options).sum().item()
            job.report(done, len(job.samples))
    job.forwards, job.loss = 1, total / job.tokens
    return [meter.value() for meter in meters]


# --- without calibration text --------------------------------------------------------------------


def magnitude(job: Job) -> Values:
    """The norm of the weights that read a unit; of an expert, of its weights."""
    values = []
    for done, site in enumerate(job.sites, start=1):
        if site.kind == "experts":
            values.append(expert_norms(site))
        elif site.slices is not None:
            values.append(slice_norms(site.slices))
        else:
            values.append(column_squares(site).view(site.count, -1).sum(dim=1).sqrt())
        job.report(done, len(job.sites))
    return values


def random(job: Job) -> Values:
    """Numbers in [0, 1), the same for the same seed."""
    generator = torch.Generator().manual_seed(job.seed)
    return [torch.rand(s.count, generator=generator, dtype=torch.float64) for s in job.sites]


MEASURES: dict[Score, Callable[[Job], Values]] = {
    "fisher": fisher,
    "taylor": taylor,
    "activation": activation,
    "leave_one_out": leave_one_out,
    "entropy": entropy,
    "magnitude": magnitude,
    "block_influence": block_influence,
    "frequency": frequency,
    "relative_activation": relative_activation,
    "random": random,
}
RANKS: dict[Score, tuple[Kind, ...]] = dict.fromkeys(SCORES, KINDS) | {
    "activation": ("heads", "channels", "experts", "recurrent_heads"),
    "magnitude": ("heads", "channels", "experts", "expert_channels", "recurrent_heads"),
    "entropy": ("heads",),
    "block_influence": ("layers",),
    "frequency": ("experts",),
    "relative_activation": ("experts",),
}
"""The kinds of units that each score ranks."""
NEEDS_NO_TEXT: tuple[Score, ...] = ("magnitude", "random")


def scores_for(kind: Kind) -> list[Score]:
    """The scores that rank units of this kind."""
    return [score for score in SCORES if kind in RANKS[score]]


def steps(job: Job, score: Score) -> int:
    """How many steps the measurement reports."""
    if score == "leave_one_out":
        return 1 + job.units
    if score == "magnitude":
        return len(job.sites)
    return 0 if score == "random" else len(job.samples)
