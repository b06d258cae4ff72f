"""Times and peak memory of several contenders in one process, relative to a control."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.rows import Keep
from benchmarks.harness import interleaved

Run = Callable[[], Any]


def contest(
    runs: Mapping[str, Run],
    control: str,
    rounds: int,
    device: str,
    keep: Keep,
    *,
    warmup: int = 2,
) -> None:
    """Keep each contender's seconds, how many times as fast as the control it is (the median of
    paired rounds), and its peak memory. One that does not run is told with its reason."""
    peaks: dict[str, int | None] = {}
    for name, run in runs.items():
        try:
            run()  # libraries allocate their workspaces, and compilers compile
            peaks[name] = peak_bytes(run, device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            keep(name, {"error": " ".join(str(error).split())[:300]})
            if name == control:
                raise
        release()
    usable = {name: runs[name] for name in peaks}
    times = interleaved(usable, rounds=rounds, warmup=warmup)
    for name in usable:
        keep(
            name,
            {
                "seconds": times[name].median,
                f"times as fast as {control}": times[control].ratio_to(times[name]).as_dict(),
                "peak bytes": peaks[name],
                "memory of the control": ratio(peaks[name], peaks[control]),
            },
        )


def peak_bytes(run: Run, device: str) -> int | None:
    """What a run adds at its peak, on CUDA, where it ran before."""
    if device != "cuda":
        return None
    release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ratio(ours: int | None, control: int | None) -> float | None:
    return ours / control if ours is not None and control else None


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
