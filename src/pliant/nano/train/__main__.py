"""Training the embedded models: `python -m pliant.nano.train`.

`nano-s` is trained from scratch; `nano-l` is grown from it (the same function in twice the width
and more layers) and trained on. Both are stock Llamas on a byte tokenizer. A run that was stopped,
by Ctrl-C or by a kill, resumes from its last checkpoint when it is started again.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pliant.cli import terminal
from pliant.cli.app import run_program
from pliant.errors import InvalidInput, PliantError
from pliant.loading import WEIGHTS, torch_device
from pliant.nano import NAMES, path
from pliant.nano.train.trainer import ASSISTANT, END, PAD, USER, Schedule, Trainer

CONTEXT = 2048
SMALL = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
HEADS = 3
DOUBLED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
LARGE_LAYERS = 4
_NOISE = 0.5  # of a matrix's own standard deviation; without it both halves have equal gradients
WEIGHTS_FILE = "model.safetensors"
CARD = ("README.md", "accuracy.json")
"""What `evaluate --write` adds to a checkpoint: it describes these weights and no others."""
# One token a role and one to end: a short question must not cost more to frame than to ask.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SCHEDULES = {
    "nano-s": Schedule(steps=5_500),
    "nano-l": Schedule(
        steps=12_500,
        tilt=0.7,
        tilt_until=0.5,
        emphasis={
            "pattern": 2.0,
            "fibonacci": 2.0,
            "step": 1 / 1.5,
            "largest": 0.6,
            "boolean": 0.7,
            "cell": 1.3,
            "count": 1.3,
        },
        seed=1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    out: Path = WEIGHTS
    """Where to write the checkpoints of the two models."""
    work: Path = Path("runs/nano")
    """Where the run stores its state, to resume from."""
    only: tuple[str, ...] = ()
    """Train only this model, nano-s or nano-l."""
    device: str | None = None
    """cpu, cuda, ... Default: cuda if there is one."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    shorter: float = 1.0
    """Divide the number of steps by this: for a trial, not for good models."""
    every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if not 1 <= self.shorter < inf:
            raise InvalidInput(f"shorter is {self.shorter}; the steps are divided by 1 or more")
        if self.every < 1:
            raise InvalidInput(f"every is {self.every}; checkpoints are 1 or more steps apart")
        if self.threads < 0:
            raise InvalidInput(f"threads is {self.threads}; give 1 or more, or 0 for torch's own")
        for name in self.only:
            path(name)
        torch_device(self.device)

    def schedule(self, name: str) -> Schedule:
        full = SCHEDULES[name]
        return replace(full, steps=max(1, int(full.steps / self.shorter)))

    def checkpoint(self, name: str) -> Path:
        return self.work / name / "checkpoint.safetensors"


