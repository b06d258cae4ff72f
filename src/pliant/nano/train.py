"""Make the embedded models again: `python -m pliant.nano.train`.

`nano-s` is trained from nothing; `nano-l` is grown from it (the same function in twice the width
and more layers) and goes on. Both are stock Llamas on a byte tokenizer. A run that was stopped, by
Ctrl-C or by a kill, goes on where its last checkpoint was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pliant.loading import WEIGHTS
from pliant.nano import NAMES
from pliant.nano.growth import deepen, widen
from pliant.nano.learning import Learner, Schedule
from pliant.nano.tokenizer import build_tokenizer

CONTEXT = 2048
SMALL = {"hidden_size": 48, "intermediate_size": 128, "layers": 3, "head_dim": 16}
LARGE_LAYERS = 4

SCHEDULES = {
    "nano-s": Schedule(steps=5_500),
    "nano-l": Schedule(
        steps=12_500,
        tilt=0.7,
        tilt_until=0.5,
        emphasis={"pattern": 0.5, "largest": 0.6, "boolean": 0.7, "cell": 1.3, "count": 1.3},
        seed=1,
    ),
}


@dataclass(frozen=True)
class Run:
    """One call of this program."""

    out: Path
    """Where the two checkpoints go."""
    work: Path
    """Where the run keeps its own state until it is done."""
    shorter: float = 1.0
    """Divide every number of steps by this: for trying the program, not for good models."""
    every: int = 500
    """Steps between checkpoints."""
    device: str = "cpu"


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run = Run(
        out=arguments.out,
        work=arguments.work,
        shorter=arguments.shorter,
        every=arguments.every,
        device=arguments.device,
    )
    try:
        train(run, arguments.only or NAMES)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def train(run: Run, names: tuple[str, ...] = NAMES) -> None:
    tokenizer = build_tokenizer(CONTEXT)
    for name in names:
        done = run.work / name / "done.safetensors"
        if not done.exists():
            model = beginning(name, tokenizer, run)
            learn(name, model, tokenizer, run)
            done.parent.mkdir(parents=True, exist_ok=True)
            aside = done.with_suffix(".writing")
            save_file({k: v.clone() for k, v in model.state_dict().items()}, aside)
            aside.rename(done)
        export(finished(name, tokenizer, run), tokenizer, run.out / name)
        print(f"{name}: {run.out / name}", flush=True)


def beginning(name: str, tokenizer: PreTrainedTokenizerFast, run: Run) -> LlamaForCausalLM:
    torch.manual_seed(SCHEDULES[name].seed)
    if name == "nano-s":
        return LlamaForCausalLM(small_config(tokenizer)).to(run.device)
    if not (run.work / "nano-s" / "done.safetensors").exists():
        sys.exit("nano-l grows from nano-s: train that one first (or leave out --only)")
    small = finished("nano-s", tokenizer, run)
    wide = widen(small)
    return deepen(wide, LARGE_LAYERS - len(wide.model.layers)).to(run.device)


def finished(name: str, tokenizer: PreTrainedTokenizerFast, run: Run) -> LlamaForCausalLM:
    model = LlamaForCausalLM(small_config(tokenizer))
    if name == "nano-l":
        model = deepen(widen(model), LARGE_LAYERS - len(model.model.layers))
    model.load_state_dict(load_file(run.work / name / "done.safetensors"))
    return model


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


def learn(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, run: Run) -> None:
    full = SCHEDULES[name]
    schedule = replace(full, steps=max(1, int(full.steps / run.shorter)))
    learner = Learner(model, tokenizer, schedule)
    checkpoint = run.work / name / "checkpoint"
    if learner.resume(checkpoint):
        print(f"{name}: going on from step {learner.step}", flush=True)
    average = None
    for loss in learner.steps():
        average = loss if average is None else 0.98 * average + 0.02 * loss
        if learner.step % run.every == 0 or learner.step == schedule.steps:
            learner.save(checkpoint)
            print(f"{name}: step {learner.step}/{schedule.steps} loss {average:.3f}", flush=True)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A stock checkpoint: fp16 on disk, fp32 when loaded, a tokenizer class every stack knows."""
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    model.to("cpu", torch.float16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _edit(aside / "config.json", dtype="float32")
    _edit(aside / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _put(aside, folder)


def _edit(path: Path, **values: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def _put(aside: Path, folder: Path) -> None:
    """File by file, so that a card that lies in the folder stays there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():
        file.replace(folder / file.name)
    aside.rmdir()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pliant.nano.train",
        description="Train nano-s, then grow nano-l from it.",
        epilog="example: python -m pliant.nano.train --out weights --work runs/nano --threads 2",
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the checkpoints go")
    parser.add_argument("--work", type=Path, default=Path("runs/nano"), help="the run's own state")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="one of the two models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--shorter", type=float, default=1.0, help="divide the steps, to try it")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
