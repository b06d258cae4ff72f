"""Recovery before the export: the gated model learns from itself with its gates at 1.

    result = recover_gated(pruned, tokenizer, texts, "recovered", RecoveryConfig("lora", distill=1))

There is one copy of the weights. The teacher is the same model without the adapters that prune it,
without its low-rank matrices, and with the norms that it had. So a small set alone can be trained:
when all weights are trained, they are no longer the teacher's. Gates save no time, so each step
costs as much as one of the whole model; `recover` trains the smaller model, and holds two.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.adapters.fingerprint import is_packed
from pliant.anatomy.find import unwrap
from pliant.anatomy.modes import eval_mode
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.exporting.export import export
from pliant.structure.pruning.pruned import Pruned
from pliant.structure.recovery.config import RecoveryConfig
from pliant.structure.recovery.run import Recovery, RecoveryResult
from pliant.structure.recovery.trained_weights import trainable
from pliant.training.run import LORA, UNFINISHED
from pliant.training.terminal import Say, print_to_stderr
from pliant.training.texts import Texts


def recover_gated(
    pruned: Pruned,
    tokenizer: Any,
    texts: Texts,
    folder: str | Path,
    config: RecoveryConfig,
    resume: bool = False,
    *,
    held_out: Texts | None = None,
    settings: Mapping[str, str] | None = None,
    zeros: bool = False,
    say: Say = print_to_stderr,
) -> RecoveryResult:
    """Train low-rank matrices or norms of the pruned model, then export it to the run's `folder`.

    What is trained stays in the model: low-rank matrices are merged at the end. `zeros` is that of
    `export`. A run is resumed on the model as it was before, with the same pruning.
    """
    model, target = pruned.gates.base, Path(folder).expanduser()
    _check(config, model)
    recovery = Recovery(model, tokenizer, texts, target, config, resume, held_out, settings, say)
    plan = recovery.plan(pruned=pruned.as_dict()["removed"])
    recovery.measure(lambda: _whole_loss(pruned, recovery))
    args = recovery.args
    vectors = {p: p.detach().clone() for p in model.parameters() if p.dim() <= 1}
    with trainable(model, config.train, config.rank, None, args.seed) as student:
        originals = {p: v for p, v in vectors.items() if p.requires_grad}
        recovery.train(student, plan, partial(_whole_predictions, pruned, student, originals))
        _merge(student, pruned, target)
    if args.should_save:
        _export(model, tokenizer, target, zeros)
    return recovery.result()


@contextmanager
def whole(
    pruned: Pruned, student: Any = None, vectors: Mapping[nn.Parameter, Tensor] | None = None
) -> Iterator[None]:
    """Inside the block the model is the one before pruning and training, in the same weights."""
    vectors = vectors or {}
    trained = {parameter: parameter.data for parameter in vectors}
    with ExitStack() as stack:
        for adapter in pruned.adapters:
            stack.enter_context(adapter.disabled())
        if hasattr(student, "disable_adapter"):
            stack.enter_context(student.disable_adapter())
        try:
            for parameter, value in vectors.items():
                parameter.data = value.to(parameter)
            yield
        finally:
            for parameter, value in trained.items():
                parameter.data = value


def _whole_loss(pruned: Pruned, recovery: Recovery) -> float:
    with whole(pruned):
        return recovery.loss_of(recovery.model)


@torch.no_grad()
def _whole_predictions(
    pruned: Pruned, student: Any, vectors: Mapping[nn.Parameter, Tensor], inputs: dict[str, Any]
) -> Tensor:
    """The logits of the model before pruning and training."""
    with whole(pruned, student, vectors), eval_mode(student):
        logits: Tensor = student(**inputs, use_cache=False).logits
    return logits


@torch.no_grad()
def _merge(student: Any, pruned: Pruned, folder: Path) -> None:
    """Merge low-rank matrices: where projections have new weights, into these as well."""
    if not hasattr(student, "merge_and_unload"):
        return
    student.save_pretrained(folder / LORA)
    own = pruned.compensation
    layers = {
        id(inner): layer
        for layer in student.modules()
        if hasattr(layer, "get_delta_weight")
        for inner in (layer, layer.get_base_layer())
    }
    for site in own.sites if own is not None else ():
        if (layer := layers.get(id(site.module))) is not None:
            assert own is not None
            delta = layer.get_delta_weight("default")
            weight = own.weight(site.kind, site.key)
            weight.add_((delta if site.axis == 1 else delta.T).to(weight))
    student.merge_and_unload()


def _export(model: Any, tokenizer: Any, folder: Path, zeros: bool) -> None:
    """Write the smaller model beside its place, then move it there file by file."""
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    export(model, unfinished, tokenizer, zeros=zeros)
    for path in unfinished.iterdir():
        os.replace(path, folder / path.name)
    unfinished.rmdir()


def _check(config: RecoveryConfig, model: Any) -> None:
    if config.train == "all":
        raise InvalidInput(
            "train = 'all': the teacher is the same weights, so they cannot all be trained. Train "
            "lora or norms, or export the pruned model and recover that"
        )
    if unwrap(model) is not model or any(hasattr(m, "base_layer") for m in model.modules()):
        raise UnsupportedModel("the model is wrapped, or has LoRA layers: merge them first")
    if is_packed(model):
        raise UnsupportedModel("the model is quantised: load it in 16 or 32 bits to recover it")