def train(options: TrainOptions) -> None:
    """Train nano-s, then grow nano-l from it.

    After a stop, the same command goes on. Then measure the models with python -m
    pliant.nano.evaluate --write.

    Example: python -m pliant.nano.train --out weights --work runs/nano --threads 2
    """
    terminal.hide_loading_bars()
    try:
        _train(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from the last checkpoint") from None
    except SafetensorError as error:  # of a full disk, too
        raise PliantError(str(error)) from error


def _train(options: TrainOptions) -> None:
    """A model whose training is complete is exported again, not trained again."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # fails before two hours of training, not after them
    tokenizer = build_tokenizer(CONTEXT)
    for name in (name for name in NAMES if name in (options.only or NAMES)):
        model = initial_model(name, tokenizer, options)
        _train_model(name, Trainer(model, tokenizer, options.schedule(name)), options)
        export(model, tokenizer, options.out / name)
        print(f"{name}: {options.out / name}", flush=True)


def initial_model(
    name: str, tokenizer: PreTrainedTokenizerFast, options: TrainOptions
) -> LlamaForCausalLM:
    """The model before its first step: nano-s random, nano-l grown from this run's nano-s."""
    torch.manual_seed(SCHEDULES[name].seed)
    model = LlamaForCausalLM(small_config(tokenizer))
    if name == "nano-l":
        small = Trainer(model, tokenizer, options.schedule("nano-s"))
        if not (small.resume(options.checkpoint("nano-s")) and small.done):
            raise InvalidInput(
                f"nano-l grows from nano-s, and {options.work} has none that is fully trained: "
                "leave out --only, or name the --work that has"
            )
        wide = widen(model)
        model = deepen(wide, LARGE_LAYERS - len(wide.model.layers))
    return model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _train_model(name: str, trainer: Trainer, options: TrainOptions) -> None:
    steps, checkpoint = trainer.schedule.steps, options.checkpoint(name)
    trainer.resume(checkpoint)
    if trainer.done:
        return
    with terminal.progress(name, steps, options.every) as report:
        average = None
        report(trainer.step, "steps are done")
        for loss in trainer.steps():
            average = loss if average is None else 0.98 * average + 0.02 * loss
            if trainer.step % options.every == 0 or trainer.done:
                trainer.save(checkpoint)
            report(trainer.step, f"loss {average:.3f}")


def small_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        # Short prompts: a low base turns every pair of dimensions within their length.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """256 bytes and four special tokens; byte-level, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in (PAD, END, USER, ASSISTANT)]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# --- growing a Llama -----------------------------------------------------------------------------
# A larger model that computes the same function starts with all that the smaller one has learned.
# Width doubles by stacking: the residual stream becomes [h, h], and every head and MLP channel is
# duplicated. Noise that cancels breaks the symmetry of the halves: [W/2 + N, W/2 - N] [h, h] = W h
# for any N. New layers write nothing at first (their output projections are 0), so depth does not
# change the output either.


@torch.no_grad()
def widen(small: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """The same function with twice the width, heads and MLP channels."""
    sizes = {name: 2 * getattr(small.config, name) for name in DOUBLED}
    large = LlamaForCausalLM(small.config.__class__(**small.config.to_dict() | sizes))
    generator = torch.Generator().manual_seed(seed)
    for ours, theirs in zip(large.model.layers, small.model.layers, strict=True):
        for name, matrix in theirs.named_parameters():
            doubled = _stacked(matrix) if matrix.ndim == 1 else _doubled(matrix, generator)
            ours.get_parameter(name).copy_(doubled)
    embeddings = small.model.embed_tokens.weight
    large.model.embed_tokens.weight.copy_(torch.cat([embeddings, embeddings], dim=1))
    # The head is the embedding again, so [h, h] would score every token twice as high.
    large.model.norm.weight.copy_(_stacked(small.model.norm.weight) / 2)
    return large


@torch.no_grad()
def deepen(model: LlamaForCausalLM, layers: int, seed: int = 0) -> LlamaForCausalLM:
    """The same function with `layers` more layers, spread evenly among the old ones."""
    old = len(model.model.layers)
    torch.manual_seed(seed)
    config = model.config.__class__(**model.config.to_dict() | {"num_hidden_layers": old + layers})
    deep = LlamaForCausalLM(config)
    deep.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    deep.model.norm.weight.copy_(model.model.norm.weight)
    origins = _spread(old, layers)
    for layer, origin in zip(deep.model.layers, origins, strict=True):
        if origin is None:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        else:
            layer.load_state_dict(model.model.layers[origin].state_dict())
    return deep


def _spread(old: int, new: int) -> list[int | None]:
    """The old layer that each layer copies (None: a new layer), new ones evenly among the old."""
    after = [round((i + 1) * old / new) - 1 for i in range(new)] if new else []
    origins: list[int | None] = []
    for i in range(old):
        origins.append(i)
        origins.extend([None] * after.count(i))
    return origins


def _stacked(vector: Tensor) -> Tensor:
    return torch.cat([vector, vector])


def _doubled(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Duplicate the rows; split each row's input weights over the two equal halves of the input."""
    rows = torch.cat([matrix, matrix])
    noise = torch.randn(rows.shape, generator=generator) * (_NOISE * matrix.std())
    return torch.cat([rows / 2 + noise, rows / 2 - noise], dim=1)


# --- the stock checkpoint -------------------------------------------------------------------------


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A stock checkpoint: fp16 on disk, fp32 when loaded, a tokenizer class every stack has."""
    aside = folder / ".writing"  # inside: a folder beside it would look like a model
    shutil.rmtree(aside, ignore_errors=True)
    model.to("cpu", torch.float16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _edit(aside / "config.json", dtype="float32")
    _edit(aside / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    # Some versions of safetensors let only the owner read the file.
    (aside / WEIGHTS_FILE).chmod((aside / "config.json").stat().st_mode)
    _put(aside, folder)


def _edit(file: Path, **values: str) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


def _put(aside: Path, folder: Path) -> None:
    """Move the files; others in the folder stay, except the card of other weights.

    A kill in between leaves some files new and some old; running the same command again fixes that.
    """
    weights = folder / WEIGHTS_FILE
    if not (weights.exists() and filecmp.cmp(aside / WEIGHTS_FILE, weights, shallow=False)):
        for card in CARD:
            (folder / card).unlink(missing_ok=True)
    for file in sorted(aside.iterdir()):
        file.replace(folder / file.name)
    aside.rmdir()


def main(arguments: Sequence[str] | None = None) -> None:
    run_program(train, "python -m pliant.nano.train", arguments)


if __name__ == "__main__":
    main()
