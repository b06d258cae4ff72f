"""The few-shot mixture: coefficients of experts that suit a few solved examples of a task.

    strategy = FewShot.fit(model, tokenizer, [Shot("7 apples ...", "12"), ...])
    strategy.mixture       # {"math": 0.8, "reading": -0.1}, the same for every prompt

A mixture's z is 1 + sum of a_k (z_k - 1), so all a_k = 0 is the base. All candidates of a round run
as rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.data import has_chat_template
from pliant.errors import InvalidInput, check_choice, check_whole, named_settings
from pliant.experts.adapting.cem import CEMConfig, CEMResult, Scores, search
from pliant.experts.adapting.likelihood import Likelihood, answer_ids
from pliant.experts.adapting.prompts import (
    Prompt,
    batches,
    encode,
    experts_on,
    first_expert_layer,
    generate_batch,
)
from pliant.experts.adapting.shots import Shot, check_split
from pliant.experts.adapting.strategy import Choice, Strategy, name_of
from pliant.experts.model import use_rows
from pliant.experts.rows import Mixture, Rows
from pliant.stats import Floats

Scope = Literal["global", "block", "layer"]
Reward = Callable[[str, Any, Any], float]
"""How right an answer is, from the answer, its reference and the prompt: a verifier, say."""


@named_settings
@dataclass(frozen=True, kw_only=True)
class FewShotConfig(CEMConfig):
    """What the coefficients may differ by, and how they are searched."""

    scope: Scope = "global"
    """One coefficient an expert, one for each block of layers, or one for each layer."""
    blocks: int = 4
    """How many blocks of layers, for `block`."""
    warm_start: int = 10
    """Gradient steps on the likelihood of the shots before the search, which begins there."""
    warm_rate: float = 0.1
    """Their learning rate, by Adam."""
    max_new_tokens: int = 64
    """The longest answer that is rewarded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scope", self.scope, get_args(Scope))
        check_whole("blocks", self.blocks, 1)
        check_whole("warm_start", self.warm_start, 0)


class FewShot(Strategy):
    """One mixture for all prompts of a task."""

    def __init__(
        self, model: Any, tokenizer: Any, mixture: Mixture, result: CEMResult | None = None
    ) -> None:
        super().__init__(model, tokenizer)
        Rows.of_mixtures([mixture], self.experts)  # refuses unknown experts
        self.mixture, self.result = mixture, result

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        shots: Sequence[Shot],
        config: FewShotConfig = FewShotConfig(),
        *,
        test: Sequence[Prompt] = (),
        reward: Reward | None = None,
        experts: Sequence[str] | None = None,
    ) -> Self:
        """Search the mixture of `experts` (all on the model) under which the shots are likeliest.

        With a `reward`, the mixture whose greedy answers to them earn most; the likelihood decides
        between equals. A `test` that holds a shot is refused.
        """
        if not shots:
            raise InvalidInput("there are no shots: give a few solved examples")
        check_split(shots, test)
        names = tuple(experts or experts_on(model))
        layout = Layout.of(model, names, config)
        likelihood = likelihood_of(model, tokenizer, shots, names)
        start, known = layout.warm_start(likelihood, config), layout.single_experts()
        score: Callable[[Floats], Scores]
        if reward is None:
            score = likelihoods(likelihood, layout)
        else:
            score = rewards(model, tokenizer, shots, reward, likelihood, layout, config)
        result = search(score, layout.size, config, start, known, layout.groups)
        return cls(model, tokenizer, layout.mixture(result.best), result)

    def choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        reason = "fits the shots best"
        if self.result is not None:
            value, base = self.result.value, self.result.start_value
            reason = f"fits the shots best ({value:.3f}; the base {base:.3f})"
        return [Choice(self.mixture, reason)] * len(prompts)

    def __str__(self) -> str:
        return f"{name_of(self.mixture)}: {self.result or 'given by hand'}"


