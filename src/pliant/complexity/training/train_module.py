"""The module that a Trainer trains: a base with its scorer, on stored prefixes or full prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.adapters.adapter import BRANCH
from pliant.adapters.saving import gathered
from pliant.complexity.model import Complexity
from pliant.complexity.prefix_cache.store import PrefixBatch
from pliant.errors import InvalidInput


class TrainModule(nn.Module):
    """Its forward returns the logits; its parameters include everything that is trained."""

    def __init__(self, scorer: Complexity, base_dropout: bool = False) -> None:
        super().__init__()
        self.base = base = scorer.base  # which holds the scorer
        self._scorer = [scorer]  # not registered twice
        self.base_dropout = base_dropout
        if (device_map := getattr(scorer.base, "hf_device_map", None)) is not None:
            self.hf_device_map = device_map  # the Trainer does not move such a model
        # accelerate's FSDP shards each of these as one unit: of those declared, the ones there are.
        kinds = {type(module).__name__ for module in self.base.modules()}
        self._no_split_modules = sorted(kinds & set(getattr(base, "_no_split_modules", None) or ()))
        self._saving = False
        self._mode: bool | None = None
        self.train(False)

    @property
    def scorer(self) -> Complexity:
        return self._scorer[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefixes: dict[str, Any] | None = None,
        keep: bool = False,
    ) -> Any:
        """The logits; with `keep`, the keys and values of the prompts alone."""
        if prefixes is not None:
            return {
                "logits": self.scorer.logits_of(PrefixBatch(**prefixes).to_prefilled(self.scorer))
            }
        assert input_ids is not None
        if keep:
            return self.scorer.prefilled(input_ids, attention_mask)
        whole = self.trains_base  # then the prompt needs gradients as well
        return {"logits": self.scorer.logits(input_ids, attention_mask, whole=whole)}

    def train(self, mode: bool = True) -> Self:
        """A frozen base stays in eval mode, unless its dropout is wanted. (The Trainer calls this
        at each step: only a change of mode walks the modules.)"""
        if mode != self._mode:
            self._mode = self.training = mode
            self.base.train(mode and (self.base_dropout or self.trains_base))
            self.scorer.train(mode)
        return self

    @property
    def trains_base(self) -> bool:
        return any(True for _ in self.trained_base())

    def trained_base(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters besides the scorer's."""
        return ((name, p) for name, p in self.scorer.base_parameters() if p.requires_grad)

    @torch.no_grad()
    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained parameters of the base, gathered from their shards."""
        return {name: gathered(p).detach().cpu().contiguous() for name, p in self.trained_base()}

    def why_prefixes_change(self) -> str:
        """Why a prompt's keys and values would differ in the next epoch; empty if they do not."""
        if trained := next(self.trained_base(), None):
            return f"the base is trained ({trained[0]}), so keys and values change at each step"
        if self.base_dropout and self.has_dropout:
            return "the base's dropout is on, so keys and values differ at each step"
        return ""

    def freeze(self, everything: bool) -> None:
        """A base whose parameters are all trainable, as it was loaded, is frozen; one with some of
        them trainable stays as the user chose. Without `everything`, all parameters that a score
        depends on are trained."""
        rest = [p for _, p in self.scorer.base_parameters()]
        if not everything:
            past = {id(p) for p in self._past_the_scorer()}
            for p in rest:
                p.requires_grad_(p.is_floating_point() and id(p) not in past)
        elif all(p.requires_grad for p in rest if p.is_floating_point()):
            for p in rest:
                p.requires_grad_(False)
        self._mode = None
        self.train(self.training)

    def _past_the_scorer(self) -> Iterator[nn.Parameter]:
        """The vocabulary's head, unless tied to the embeddings, and the layers that do not run."""
        anatomy, layer = self.scorer.anatomy, self.scorer.config.layer
        shared = {id(p) for p in anatomy.embeddings.parameters()}
        if anatomy.head is not None:
            yield from (p for p in anatomy.head.parameters() if id(p) not in shared)
        for unused in list(anatomy.layers)[layer:] if layer is not None else ():
            yield from unused.parameters()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Includes the attached adapters, which the base's own state dict leaves out: accelerate
        sends each process its shards of these tensors. While a checkpoint is saved, only what is
        trained."""
        whole: Any = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name, adapter in attached(self.base).items():
            own = {**kwargs, "destination": whole, "prefix": f"{prefix}base.{BRANCH}.{name}."}
            adapter.state_dict(**own)
        if self._saving:
            learned = {prefix + name for name, p in self.named_parameters() if p.requires_grad}
            for key in [key for key in whole if key not in learned]:
                del whole[key]
        return whole

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Leaves a frozen base out of `state_dict`: no checkpoint needs it."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def reshard(self) -> None:
        """An evaluation leaves parameters gathered, where a value that is written would be lost."""
        shards: list[Any] = [m for m in self.modules() if hasattr(m, "unshard")]
        for module in shards:
            module.reshard()

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """transformers calls this; a frozen base stores no activation of a prompt anyway."""
        if self.trains_base:
            raise InvalidInput(
                "gradient_checkpointing=True drops the cache that [CPX] runs on, and the base is "
                "trained through it: leave it off, or freeze the base"
            )

    @property
    def has_dropout(self) -> bool:
        """Whether the base draws random numbers in train mode."""
        modules = (m for m in self.base.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        config = getattr(self.base, "config", None)
        settings = config.to_dict() if config is not None else {}
        rates = [v for k, v in settings.items() if "drop" in k and isinstance(v, float)]
        return any(m.p > 0 for m in modules) or any(rate > 0 for rate in rates)


def train_module_of(model: nn.Module, base_dropout: bool = False) -> TrainModule:
    """From a CPXCausalLM, a scorer, or a model that one scorer is attached to."""
    if isinstance(model, TrainModule):
        return model
    scorer: Any = model if isinstance(model, Complexity) else getattr(model, "scorer", None)
    if not isinstance(scorer, Complexity):
        scorers = [a for a in attached(model).values() if isinstance(a, Complexity)]
        if len(scorers) != 1:
            raise InvalidInput(
                f"{type(model).__name__} has {len(scorers)} scorers attached, and one is trained: "
                "attach(model, CPXConfig()), or pass the scorer itself"
            )
        scorer = scorers[0]
    return TrainModule(scorer, base_dropout)
