"""trl's trainers for experts: which prompts a step takes, how they are answered, what is logged.

trl draws prompts evenly, in advance, and runs each prompt once for every answer. Here a step's
prompts are drawn when it begins, by what they have to teach, and share their prefill. The reference
policy is the base itself, the expert disabled, so there is never a second model.
"""

from __future__ import annotations

import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from pliant.adapters.files import serialize
from pliant.errors import InvalidInput
from pliant.experts.rewards import Reward, RewardWarning
from pliant.experts.training.answers import sample_groups
from pliant.experts.training.config import ExpertTrainingConfig
from pliant.experts.training.prompts import PromptSampler
from pliant.experts.training.shared_prompts import score_answers
from pliant.experts.training.task import Task
from pliant.files import write_file

RewardFunction = Callable[..., Sequence[float | None]]
"""As trl calls it: `reward(prompts=, completions=, completion_ids=, **columns)`."""
GIVE_UP = 3
"""Batches in a row of which no answer could be judged, after which training stops."""
STATE, ROLLOUTS = "prompts.json", "rollouts-{}.safetensors"
LOG = "log.jsonl"


class SafeReward:
    """A reward that may raise, or return NaN: then it is None, and counted.

    The first error is shown as a warning. A reward that fails for all answers of several batches in
    a row, such as a judge whose server is down, teaches nothing: that is an error.
    """

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward
        self.__name__ = "reward"
        try:
            named = inspect.signature(reward).parameters
        except (TypeError, ValueError):  # some builtins have no signature
            named = inspect.signature(lambda **_: None).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
        self.names = set(named)
        self._failed, self._first = 0, ""
        self._counted_before = _counted(reward)
        self._in_a_row = 0

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        before = self.failures
        rewards = self._rewards({"completions": completions, **columns}, len(completions))
        failed = self.failures - before
        self._in_a_row = self._in_a_row + 1 if failed >= len(completions) > 0 else 0
        if self._in_a_row == GIVE_UP:
            raise InvalidInput(
                f"the reward failed for every answer of {GIVE_UP} batches in a row"
                f"{self._reason()}: mend it, and continue with --resume (resume=True in Python)"
            )
        return rewards

    def _rewards(self, columns: dict[str, Any], count: int) -> list[float | None]:
        if not self.takes_all:
            columns = {name: value for name, value in columns.items() if name in self.names}
        try:
            rewards = list(self.reward(**columns))
            if len(rewards) != count:
                raise ValueError(f"{len(rewards)} rewards for {count} answers")
            numbers = [math.nan if r is None else float(r) for r in rewards]
        except Exception as error:  # a user's function may raise anything
            self._failed += count
            self._warn(f"{type(error).__name__}: {error}")
            return [None] * count
        valid = [r if math.isfinite(r) else None for r in numbers]
        self._failed += sum(r is None for r in valid)
        return valid

    @property
    def failures(self) -> int:
        """Answers without a reward, and parts of a `Reward` that failed and that it counted."""
        return self._failed + _counted(self.reward) - self._counted_before

    def _warn(self, error: str) -> None:
        if not self._first:
            warnings.warn(f"the reward failed, and training goes on: {error}", RewardWarning, 4)
        self._first = self._first or error

    def _reason(self) -> str:
        """How it failed first, as far as that is known."""
        own = self.reward.as_dict()["first_failures"] if isinstance(self.reward, Reward) else {}
        known = [self._first, *(f"{name}: {message}" for name, message in own.items())]
        return next((f" ({text})" for text in known if text), "")


def _counted(reward: RewardFunction) -> int:
    failures = reward.failures if isinstance(reward, Reward) else {}
    return sum(sum(kinds.values()) for kinds in failures.values())


