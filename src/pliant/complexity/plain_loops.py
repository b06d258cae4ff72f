"""What makes a CPXCausalLM safe in training loops that know nothing of it, a stock Trainer's too.

Its state dict has what is trained, and no frozen base: checkpoints stay small, and a base with tied
embeddings can be saved. An optimizer that trains the embeddings in place of [CPX] is refused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from pliant.complexity.model import Complexity
from pliant.errors import InvalidInput

BASE = "base_model."


class WrappedBase(nn.Module):
    """A base and its scorer, saved without what is frozen of the base."""

    base_model: PreTrainedModel
    scorer: Complexity

    def __init__(self) -> None:
        super().__init__()
        self._prefix = ""
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_forget_frozen)
        _models.add(self)
        _hook_optimizers()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _trained(self) -> set[str]:
        """The names of the base's parameters that are trained; one for each that are tied."""
        return {name for name, p in self.base_model.named_parameters() if p.requires_grad}


def _leave_out_frozen(
    model: WrappedBase, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    if is_fsdp_enabled():
        return  # accelerate gives each process its shards by this dictionary
    base, trained = prefix + BASE, model._trained()
    for key in [key for key in state if key.startswith(base)]:
        if key.removeprefix(base) not in trained:
            del state[key]


def _forget_frozen(model: WrappedBase, incompatible: Any) -> None:
    """A checkpoint without a frozen base lacks nothing."""
    base, trained = model._prefix + BASE, model._trained()
    missing = incompatible.missing_keys
    missing[:] = [
        key for key in missing if not key.startswith(base) or key.removeprefix(base) in trained
    ]


# --- optimizers -----------------------------------------------------------------------------------

_models: weakref.WeakSet[WrappedBase] = weakref.WeakSet()


@functools.cache
def _hook_optimizers() -> None:
    register_optimizer_step_pre_hook(_check_rows_are_trained)


def _check_rows_are_trained(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Refuse to train the embeddings in place of the rows: no [CPX] is among them."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_models):
        rows, embeddings = model.scorer.rows, model.scorer.anatomy.embeddings
        only_head = id(model.scorer.head.weight) in trained and id(rows) not in trained
        if not only_head or not rows.requires_grad:
            continue
        if any(id(p) in trained for p in embeddings.parameters()):
            raise InvalidInput(
                "the optimizer has the base's embeddings, and not [CPX], which is no row of them: "
                "give it model.scorer.rows instead of get_input_embeddings().weight (or train the "
                "head alone: is_cpx_token_trainable=False)"
            )
