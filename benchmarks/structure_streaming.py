"""The memory of an export, in memory and from disk.

    python -m benchmarks.structure_streaming [--layers 8]

A random Llama (hidden 1,024; 63 MB a layer in fp32) of which a quarter of the channels is closed,
with new weights for every down projection, is exported twice, each time in a process of its own.
Beside it: a process that only imports Pliant. The memory of a process is what it allocates (its
anonymous pages, sampled every few milliseconds). The pages of files that it maps come on top of
that, and the system takes them back when it needs them: `peak with files` has both.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import keep
from pliant.reports.tables import Table

WAYS = ("imports alone", "in memory", "from disk")
HIDDEN, CHANNELS, CLOSED = 1_024, 4_096, 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--way", choices=["make", *WAYS])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.way is not None:
        with peak() as figures:
            began = time.process_time()
            run(options.way, options.folder, options.layers)
            figures["seconds"] = time.process_time() - began
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        in_a_process("make", folder, options.layers)
        figures = {way: in_a_process(way, folder, options.layers) for way in WAYS}
        figures["checkpoint, MB"] = size_of(folder / "base")
        figures["new weights, MB"] = size_of(folder / "pruned" / "compensation")
        figures["equal"] = same(folder)
    table(figures).draw(Console())
    keep("structure_streaming", figures, "python -m benchmarks.structure_streaming")


def in_a_process(way: str, folder: Path, layers: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.structure_streaming"]
    command += ["--way", way, "--folder", str(folder), "--layers", str(layers)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def run(way: str, folder: Path, layers: int) -> None:
    from pliant import structure
    from pliant.loading import load_model
    from pliant.structure.exporting.saved import load_adapters
    from pliant.structure.pruning import compensation

    if way == "make":
        torch.manual_seed(0)
        model = LlamaForCausalLM(config(layers))
        gates = structure.attach(model, structure.GateConfig(("channels",)))
        new = compensation.attach(model, gates.sites)
        with torch.no_grad():
            for number, weight in enumerate(new.parameters()):
                gates["channels", number][-CLOSED:] = 0
                weight.mul_(1.1)
        model.save_pretrained(folder / "base", max_shard_size="100MB")
        gates.save_pretrained(folder / "pruned" / "gates")
        new.save_pretrained(folder / "pruned" / "compensation")
    elif way == "in memory":
        live = load_model(folder / "base")
        load_adapters(live, [folder / "pruned"])
        structure.export(live, folder / "memory", max_shard_size="100MB")
    elif way == "from disk":
        structure.export_from_disk(
            folder / "base", [folder / "pruned"], folder / "disk", max_shard_size="100MB"
        )


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4_000,
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """The largest memory of this process while the block runs, in MB."""
    figures = {"peak": 0.0, "peak with files": 0.0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.003):
            status = Path("/proc/self/status").read_text()
            for name, line in (("peak", "RssAnon"), ("peak with files", "VmRSS")):
                kilobytes = re.search(rf"{line}:\s+(\d+)", status)
                assert kilobytes is not None
                figures[name] = max(figures[name], int(kilobytes[1]) / 1e3)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield figures
    finally:
        stop.set()
        thread.join()


def same(folder: Path) -> bool:
    from safetensors.torch import load_file

    ours, theirs = (
        {k: t for file in (folder / name).glob("*.safetensors") for k, t in load_file(file).items()}
        for name in ("disk", "memory")
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def table(figures: dict[str, Any]) -> Table:
    idle = figures[WAYS[0]]["peak"]
    rows = []
    for way in WAYS:
        own = figures[way]
        numbers = (own["peak"] - idle, own["peak with files"], own["seconds"])
        rows.append([way, *(f"{number:,.0f}" for number in numbers)])
    title = f"exports of a checkpoint of {figures['checkpoint, MB']:,.0f} MB"
    head = ["way", "MB above imports", "MB with files and imports", "CPU seconds"]
    return Table(title, head, rows, right=frozenset(head[1:]))


if __name__ == "__main__":
    main()