# --- how a candidate is read ----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which number of a candidate is the coefficient of which expert in which layers."""

    names: tuple[str, ...]
    group_of: tuple[int, ...]
    """For each layer the number of its group, whose coefficients it uses; those before all experts
    count to the first."""

    @classmethod
    def of(cls, model: Any, names: Sequence[str], config: FewShotConfig) -> Layout:
        depth, first = len(Anatomy.of(model).layers), first_expert_layer(model)
        own = depth - first
        groups = {"global": 1, "block": min(config.blocks, own), "layer": own}[config.scope]
        group_of = (max(0, layer - first) * groups // own for layer in range(depth))
        return cls(tuple(names), tuple(group_of))

    @property
    def groups(self) -> int:
        return self.group_of[-1] + 1

    @property
    def size(self) -> int:
        return self.groups * len(self.names)

    def weights(self, candidates: Tensor) -> Tensor:
        """(P, K), or (layers, P, K), of (P, size) candidates."""
        grouped = candidates.view(len(candidates), self.groups, len(self.names))
        if self.groups == 1:
            return grouped[:, 0]
        return grouped[:, list(self.group_of)].transpose(0, 1)

    def mixture(self, candidate: Sequence[float]) -> Mixture:
        """As people and `generate` read it; experts whose coefficients are all 0 are left out."""
        weights = self.weights(torch.tensor([candidate], dtype=torch.float64))
        columns = weights[..., 0, :].movedim(-1, 0).tolist()
        named = zip(self.names, columns, strict=True)
        return {name: a for name, a in named if np.any(a)}

    def single_experts(self) -> list[list[float]]:
        """The candidate of each expert alone."""
        eye = np.eye(len(self.names))
        return [list(np.tile(row, self.groups)) for row in eye]

    def warm_start(self, likelihood: Likelihood, config: FewShotConfig) -> list[float]:
        """Where gradient steps from the average of the experts lead."""
        average = torch.full((1, self.size), 1 / len(self.names))
        if not config.warm_start:
            return list(average[0].tolist())
        with torch.inference_mode(False), torch.enable_grad():
            point = average.clone().requires_grad_()
            optimizer = torch.optim.Adam([point], lr=config.warm_rate)
            for _ in range(config.warm_start):
                loss = -likelihood(self.weights(point)).mean()
                loss = loss + config.l1 * point.abs().sum() / self.groups
                (point.grad,) = torch.autograd.grad(loss, point)
                optimizer.step()
        return list(point.detach()[0].tolist())


# --- how good candidates are ----------------------------------------------------------------------


def likelihood_of(
    model: Any, tokenizer: Any, shots: Sequence[Shot], names: Sequence[str], **batching: Any
) -> Likelihood:
    """Of the shots' answers, with the end token where the model's answers have one."""
    prompts = encode([shot.prompt for shot in shots], tokenizer)
    ends = has_chat_template(tokenizer)
    answers = answer_ids([shot.answer for shot in shots], tokenizer, ends)
    return Likelihood(model, prompts, answers, names, **batching)


def likelihoods(likelihood: Likelihood, layout: Layout) -> Callable[[Floats], Scores]:
    """The shots' mean log-likelihood under each candidate."""

    def score(candidates: Floats) -> Scores:
        weights = layout.weights(torch.from_numpy(candidates).float())
        return Scores(likelihood(weights).mean(1).double().cpu().numpy())

    return score


def rewards(
    model: Any,
    tokenizer: Any,
    shots: Sequence[Shot],
    reward: Reward,
    likelihood: Likelihood,
    layout: Layout,
    config: FewShotConfig,
) -> Callable[[Floats], Scores]:
    """The mean reward of each candidate's greedy answers to the shots."""
    ids = encode([shot.prompt for shot in shots], tokenizer)

    def score(candidates: Floats) -> Scores:
        weights = layout.weights(torch.from_numpy(candidates).float())
        earned = np.zeros((len(candidates), len(shots)))
        for rows, batch in batches(likelihood.anatomy, ids, new=config.max_new_tokens):
            chunk = max(1, likelihood.tokens // batch.ids_BT.numel())
            for at in range(0, len(candidates), chunk):
                part = weights[..., at : at + chunk, :]
                count = part.shape[-2]
                repeated = type(batch)(
                    batch.ids_BT.repeat(count, 1), batch.mask_BT.repeat(count, 1)
                )
                with use_rows(likelihood.anatomy, Rows(layout.names, part)):
                    texts = generate_batch(
                        model, tokenizer, repeated, max_new_tokens=config.max_new_tokens
                    )
                for i, text in enumerate(texts):
                    shot = rows[i % len(rows)]
                    earned[at + i // len(rows), shot] = reward(
                        text, shots[shot].answer, shots[shot].prompt
                    )
        ties = likelihoods(likelihood, layout)(candidates).values
        return Scores(earned.mean(1), ties)

    return score
