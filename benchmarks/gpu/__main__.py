"""The command line of the GPU benchmark: see the package."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "xxhash")


def main() -> int:
    options = _options()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)} (python -m pip install {' '.join(missing)})")
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Fragments of freed contenders would make the next one run out of memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from benchmarks.gpu.process import run_waiting
    from benchmarks.gpu.rows import rows_of
    from benchmarks.gpu.runner import Run

    rows = rows_of(dry=options.dry_run, model=options.model)
    device = options.device or ("cpu" if options.dry_run else "cuda")
    if options.row:
        return run_waiting(next(r for r in rows if r.name == options.row), device, options.to)
    if device == "cuda" and not _has_gpu():
        print("no CUDA device: give --dry-run for the same at tiny sizes on this CPU")
        return 2
    isolated = options.isolated or not options.dry_run
    run = Run(options.out, rows, device, minutes=options.minutes, isolated=isolated)
    run.go()
    return 1 if run.failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU, in a minute")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2, for its rows")
    parser.add_argument("--device", help="default: cuda, and cpu for a dry run")
    parser.add_argument(
        "--isolated", action="store_true", help="a process for each row, in a dry run as well"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _has_gpu() -> bool:
    """Without initializing CUDA here: the memory of a context belongs to the rows."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
