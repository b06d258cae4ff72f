"""How a scorer learns: transformers' Trainer, on top of prompts whose keys and values are stored.

    trainer = CPXTrainer(scorer, config, train_dataset=rows, eval_dataset=held_out)
    trainer.train()
    print(trainer.report)

`fit` is the same without files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from pliant.adapters import saving
from pliant.complexity.model import Complexity
from pliant.complexity.prefix_cache import policy
from pliant.complexity.prompts import Truncation
from pliant.complexity.training.config import CPXTrainingConfig
from pliant.complexity.training.dataset import (
    PromptDataset,
    SimilarLengthSampler,
    collate,
    dataset_of,
    encode,
)
from pliant.complexity.training.losses import READ_AS, check_weights, loss_of
from pliant.complexity.training.report import Clock, TrainingReport, last_evaluation
from pliant.complexity.training.train_module import train_module_of
from pliant.data import Duplicates
from pliant.errors import AdapterError, InvalidInput
from pliant.files import write_file
from pliant.training.checkpoint import AdapterCheckpoint, CompleteCheckpoint, resume_path
from pliant.training.distributed import check_sharding, from_first_process
from pliant.training.terminal import finish_step_on_interrupt

ROWS, LORA = 18.0, 0.3
"""Learning rates as multiples of the head's, where none is set; the rows' is also multiplied by
their root mean square. Measured on nano-s (8,000 labels, 4 epochs, the head's rate .01): an
evaluation loss of .56 and .54 at rates of .03 and .1 for the rows; with LoRA of rank 4, .49, .47
and .54 at .001, .003 and .01 for LoRA."""
BASE = "base.safetensors"  # the trained parameters of the base, in a checkpoint


class CPXTrainer(Trainer):
    """Trains a scorer; with TrainingArguments of your own, `config` holds the other settings.

    A prompt of more than `room` tokens (by default the model's limit) is an error, or is truncated
    on the side that `truncation` names.

    `model` is a CPXCausalLM, a scorer, or a model that a scorer is attached to. A data set is a
    list of rows (`prompt`, `messages` or `input_ids`, and `label`), a `datasets.Dataset` of such,
    or a PromptDataset. A checkpoint holds the scorer and the optimizer: kilobytes.
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
        self.module = train_module_of(model, self.config.base_dropout)
        _check_settings(self.scorer, self.config)
        self.scorer.read_as(READ_AS[self.config.loss])
        self.module.freeze(everything=not self.config.train_base)
        self.scorer.rows.requires_grad_(self.config.is_cpx_token_trainable)
        self.tokenizer = processing_class or self.scorer.tokenizer
        self.room, self.truncation = room, truncation
        self._rows_rms = self.scorer.rows.detach().square().mean().sqrt().item()
        self.storage: dict[str, policy.Storage] = {}
        self.adapters = AdapterCheckpoint()
        self.clock = Clock(self.store)
        self.report: TrainingReport | None = None
        self.duplicates: Duplicates | None = None
        if args is None or isinstance(args, CPXTrainingConfig):
            args = self.config.training_arguments(evaluates=eval_dataset is not None)
        if self.config.gradient_checkpointing:
            self.module.gradient_checkpointing_enable()
        _use_one_device(args)
        super().__init__(
            self.module,
            args,
            data_collator=collate,
            train_dataset=self._dataset(train_dataset),
            eval_dataset=self._dataset(eval_dataset),
            processing_class=processing_class,
            callbacks=[self.adapters, self.clock, *self._stoppers(args), *(callbacks or [])],
            **trainer,
        )
        if self.is_fsdp_enabled:  # only the first process may have read the base
            start = from_first_process(self.scorer._fingerprint, self._rows_rms)
            self.scorer._fingerprint, self._rows_rms = start
        self.label_names = ["labels"]
        train, held_out = self.train_dataset, self.eval_dataset
        if isinstance(train, PromptDataset) and isinstance(held_out, PromptDataset):
            self.duplicates = train.duplicates(held_out)

    @property
    def scorer(self) -> Complexity:
        return self.module.scorer

    def create_accelerator_and_postprocess(self) -> None:
        with check_sharding(self):
            super().create_accelerator_and_postprocess()

    # --- a run ---

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' Trainer's. On Ctrl-C it finishes its step, saves a checkpoint and raises
        KeyboardInterrupt; `resume_from_checkpoint=True` resumes there."""
        self.clock.start()
        checkpoint = resume_path(resume_from_checkpoint, str(self.args.output_dir))
        self.adapters.resume_from = checkpoint
        CompleteCheckpoint.last_of(self)
        with finish_step_on_interrupt(self):
            output = super().train(checkpoint, *args, **kwargs)
        self.report = self._report(float(output.training_loss))
        return output

    def _report(self, loss: float) -> TrainingReport:
        train: Any = self.train_dataset
        return TrainingReport(
            seconds=self.clock.seconds,
            prefill_seconds=self.clock.prefill,
            epoch_seconds=tuple(self.clock.epochs),
            epochs=float(self.state.epoch or 0),
            prompts=len(train),
            prompt_tokens=train.tokens,
            stored_tokens=self._stored_tokens,
            storage=dict(self.storage),
            loss=loss,
            evaluation=last_evaluation(self.state.log_history),
            duplicates=str(self.duplicates or ""),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean of the prompts' losses, or `compute_loss_func`, if the trainer has one."""
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
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.module
            )
            self.optimizer = kind(self._groups(model or self.model), **options)
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters of each learning rate and decay, looked up by name: a wrapper may have
        replaced them."""
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
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]

    def _rate_and_decay(self, own: str) -> tuple[float, float]:
        """For a parameter by its name inside the scorer, or for the "base"."""
        default, decay = self.args.learning_rate, self.args.weight_decay
        if own == "rows":
            rate = self.config.rows_learning_rate
            return (ROWS * default * self._rows_rms if rate is None else rate), 0.0
        if own.startswith("lora.") or own == "base":
            rate = self.config.lora_learning_rate
            return (LORA * default if rate is None else rate), decay
        return default, decay if own == "head.weight" else 0.0

    # --- the data ---

    def _dataset(self, rows: Any) -> Any:
        if rows is None or isinstance(rows, PromptDataset):
            return rows
        if isinstance(rows, dict):
            return {name: self._dataset(split) for name, split in rows.items()}
        outputs = self.scorer.config.outputs
        into_ids = partial(
            encode, self.scorer, self.tokenizer, max_length=self.room, truncation=self.truncation
        )
        return dataset_of(rows, into_ids, loss=self.config.loss, outputs=outputs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            eval_dataset = self._dataset(eval_dataset)
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._dataset(test_dataset), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        total = batch * max(1, self.args.world_size)
        return SimilarLengthSampler(
            dataset.lengths, total, seed, lambda: int(self.state.epoch or 0)
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["index", "dataset", "labels"]

    # --- the prefixes ---

    def store(self) -> None:
        """Decide where prefixes are stored, and compute them; called when a training begins."""
        self._stored_tokens = 0
        uses = _uses(self.args, len(self.get_train_dataloader()))
        self._store("train", self.train_dataset, uses)
        evaluated = self.eval_dataset if self.args.eval_strategy != "no" else None
        named = evaluated if isinstance(evaluated, dict) else {"evaluation": evaluated}
        for name, dataset in named.items():
            if isinstance(dataset, PromptDataset):
                self._store(name, dataset, uses)

    def _store(self, name: str, dataset: PromptDataset, uses: int) -> None:
        if dataset.stored is not None:
            self.storage[name] = policy.Storage(dataset.stored.where, "stored before")
            return
        folder = Path(self.config.prefix_folder or Path(self.args.output_dir) / "prefixes")
        storage = policy.choose_storage(
            dataset.ids,
            uses,
            self._run,
            wanted=self.config.prefixes,
            inexact=self.module.why_prefixes_change(),
            processes=self.args.world_size,
            alike=self.is_fsdp_enabled,
            folder=folder,
        )
        if self.args.world_size > 1:  # the others may have measured something else
            (storage,) = from_first_process(storage)
        self.storage[name] = storage
        share = (self.args.process_index, self.args.world_size)
        if self.is_fsdp_enabled:
            share = (0, 1)  # all must run together
        dataset.stored = policy.store(
            storage,
            self.scorer,
            dataset.ids,
            self._run,
            share=share,
            barrier=self.accelerator.wait_for_everyone,
            folder=folder,
        )
        if dataset.stored is not None:
            self._stored_tokens += dataset.tokens

    def _run(self, ids: Tensor, mask: Tensor) -> Any:
        """A sharded model runs through its root; else the inner model, whose calls need not wait
        for the other processes."""
        model = self.model_wrapped if self.is_fsdp_enabled else self.module
        ids, mask = ids.to(self.args.device), mask.to(self.args.device)
        return model(input_ids=ids, attention_mask=mask, keep=True)

    # --- checkpoints ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The scorer, and the trained parameters of the base, if there are any; nothing else. In a
        checkpoint, the scorer lies among its adapters."""
        folder = Path(output_dir or self.args.output_dir)
        here = self.args.should_save
        if not _internal_call:
            saving.save(self.scorer, folder, here=here)
        trained = self.module.trained_tensors()
        if here:
            folder.mkdir(parents=True, exist_ok=True)
            if trained:
                write_file(folder / BASE, safetensors.torch.save(trained))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            settings = self.args.to_json_string().encode()
            write_file(folder / "training_args.json", settings)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="A scorer, trained with Pliant")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP this writes the model as well."""
        with self.module.saving():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The trained parameters of the base; `AdapterCheckpoint` restores the scorer."""
        folder = Path(resume_from_checkpoint)
        self.module.reshard()
        parameters = dict(self.module.trained_base())
        tensors = safetensors.torch.load_file(folder / BASE) if (folder / BASE).is_file() else {}
        if tensors.keys() != parameters.keys():
            raise AdapterError(
                f"{folder}: was saved with {len(tensors)} trained parameters of the base, and now "
                f"there are {len(parameters)}: freeze or thaw what was"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(saving.shard_like(tensor, parameters[name]))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _stoppers(self, args: TrainingArguments) -> list[TrainerCallback]:
        patience = self.config.patience
        if not patience:
            return []
        if args.eval_strategy == "no":
            raise InvalidInput(f"patience = {patience}: it needs an evaluation, eval_dataset=")
        return [EarlyStoppingCallback(patience)]


def _use_one_device(args: TrainingArguments) -> None:
    """Without a launcher: DataParallel would copy the base at each step."""
    args._n_gpu = min(1, args.n_gpu)


def _uses(args: TrainingArguments, batches: int) -> int:
    """How often each prompt is run; an epoch that is begun counts."""
    if args.max_steps > 0:
        steps = max(1, batches // args.gradient_accumulation_steps)
        return -(-args.max_steps // steps)
    return max(1, int(-(-args.num_train_epochs // 1)))


def _check_settings(scorer: Complexity, config: CPXTrainingConfig) -> None:
    """Settings that do not fit this scorer are refused before anything is trained."""
    outputs = scorer.config.outputs
    if config.num_labels not in (None, len(outputs)):
        raise InvalidInput(
            f"num_labels = {config.num_labels}, and the scorer has {len(outputs)} outputs "
            f"({', '.join(outputs)}): give the same, or leave it out"
        )
    check_weights(config.class_weights, len(outputs), config.loss)
    token = getattr(scorer.tokenizer, "cpx_token", config.cpx_token)
    if token != config.cpx_token:
        raise InvalidInput(f"cpx_token = {config.cpx_token!r}, and the tokenizer's is {token!r}")