class RewardMixin:
    """What the trainers below share."""

    accelerator: Any
    args: Any
    model: Any
    generation_config: Any
    eos_token_ids: list[int]
    _metrics: Any
    _step: int
    _buffered_inputs: Any

    def __init__(
        self,
        *args: Any,
        config: ExpertTrainingConfig,
        task: Task,
        reward: SafeReward,
        **more: Any,
    ) -> None:
        self.config, self.task, self.reward = config, task, reward
        self.prompts = PromptSampler(len(task.rows), config.seed, config.exploration)
        self.shares_prefill: bool | None = None
        self._local: list[int] = []
        """The row of the task that each of this process's answers belongs to."""
        self._rewards: Tensor | None = None
        from datasets import Dataset

        places = Dataset.from_dict({"prompt": [""] * config.prompts})  # filled when a step begins
        more |= {"reward_funcs": reward, "train_dataset": places}
        super().__init__(*args, **more)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # trl rounds what it trains on a quantised base
                parameter.data = parameter.data.float()
        self.add_callback(SavedState(self))  # type: ignore[attr-defined]

    # --- prompts ---------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answers to the step's prompts, this process's share of them."""
        process, count = self.accelerator.process_index, len(inputs)
        torch.manual_seed(self._seed_of(self.prompts.draws, process))
        drawn = self.prompts.draw(self.config.prompts)
        indices = [i for i in drawn for _ in range(self.config.group)]
        self._local = indices[process * count : (process + 1) * count]
        rows = [dict(self.task.rows[i]) for i in self._local]
        output: dict[str, Any] = super()._generate_and_score_completions(rows)  # type: ignore[misc]
        assert self._rewards is not None
        groups = self._rewards.view(-1, self.config.group)
        self._metrics["train"]["task_reward"].append(torch.nanmean(groups).item())
        self.prompts.update(drawn, groups.tolist())
        return output

    def _seed_of(self, draw: int, process: int) -> int:
        """The same after a resume, whatever else has drawn from the generator."""
        return int(np.random.SeedSequence([self.config.seed, draw, process]).generate_state(1)[0])

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.task.ids[i] for i in self._local], None, {}

    def _calculate_rewards(self, *args: Any) -> Tensor:
        began = time.perf_counter()
        rewards: Tensor = super()._calculate_rewards(*args)  # type: ignore[misc]
        self._metrics["train"]["reward_seconds"].append(time.perf_counter() - began)
        self._rewards = rewards[:, 0]
        return rewards

    # --- answers ---------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
        """Sampled answers, as token ids up to their end token."""
        began = time.perf_counter()
        answers = None if self.shares_prefill is False else self._sampled(prompt_ids)
        self.shares_prefill = answers is not None
        if answers is None:
            output = super()._generate_single_turn(prompt_ids, *rest)  # type: ignore[misc]
        else:
            output = answers if isinstance(self, RLOOTrainer) else (answers, None)
        self._metrics["train"]["rollout_seconds"].append(time.perf_counter() - began)
        return output

    def _sampled(self, prompt_ids: list[list[int]]) -> list[list[int]] | None:
        """None where a prefill cannot be shared: shards, and models whose cache is not exact."""
        group = self.config.group
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or len(prompt_ids) % group:  # type: ignore[attr-defined]
            return None
        if any(prompt_ids[i] != prompt_ids[i - i % group] for i in range(len(prompt_ids))):
            return None  # a group is divided between two processes
        with unwrap_model_for_generation(
            self.model_wrapped,  # type: ignore[attr-defined]
            self.accelerator,
            generation_kwargs=self.generation_kwargs,  # type: ignore[attr-defined]
        ) as model:
            self.generation_config.eos_token_id = self.eos_token_ids
            return sample_groups(model, prompt_ids[::group], group, self.generation_config)

    # --- their log-probabilities -----------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As trl has them, of answers that share their prompt's forward.

        Not where processes share the model: it would run twice before a backward pass.
        """
        own = input_ids, attention_mask
        chunks = zip(*(t.split(batch_size or len(t)) for t in own), strict=True)
        may_share = self.accelerator.num_processes == 1 and not more.get("compute_aux_loss")
        scored = self._scored(model, chunks, logits_to_keep) if may_share else []
        if not scored:
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, *own, logits_to_keep, batch_size, compute_entropy, **more
            )
        log_p = torch.cat([output.log_probs[:, -logits_to_keep:] for output in scored])
        if not compute_entropy:
            return log_p, None, None
        return log_p, torch.cat([output.entropy[:, -logits_to_keep:] for output in scored]), None

    def _scored(
        self, model: Any, chunks: Iterable[tuple[Tensor, Tensor]], length: int
    ) -> list[Any]:
        """The outputs for all chunks, or none."""
        outputs = []
        for ids, mask in chunks:
            with self.accelerator.autocast():
                output = score_answers(model, ids, mask, length)
            if output is None:
                return []
            outputs.append(output)
        return outputs

    # --- the log ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the share of the time that the answers took, and what failed."""
        metrics = self._metrics["train"]
        steps = sum(metrics.get("step_time", []))
        if steps and "loss" in logs:
            logs["rollout_share"] = sum(metrics.pop("rollout_seconds", [])) / steps
            logs["reward_share"] = sum(metrics.pop("reward_seconds", [])) / steps
            logs["reward_failures"] = self.reward.failures
            logs["success"] = float(self.prompts.success.mean())
        super().log(logs, start_time)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for each checkpoint."""


class GRPOExpertTrainer(RewardMixin, GRPOTrainer):
    """trl's GRPO."""


