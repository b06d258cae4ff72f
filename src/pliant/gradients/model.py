"""Train some of the tokens: a model whose forward, with labels, costs what those tokens cost.

    gradients = attach(model, GradientConfig(ratio=0.25))
    model(input_ids=ids, labels=ids).loss.backward()     # as ever; in eval mode nothing changes
    gradients.metrics()
    gradients.detach()

The model stays itself: it generates, saves and evaluates as before. While it trains, `.logits`
holds the rows of the tokens that were trained, (1, N, V), and `.loss` is their weighted loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import adapters
from pliant.adapters import Adapter, Around, Before, Wire
from pliant.adapters.quantized import differentiable
from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state
from pliant.errors import InvalidInput
from pliant.gradients import cautions
from pliant.gradients.cautions import warn_if_biased
from pliant.gradients.config import GradientConfig
from pliant.gradients.engines.layers import exact
from pliant.gradients.engines.split_forward import (
    SplitForward,
    is_sharded,
    rows_of,
    while_head_runs,
)
from pliant.gradients.engines.trials import Exactness, LabelAlignment, exactness, label_alignment
from pliant.gradients.engines.two_passes import completion, first_pass, second_pass
from pliant.gradients.labelled_batch import (
    LabelledBatch,
    TokenCount,
    is_labelled,
    labelled_batch,
    named,
    without_extras,
)
from pliant.gradients.selection.rules import Chosen
from pliant.gradients.selector import Router, Selector, everything, version_of
from pliant.gradients.telemetry import Telemetry, TokenCost
from pliant.gradients.trl_output import FLAG, trl_output

OFF = GradientConfig(engine="exact", selection="all")
"""Every token, through the whole model: what training without Pliant computes."""


WORTH_IT = 2 / 3
"""Two passes cost 1 + 3r forwards and one costs 3: above this ratio one is made."""


OF_ALL_POSITIONS = ("output_hidden_states", "output_attentions")
"""Outputs that a user expects for every position, not for the chosen ones."""


class GradientsWarning(UserWarning):
    """Something is computed in another way than configured, or not at all."""


def attach(
    model: nn.Module,
    config: GradientConfig | None = None,
    *,
    router: Router | None = None,
    name: str | None = None,
) -> Gradients:
    """`model` trains on some tokens of each batch from now on, until `detach`.

    With a `router`, scores come from its logits.
    """
    config = config or GradientConfig()
    gradients = Gradients(model, config, router)
    warn_if_biased(config)
    return adapters.attach(model, gradients, name)


class Gradients(Adapter):
    """Chooses tokens, and computes their loss with the configured engine."""

    part = "gradients"
    config_class = GradientConfig

    def __init__(
        self,
        model: nn.Module,
        config: GradientConfig,
        router: Router | None = None,
    ) -> None:
        super().__init__(model, config)
        self.selector = Selector(config, router)
        self.telemetry = Telemetry()
        self.engine: str = config.engine
        """The engine in use: another than the configured one where that is not exact."""
        self._anatomy: list[Anatomy] = []
        self._head: list[nn.Module] = []
        self._exactness: Exactness | None = None
        self._warned: set[str] = set()
        self.count: TokenCount | None = None

    def wire(self, model: nn.Module) -> Iterable[Wire]:
        self._anatomy, self._head = [Anatomy.of(model)], _head_of(model)
        depth, exit_layer = len(self._anatomy[0].layers), self.config.exit_layer or 1
        if exit_layer > depth:
            raise InvalidInput(f"exit_layer = {exit_layer}: {type(model).__name__} has {depth}")
        self.count = TokenCount(self._anatomy[0].model)
        yield from differentiable(model)
        yield Before(self._anatomy[0].decoder, self._watch)
        yield Around(self._anatomy[0].model, self._forward)

    def detach(self) -> None:
        super().detach()
        if self.count is not None:
            self.count.remove()
        self.count = None

    def _watch(self, decoder: nn.Module, args: Any, kwargs: Any) -> None:
        """Warns when the decoder is trained without the forward that chooses tokens."""
        if self.base.training and torch.is_grad_enabled() and cautions.is_bypassed(self, self.base):
            self._warn(cautions.bypassed_message(self.base))

    def summary(self) -> str:
        config, by = self.acting, f" by {self.acting.score}" if self.acting.needs_scores else ""
        text = f"trains {config.ratio:.0%} of the tokens, {config.selection}{by}"
        text += f", engine {self.engine}; step {self.selector.schedule.steps}"
        if last := self.metrics():
            chosen, total = int(last["tokens_selected"]), int(last["tokens_total"])
            text += f", {chosen} of {total} tokens in the last batch"
        return text

    # --- for training loops ---

    def step(self) -> None:
        """Call after each optimizer step: from then on only this advances the schedule."""
        self.selector.schedule.step()

    def metrics(self) -> dict[str, float]:
        """Of the last step. Only this call synchronizes with the device."""
        return self.telemetry.last.figures(self.cost)

    def totals(self) -> dict[str, float]:
        """Of all steps since this was attached."""
        return self.telemetry.run.figures(self.cost)

    def logged(self) -> dict[str, float]:
        """Of the steps since the last call: for a log."""
        return self.telemetry.take_window().figures(self.cost)

    @property
    def acting(self) -> GradientConfig:
        """The configuration in use, which `switch` may have replaced."""
        return self.selector.config

    def switch(self, config: GradientConfig) -> None:
        """Train by another configuration from now on (`OFF`, say); checkpoints record it."""
        self.selector.switch(config)

    @property
    def cost(self) -> TokenCost | None:
        """The operations of one token's pass through this model."""
        return TokenCost.of(self._anatomy[0]) if self._anatomy else None

    # --- checkpoints ---

    def get_extra_state(self) -> dict[str, Any]:
        return self.selector.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.selector.load_state(state)

    # --- the forward ---

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with cautions.inside(self):
            inputs = named(forward, args, kwargs)
            if cautions.is_nested(self):  # which has chosen already, and calls this for the rest
                return self._own(forward, args, kwargs)
            learns = self.base.training and torch.is_grad_enabled()
            if learns and is_labelled(inputs):
                return self._train(forward, inputs)
            if learns:
                self._warn(cautions.unlabelled_message(self.base))
            return self._own(forward, args, kwargs)

    def _own(self, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The model's own output for a call."""
        assert self.count is not None
        return self.count.own(forward, args, without_extras(kwargs))

    def _train(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        fused = bool(inputs.pop(FLAG, False))
        if _head_of(self.base) != self._head:  # its vocabulary was resized since
            self._anatomy, self._head = [Anatomy.of(self.base)], _head_of(self.base)
        split = SplitForward(self._anatomy[0], forward)
        # trl, and `shift_labels`, have shifted the labels already.
        shifted = fused or inputs.get("labels") is None
        alignment = LabelAlignment() if shifted else label_alignment(split)
        if alignment.other is not None:
            return self._train_unselected(split, inputs, alignment.other)
        batch = labelled_batch(inputs, alignment.aligned)
        self.selector.schedule.begin(batch.items, version_of(self.base))
        decoded, chosen, whole = self._decoded(split, batch)
        if fused:
            some = None if self.selector.takes_all else chosen
            output, losses_N = trl_output(split, batch, decoded, some, whole)
            self._with_auxiliary(output)
        else:
            output, losses_N = self._output(split, batch, decoded, chosen)
        known_BT, fair = self.selector.losses_BT, self.selector.is_fair
        self.telemetry.trained(batch, chosen, losses_N, known_BT, split.ledger, fair=fair)
        output.move_to_end("loss", last=False)  # where a tuple has it, and `output[0]`
        return output.to_tuple() if batch.tuples else output

    def _train_unselected(self, split: SplitForward, inputs: dict[str, Any], reason: str) -> Any:
        kind = type(split.anatomy.model).__name__
        if inputs.get("loss_weights") is not None:
            raise InvalidInput(f"loss_weights: {kind} makes a loss of its own ({reason})")
        self._warn(
            f"{kind}: its own loss is no cross entropy of one token at each position ({reason}), "
            "so nothing is selected: every token is trained, at the full cost."
        )
        self.selector.schedule.begin(inputs.get("num_items_in_batch"), version_of(self.base))
        return self._own(split.forward, (), inputs)

    def _decoded(self, split: SplitForward, batch: LabelledBatch) -> tuple[Any, Chosen, Any]:
        """The decoder's output with a gradient at the chosen positions; these; and its output with
        the values at all labelled positions."""
        engine = self._engine(split, batch)
        if engine == "completion":
            alike = is_sharded(split.anatomy)
            decoded = completion(split, batch.inputs, batch.valid_BT, always=alike)
            if decoded is not None:
                return decoded, everything(batch.valid_BT), decoded
        ratio = 1.0 if self.selector.takes_all else self.selector.schedule.ratio()
        if engine == "sparse" and ratio <= WORTH_IT:
            return self._sparse(split, batch)
        decoded, scored_BTD = exact(split, batch.inputs, self.acting.exit_layer)
        return decoded, self._chosen(split, batch, decoded, scored_BTD), decoded

    def _sparse(self, split: SplitForward, batch: LabelledBatch) -> tuple[Any, Chosen, Any]:
        first = first_pass(
            split,
            batch.inputs,
            one_hop=self.acting.kv_grad == "one_hop",
            exit_layer=self.acting.exit_layer,
        )
        chosen = self._chosen(split, batch, first.decoded, first.scored_BTD)
        at_BK, live_BK = chosen.positions_BK, chosen.live_BK
        if at_BK.shape[1] == batch.valid_BT.shape[1]:
            decoded = split.backbone(batch.inputs)
        else:
            decoded = second_pass(split, batch.inputs, first.pairs, at_BK, live_BK)
        return decoded, chosen, first.decoded

    def _chosen(
        self, split: SplitForward, batch: LabelledBatch, decoded: Any, scored_BTD: Tensor
    ) -> Chosen:
        def look() -> Chosen:
            return self.selector.chosen(split, batch, decoded, scored_BTD)

        asks = self.acting.needs_scores and not self.selector.takes_all
        if not asks or self.selector.router is not None:
            return look()
        return while_head_runs(split.anatomy, scored_BTD, look)

    def _output(
        self, split: SplitForward, batch: LabelledBatch, decoded: Any, chosen: Chosen
    ) -> tuple[Any, Tensor]:
        """The model's output on the chosen rows, their loss in it; and the loss of each."""
        at_BK, live_BK = chosen.positions_BK, chosen.live_BK
        rows_ND = rows_of(last_hidden_state(decoded), at_BK, live_BK)
        if not len(rows_ND):  # nothing to learn, and yet something to call backward on
            output = split.head(decoded, last_hidden_state(decoded)[:1, 0], batch.inputs)
            output.loss = 0.0 * output.logits.float().nan_to_num().sum()
            return output, output.logits.new_zeros(0)
        output = split.head(decoded, rows_ND, batch.inputs)
        logits_NV = output.logits.reshape(len(rows_ND), -1)
        losses_N = F.cross_entropy(
            logits_NV.float(), batch.targets_BT.gather(1, at_BK)[live_BK], reduction="none"
        )
        weights_N = chosen.weights_BK[live_BK]
        if batch.user_BT is not None:
            weights_N = weights_N * batch.user_BT.gather(1, at_BK)[live_BK]
        output.loss = (weights_N * losses_N).sum() / batch.count
        self._with_auxiliary(output)
        return output, losses_N

    def _with_auxiliary(self, output: Any) -> None:
        auxiliary = getattr(output, "aux_loss", None)
        if isinstance(auxiliary, Tensor):
            output.loss = output.loss + self._auxiliary_share() * auxiliary

    # --- which engine ---

    def _engine(self, split: SplitForward, batch: LabelledBatch) -> str:
        """The configured engine, if it is exact on this model and batch."""
        wanted = self.acting.engine
        if wanted == "exact" or (wanted == "sparse" and self.acting.kv_grad == "full"):
            self.engine = "exact"
            return "exact"
        if self._exactness is None:
            self._exactness = exactness(SplitForward(split.anatomy, split.forward))
        mask, sharded = batch.inputs.get("attention_mask"), is_sharded(split.anatomy)
        reason = self._exactness.against_any if sharded else self._exactness.against(mask)
        if reason is None and batch.inputs.get("past_key_values") is not None:
            reason = "it goes on from keys and values that are there already"
        if reason is None and self._asks_for("output_router_logits", batch):
            reason = "its routers' auxiliary loss would see the chosen tokens alone"
        if reason is None and any(self._asks_for(name, batch) for name in OF_ALL_POSITIONS):
            reason = "what its layers make of every position was asked for"
        if reason is None and self.acting.kv_grad == "one_hop" and sharded:
            reason = (
                'its layers are sharded: their weights are gone when "one_hop" needs them again'
            )
        self.engine = wanted if reason is None else "exact"
        if reason is not None:
            self._warn(
                f"{type(split.anatomy.model).__name__}: the {wanted!r} engine is not exact here "
                f"({reason}), so 'exact' computes instead: the same loss, at a higher cost."
            )
        return self.engine

    def _asks_for(self, output: str, batch: LabelledBatch) -> bool:
        """Whether the call, or else the model's config, asks for this output."""
        asked = batch.inputs.get(output)
        if asked is None:
            asked = getattr(getattr(self.base, "config", None), output, False)
        return bool(asked)

    def _auxiliary_share(self) -> float:
        holders = (self.base, getattr(self.base, "config", None))
        shares = (getattr(holder, "router_aux_loss_coef", None) for holder in holders)
        return float(next((share for share in shares if share is not None), 0.0))

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, GradientsWarning, stacklevel=2)


def all_attached_to(model: nn.Module) -> list[Gradients]:
    """The adapters that select this model's tokens: nearly always one, or none."""
    return [a for a in adapters.attached(model).values() if isinstance(a, Gradients)]


def _head_of(model: Any) -> list[nn.Module]:
    """What the model itself calls its head, in a list: a module as an attribute would be registered
    as a submodule."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [head] if isinstance(head, nn.Module) else []
