"""How a scorer learns: transformers' Trainer, on top of prompts whose keys and values are stored.

    trainer = CPXTrainer(scorer, config, train_dataset=rows, eval_dataset=others)
    trainer.train()
    print(trainer.report)

`fit` is the same without files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from pliant.adapters import files, saving
from pliant.complexity.config import GAIN
from pliant.complexity.learning.checks import check_together
from pliant.complexity.learning.config import CPXTrainingConfig
from pliant.complexity.learning.learner import learner_of, trained_tensors
from pliant.complexity.learning.lessons import Lessons, collated, lessons_of
from pliant.complexity.learning.losses import READ_AS, losses
from pliant.complexity.learning.report import Clock, TrainingReport
from pliant.complexity.model import Complexity
from pliant.complexity.prompts import Truncation, checked, ids_of
from pliant.complexity.stored import keeping
from pliant.complexity.stored.order import LikeLengths
from pliant.data import Duplicates
from pliant.errors import AdapterError, InvalidInput
from pliant.training.checkpoint import AdapterCheckpoint, CompleteCheckpoint, resume_path
from pliant.training.distributed import check_sharding, from_first_process
from pliant.training.interrupt import finish_step_on_interrupt

ROWS, LORA = 18.0, 0.3
"""The rates beside the head's, where none is set; the rows' goes with their root mean square, too.
Measured on nano-s (8,000 labels, 4 epochs, the head's rate .01): an evaluation loss of .56 and .54
at rates of .03 and .1 of the rows; with LoRA of rank 4, .49, .47 and .54 at its .001, .003, .01."""
BASE = "base.safetensors"  # what is trained of the base, beside a checkpoint's scorer


class CPXTrainer(Trainer):
    """Trains a scorer; with TrainingArguments of your own, `config` says the rest.

    A prompt of more than `room` tokens (what the model takes, unless less is said) is an error, or
    loses what `truncation` says.

    `model` is a CPXCausalLM, a scorer, or a model that a scorer is attached to. A data set is a
    list of rows (`prompt`, `messages` or `input_ids`, and `label`), a `datasets.Dataset` of such,
    or Lessons. Its checkpoints hold the scorer and the optimizer: kilobytes.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | CPXTrainingConfig | None = None,
        *,
        config: CPXTrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        room: int | None = None,
        truncation: Truncation | None = None,
        **trainer: Any,
    ) -> None:
        self.config = args if isinstance(args, CPXTrainingConfig) else config or CPXTrainingConfig()
        self.learner = learner_of(model, self.config.base_dropout)
        check_together(self.learner.scorer, self.config)
        self.learner.scorer.read_as(READ_AS[self.config.loss])
        self.learner.freeze(everything=not self.config.train_base)
        self.learner.scorer.rows.requires_grad_(self.config.is_cpx_token_trainable)
        self.tokenizer = processing_class or self.learner.scorer.tokenizer
        self.room, self.truncation = room, truncation
        self._rows_rms = self.scorer.rows.detach().square().mean().sqrt().item()
        self.kept: dict[str, keeping.Kept] = {}
        self.adapters = AdapterCheckpoint()
        self.clock = Clock()
        self.report: TrainingReport | None = None
        self.duplicates: Duplicates | None = None
        if args is None or isinstance(args, CPXTrainingConfig):
            args = self.config.training_arguments(evaluates=eval_dataset is not None)
        if self.config.gradient_checkpointing:
            self.learner.gradient_checkpointing_enable()
        _one_device(args)
        super().__init__(
            self.learner,
            args,
            data_collator=collated,
            train_dataset=self._lessons(train_dataset),
            eval_dataset=self._lessons(eval_dataset),
            processing_class=processing_class,
            callbacks=[self.adapters, _Keeper(self), *self._stoppers(args), *(callbacks or [])],
            **trainer,
        )
        if self.is_fsdp_enabled:  # the first alone may have read the base, and send it on
            start = from_first_process(self.scorer._fingerprint, self._rows_rms)
            self.scorer._fingerprint, self._rows_rms = start
        self.label_names = ["labels"]
        if isinstance(self.train_dataset, Lessons) and isinstance(self.eval_dataset, Lessons):
            self.duplicates = self.train_dataset.repeated(self.eval_dataset)

    @property
    def scorer(self) -> Complexity:
        return self.learner.scorer

    def create_accelerator_and_postprocess(self) -> None:
        with check_sharding(self):
            super().create_accelerator_and_postprocess()

    # --- a run ---

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' Trainer's. Interrupted (Ctrl-C), it finishes its step, saves a
        checkpoint and raises KeyboardInterrupt; `resume_from_checkpoint=True` goes on there."""
        self.clock = Clock()
        checkpoint = resume_path(resume_from_checkpoint, str(self.args.output_dir))
        self.adapters.resume_from = checkpoint
        CompleteCheckpoint.last_of(self)
        with finish_step_on_interrupt(self):
            output = super().train(checkpoint, *args, **kwargs)
        self.report = self.clock.report(self, output)
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean of the prompts' losses; or `compute_loss_func`, if the trainer was given one."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise InvalidInput("the rows have no label to learn from: give them a 'label'")
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = loss_of(outputs["logits"], labels, self.scorer.config.outputs, self.config)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Rows, head and LoRA each with its own learning rate; rows, bias and query never decay."""
        if self.optimizer is None:  # type: ignore[has-type]
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.learner
            )
            self.optimizer = chosen[0](self._groups(model or self.model), **chosen[1])
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters of each learning rate and decay, found by name: a wrapper may have put
        others in their place."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        mark = f"pliant.{self.scorer.name}."
        for name, p in model.named_parameters():
            if p.requires_grad:
                _, _, own = name.rpartition(mark)
                rate, decay = self._rate_and_decay(own if mark in name else "base")
                groups.setdefault((rate, decay), []).append(p)
        if not groups:
            raise InvalidInput("nothing is trainable: set is_cpx_token_trainable, or thaw the head")
        return [
            {"params": some, "lr": rate, "weight_decay": decay}
            for (rate, decay), some in groups.items()
        ]

    def _rate_and_decay(self, own: str) -> tuple[float, float]:
        """For a parameter of the scorer's by its own name, or for the "base"."""
        default, decay = self.args.learning_rate, self.args.weight_decay
        if own == "rows":
            size = self._rows_rms
            return _or(self.config.rows_learning_rate, ROWS * default * size), 0.0
        if own.startswith("lora.") or own == "base":
            return _or(self.config.lora_learning_rate, LORA * default), decay
        return default, decay if own == "head.weight" else 0.0

    # --- the data ---

    def _lessons(self, rows: Any) -> Any:
        if rows is None or isinstance(rows, Lessons):
            return rows
        if isinstance(rows, dict):
            return {name: self._lessons(some) for name, some in rows.items()}
        outputs = self.scorer.config.outputs
        into_ids = partial(
            encode, self.scorer, self.tokenizer, room=self.room, truncation=self.truncation
        )
        return lessons_of(rows, into_ids, loss=self.config.loss, outputs=outputs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            eval_dataset = self._lessons(eval_dataset)
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._lessons(test_dataset), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        lessons = train_dataset if train_dataset is not None else self.train_dataset
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        whole = batch * max(1, self.args.world_size)
        return LikeLengths(lessons.lengths, whole, seed, lambda: int(self.state.epoch or 0))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["index", "lessons", "labels"]

    # --- the prefixes ---

    def store(self) -> None:
        """Decide how prompts are kept, and run those that are; called when a training begins."""
        uses = _uses(self.args, len(self.get_train_dataloader()))
        self._store("train", self.train_dataset, uses)
        evaluated = self.eval_dataset if self.args.eval_strategy != "no" else None
        named = evaluated if isinstance(evaluated, dict) else {"evaluation": evaluated}
        for name, lessons in named.items():
            if isinstance(lessons, Lessons):
                self._store(name, lessons, uses)

    def _store(self, name: str, lessons: Lessons, uses: int) -> None:
        if lessons.stored is not None:
            self.kept[name] = keeping.Kept(lessons.stored.where, "stored before")
            return
        common: dict[str, Any] = {"folder": self._folder, "device": self.args.device}
        with self.clock.prefilling():
            kept = keeping.decide(
                self.learner,
                lessons.ids,
                uses,
                self._run,
                wanted=self.config.prefixes,
                processes=self.args.world_size,
                alike=self.is_fsdp_enabled,
                **common,
            )
            self.kept[name] = kept = self._agreed(kept)
            mine = (self.args.process_index, self.args.world_size)
            if self.is_fsdp_enabled:
                mine = (0, 1)  # all must run together
            meet = self.accelerator.wait_for_everyone
            lessons.stored = keeping.stored(
                kept, self.learner, lessons.ids, self._run, mine=mine, meet=meet, **common
            )
        if lessons.stored is not None:
            self.clock.tokens += lessons.tokens

    def _run(self, ids: Tensor, mask: Tensor) -> Any:
        """Of a sharded model only the whole can be asked; else the one inside its wrapper, which
        would meet the other processes at each call."""
        model = self.model_wrapped if self.is_fsdp_enabled else self.learner
        return model(input_ids=ids, attention_mask=mask, keep=True)

    def _agreed(self, kept: keeping.Kept) -> keeping.Kept:
        """What the first process decided: others may have measured otherwise."""
        if self.args.world_size == 1:
            return kept
        return keeping.Kept(*from_first_process(kept.where, kept.why, kept.bytes))

    @property
    def _folder(self) -> Path:
        return Path(self.config.prefix_folder or Path(self.args.output_dir) / "prefixes")

    # --- checkpoints ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The scorer, and the trained parameters of the base, if there are any; nothing else. In a
        checkpoint, the scorer lies among its adapters."""
        folder = Path(output_dir or self.args.output_dir)
        here = self.args.should_save
        if not _internal_call:
            saving.save(self.scorer, folder, here=here)
        trained = trained_tensors(self.learner)
        if here:
            folder.mkdir(parents=True, exist_ok=True)
            if trained:
                files.write_file(folder / BASE, safetensors.torch.save(trained))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            settings = self.args.to_json_string().encode()
            files.write_file(folder / "training_args.json", settings)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="A scorer, trained with Pliant")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP this writes the model, too."""
        with self.learner.saving():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The trained parameters of the base; `AdapterCheckpoint` restores the scorer."""
        folder = Path(resume_from_checkpoint)
        self.learner.reshard()
        trained = dict(self.learner.trained_base())
        found = safetensors.torch.load_file(folder / BASE) if (folder / BASE).is_file() else {}
        if found.keys() != trained.keys():
            raise AdapterError(
                f"{folder}: was saved with {len(found)} trained parameters of the base, and now "
                f"there are {len(trained)}: freeze or thaw what was"
            )
        with torch.no_grad():
            for name, tensor in found.items():
                trained[name].copy_(saving._as_sharded(tensor, trained[name]))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _stoppers(self, args: TrainingArguments) -> list[TrainerCallback]:
        patience = self.config.patience
        if not patience:
            return []
        if args.eval_strategy == "no":
            raise InvalidInput(
                f"patience = {patience}: pass eval_dataset= to have what to wait for"
            )
        return [EarlyStoppingCallback(patience)]


class _Keeper(TrainerCallback):
    """Stores the prompts once the model is where it will be trained, and times the epochs."""

    def __init__(self, trainer: CPXTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.store()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.clock.epoch_begins()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.trainer.clock.epoch_ends()


def loss_of(
    logits_BL: Tensor, labels: Tensor, outputs: Sequence[str], config: CPXTrainingConfig
) -> Tensor:
    """The mean loss of a batch. A gain is a difference of probabilities and no logit of one: beside
    probabilities it is learned by its squared error."""
    settings: Any = {
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
    }
    if config.loss != "bce" or GAIN not in outputs:
        return losses(logits_BL, labels, config.loss, **settings).mean()
    linear = [i for i, name in enumerate(outputs) if name == GAIN]
    others = [i for i in range(len(outputs)) if i not in linear]
    gains = losses(logits_BL[:, linear], labels[:, linear], "regression") * len(linear)
    if not others:
        return gains.mean()
    weights = [config.class_weights[i] for i in others] if config.class_weights else ()
    settings["class_weights"] = weights
    rest = losses(logits_BL[:, others], labels[:, others], "bce", **settings) * len(others)
    return ((gains + rest) / len(outputs)).mean()


def encode(
    scorer: Complexity,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    room: int | None = None,
    truncation: Truncation | None = None,
) -> list[list[int]]:
    """The ids of each prompt, without a [CPX] at its end: that one is never in the vocabulary."""
    last = getattr(tokenizer, "cpx_token_id", None)
    ids = [row[:-1] if row[-1:] == [last] else row for row in ids_of(prompts, tokenizer)]
    known = [most for most in (room, scorer._room) if most is not None]
    table = getattr(scorer.anatomy.embeddings, "num_embeddings", None)
    return checked(ids, min(known, default=None), truncation, table)


def _one_device(args: TrainingArguments) -> None:
    """Without a launcher, one device: DataParallel would copy the base at each step."""
    args._n_gpu = min(1, args.n_gpu)


def _uses(args: TrainingArguments, batches: int) -> int:
    """How often each prompt is run; more than once where an epoch is begun again."""
    if args.max_steps > 0:
        steps = max(1, batches // args.gradient_accumulation_steps)
        return -(-args.max_steps // steps)
    return max(1, int(-(-args.num_train_epochs // 1)))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
