"""Make the embedded models again: `python -m pliant.nano.train`.

`nano-s` is trained from nothing; `nano-l` is grown from it (the same function in twice the width
and more layers) and goes on. Both are stock Llamas on a byte tokenizer. A run that was stopped, by
Ctrl-C or by a kill, goes on where its last checkpoint was when it is started again.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from tempfile import TemporaryFile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pliant.errors import InvalidInput
from pliant.loading import WEIGHTS, torch_device
from pliant.nano import NAMES
from pliant.nano.growth import deepen, widen
from pliant.nano.learning import Learner, Schedule
from pliant.nano.program import Parser, as_program, progress
from pliant.nano.tokenizer import build_tokenizer

CONTEXT = 2048
SMALL = {"hidden_size": 48, "intermediate_size": 128, "layers": 3, "head_dim": 16}
LARGE_LAYERS = 4
WEIGHTS_FILE = "model.safetensors"
CARD = ("README.md", "accuracy.json")
"""What `evaluate --write` adds to a checkpoint: true of the weights that it measured alone."""

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


@dataclass(frozen=True)
class Run:
    """One call of this program."""

    out: Path
    """Where the two checkpoints go."""
    work: Path
    """Where the run keeps its own state, to go on from."""
    shorter: float = 1.0
    """Divide every number of steps by this: for trying the program, not for good models."""
    every: int = 500
    """Steps between checkpoints."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.shorter < inf:
            raise InvalidInput(f"shorter is {self.shorter}; the steps are divided by 1 or more")
        if self.every < 1:
            raise InvalidInput(f"every is {self.every}; checkpoints lie 1 or more steps apart")
        torch_device(self.device)

    def schedule(self, name: str) -> Schedule:
        full = SCHEDULES[name]
        return replace(full, steps=max(1, int(full.steps / self.shorter)))

    def checkpoint(self, name: str) -> Path:
        return self.work / name / "checkpoint.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    with as_program("the same command goes on from the last checkpoint"):
        if asked.threads < 0:
            raise InvalidInput(f"threads is {asked.threads}; give 1 or more, or 0 for torch's own")
        if asked.threads:
            torch.set_num_threads(asked.threads)
        run = Run(asked.out, asked.work, asked.shorter, asked.every, asked.device)
        train(run, asked.only or NAMES)


def train(run: Run, names: Sequence[str] = NAMES) -> None:
    """Train and export the models, the smaller first, and print where each lies.

    What this run has trained already is exported again, and not trained again.
    """
    for folder in (run.out, run.work):
        _try_writing(folder)
    tokenizer = build_tokenizer(CONTEXT)
    for name in (name for name in NAMES if name in names):
        model = beginning(name, tokenizer, run)
        learn(name, Learner(model, tokenizer, run.schedule(name)), run)
        export(model, tokenizer, run.out / name)
        print(f"{name}: {run.out / name}", flush=True)


def beginning(name: str, tokenizer: PreTrainedTokenizerFast, run: Run) -> LlamaForCausalLM:
    """The model before its first step: nano-s random, nano-l grown from this run's nano-s."""
    torch.manual_seed(SCHEDULES[name].seed)
    model = LlamaForCausalLM(small_config(tokenizer))
    if name == "nano-l":
        small = Learner(model, tokenizer, run.schedule("nano-s"))
        if not (small.resume(run.checkpoint("nano-s")) and small.done):
            raise InvalidInput(
                f"nano-l grows from nano-s, and {run.work} holds none that is trained to its end: "
                "leave out --only, or name the --work that does"
            )
        wide = widen(model)
        model = deepen(wide, LARGE_LAYERS - len(wide.model.layers))
    return model.to(run.device)


def learn(name: str, learner: Learner, run: Run) -> None:
    steps, checkpoint = learner.schedule.steps, run.checkpoint(name)
    learner.resume(checkpoint)
    if learner.done:
        return
    with progress(name, steps, run.every) as tell:
        average = None
        tell(learner.step, "steps are done")
        for loss in learner.steps():
            average = loss if average is None else 0.98 * average + 0.02 * loss
            if learner.step % run.every == 0 or learner.done:
                learner.save(checkpoint)
            tell(learner.step, f"loss {average:.3f}")


def small_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    heads = SMALL["hidden_size"] // SMALL["head_dim"]
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SMALL["hidden_size"],
        intermediate_size=SMALL["intermediate_size"],
        num_hidden_layers=SMALL["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=SMALL["head_dim"],
        max_position_embeddings=CONTEXT,
        # Short prompts: a low base turns every pair of dimensions within their length.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A stock checkpoint: fp16 on disk, fp32 when loaded, a tokenizer class every stack knows."""
    aside = folder / ".writing"  # inside: a folder beside it would be taken for a model
    shutil.rmtree(aside, ignore_errors=True)
    model.to("cpu", torch.float16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _edit(aside / "config.json", dtype="float32")
    _edit(aside / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    # Some versions of safetensors write for the owner's eyes only.
    (aside / WEIGHTS_FILE).chmod((aside / "config.json").stat().st_mode)
    _put(aside, folder)


def _edit(path: Path, **values: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def _put(aside: Path, folder: Path) -> None:
    """File by file: what else lies in the folder stays, but for a card of other weights.

    A kill in between leaves some files new and some old; the same command mends that.
    """
    weights = folder / WEIGHTS_FILE
    if not (weights.exists() and filecmp.cmp(aside / WEIGHTS_FILE, weights, shallow=False)):
        for card in CARD:
            (folder / card).unlink(missing_ok=True)
    for file in sorted(aside.iterdir()):
        file.replace(folder / file.name)
    aside.rmdir()


def _try_writing(folder: Path) -> None:
    """Better to know before two hours of training than after them."""
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m pliant.nano.train",
        description="Train nano-s, then grow nano-l from it. The same command goes on after a "
        "stop; measure what came out with python -m pliant.nano.evaluate --write.",
        epilog="example: python -m pliant.nano.train --out weights --work runs/nano --threads 2",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the checkpoints go")
    parser.add_argument("--work", type=Path, default=Path("runs/nano"), help="the run's own state")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="one of the two models")
    parser.add_argument("--device", default=device, help=f"cpu, cuda, ... (here: {device})")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--shorter", type=float, default=1.0, help="divide the steps, to try it")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    return parser


if __name__ == "__main__":
    main()