class RLOOExpertTrainer(RewardMixin, RLOOTrainer):
    """trl's RLOO."""


class ReinforceExpertTrainer(RewardMixin, GRPOTrainer):
    """REINFORCE with KL, as published: no group, no baseline; an answer that is right counts +1,
    one that is wrong -1 (a reward r counts 2 r - 1)."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        assert self._rewards is not None
        start = self.accelerator.process_index * len(inputs)
        own = self._rewards[start : start + len(inputs)]
        output["advantages"] = torch.nan_to_num(2 * own - 1, nan=0.0)
        return output


TRAINERS: dict[str, Any] = {
    "grpo": GRPOExpertTrainer,
    "rloo": RLOOExpertTrainer,
    "reinforce": ReinforceExpertTrainer,
}


class SavedState(TrainerCallback):
    """Saves with each checkpoint what the next draws depend on, and restores it; writes the log."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = _checkpoint(args, state)
        if args.should_save:
            step = {"step": self.trainer._step}
            (folder / STATE).write_text(json.dumps({**self.trainer.prompts.state(), **step}))
        if self.trainer.config.updates > 1:
            _save_rollouts(
                self.trainer._buffered_inputs, folder / ROLLOUTS.format(args.process_index)
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        log = Path(str(args.output_dir)) / LOG
        if args.should_save:
            log.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))
        if state.global_step == 0:
            return
        folder = _checkpoint(args, state)
        saved = json.loads((folder / STATE).read_text())
        self.trainer.prompts.load_state(saved)
        self.trainer._step = saved["step"]
        rollouts = folder / ROLLOUTS.format(args.process_index)
        if rollouts.is_file():
            self.trainer._buffered_inputs = _load_rollouts(rollouts, args.device)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.should_save and state.log_history:
            with (Path(str(args.output_dir)) / LOG).open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def _save_rollouts(batches: Sequence[Mapping[str, Tensor]], path: Path) -> None:
    """Each tensor under the index of its batch and its name."""
    tensors = {f"{i}.{name}": t for i, batch in enumerate(batches) for name, t in batch.items()}
    content, _, _ = serialize(tensors)
    write_file(path, content)


def _load_rollouts(path: Path, device: torch.device) -> list[dict[str, Tensor]]:
    batches: dict[int, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        index, name = key.split(".", 1)
        batches.setdefault(int(index), {})[name] = tensor.to(device)
    return [batches[i] for i in range(len(batches))]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
