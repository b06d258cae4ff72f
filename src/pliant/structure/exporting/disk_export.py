"""Export a pruned model that is larger than memory: shard by shard, from disk to disk.

    export_from_disk("big-model", ["pruned"], "smaller")

The base and the new weights are read one tensor at a time. Which axes shrink, and how units lie in
them, is found on a few real layers, one of each kind, and then holds for all. An export that was
interrupted goes on with the shards that are missing. The proof runs the live model and the reloaded
one with one layer in memory, and only a proven checkpoint gets its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant import __version__
from pliant.adapters.stock import (
    PROBE,
    SHARD_SIZE,
    bound_of,
    bytes_of,
    difference_of,
    disagreement,
    logits_of,
)
from pliant.anatomy.trial import trial_ids
from pliant.errors import (
    AdapterError,
    InvalidInput,
    ModelNotFound,
    PliantError,
    UnsupportedModel,
)
from pliant.files import check_new, write_file
from pliant.loading import load_config, load_tokenizer, resolve
from pliant.structure.exporting.disk_model import DiskModel, Slot
from pliant.structure.exporting.disk_plan import plan_from_disk
from pliant.structure.exporting.export import (
    RECORD,
    ExportResult,
    Report,
    nothing,
    zeroed_kinds,
)
from pliant.structure.exporting.saved import DiskAdapters, adapter_folders, attach_from_disk
from pliant.structure.exporting.shards import Shards
from pliant.structure.stock.lazy_state import State

UNFINISHED = ".{}.unfinished"
PLAN = "unfinished_export.json"
SCRATCH = "scratch"


def export_from_disk(
    source: str | Path,
    adapters: Sequence[str | Path],
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    zeros: bool = False,
    max_shard_size: str = SHARD_SIZE,
    report: Report | None = None,
) -> ExportResult:
    """Write the model of this name, with the adapters saved in folders, as a stock checkpoint.

    The model is never in memory as a whole. Interrupted, this leaves `.NAME.unfinished` beside the
    new folder, and the same call goes on from there.
    """
    report = report or nothing
    target, limit = Path(folder).expanduser(), bytes_of(max_shard_size)
    check_new(target)
    adapter_folders(adapters)
    check_on_disk(source)
    with _unfinished(target) as work:
        scratch = work / SCRATCH
        report("reading the base", 0, 1)
        base = DiskModel.load(source, scratch / "base", dtype=dtype, device=device)
        saved = attach_from_disk(base, adapters)
        plan = plan_from_disk(base, saved, zeros=zeros)
        skeleton = plan.stock.skeleton()
        skeleton.tie_weights()
        shards = Shards.plan(skeleton, plan.empty, limit)
        probe, live = _probe(base, saved.slots)
        _begin(work, _identity(source, base, saved, shards), report)
        _write(work, shards, plan.stock.state, report)
        _write_rest(work, skeleton, base.model, source)
        report("comparing", 0, 1)
        try:
            difference = _proof(work, base, probe, live, device)
        except PliantError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        zeroed = zeroed_kinds(saved.gates, plan.removed)
        units = plan.removed, zeroed
        result = _result(target, base, skeleton, *units, difference, bound_of(live))
        content = {"pliant": __version__, **result.as_dict()}
        (work / RECORD).write_text(json.dumps(content, indent=2) + "\n")
    report("exported", 1, 1)
    return result


def check_on_disk(source: str | Path) -> None:
    """Refuse a model that cannot be read tensor by tensor, before work begins."""
    place = resolve(source)
    if place.gguf:
        raise InvalidInput(
            f"{place} is a GGUF file, whose weights must be converted in memory: export it without "
            "streaming"
        )
    if place.kind != "hub" and not weight_files(source):
        raise InvalidInput(
            f"{place} has no safetensors files on disk to stream from: export it without streaming"
        )
    if getattr(load_config(source), "quantization_config", None):
        raise UnsupportedModel("the model is quantised: load it in 16 or 32 bits to export it")


def weight_files(source: str | Path) -> list[Path]:
    """The safetensors files of a model in a folder; none of a LoRA, or of one on the hub."""
    place = resolve(source)
    return (
        [] if place.kind in ("hub", "lora") else sorted(Path(place.location).glob("*.safetensors"))
    )


def fits_into_memory(source: str | Path, dtype: str | torch.dtype = "auto") -> bool:
    """Whether two copies of the model do, or whether it cannot be streamed anyway."""
    from accelerate.utils import get_max_memory

    if resolve(source).gguf or not (files := weight_files(source)):
        return True
    size = sum(path.stat().st_size for path in files)
    stored = getattr(load_config(source), "dtype", None) or torch.float32
    wanted = getattr(torch, dtype, stored) if isinstance(dtype, str) else dtype
    return bool(2 * size * wanted.itemsize / stored.itemsize <= get_max_memory()["cpu"])


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` at the end; after an interruption it stays, to go on from."""
    work = target.with_name(UNFINISHED.format(target.name))
    names = {path.name for path in work.iterdir()} if work.is_dir() else set()
    if work.is_file() or (PLAN not in names and names - {SCRATCH}):
        raise InvalidInput(f"{work} is in the way and no unfinished export: move it elsewhere")
    try:
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        yield work
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        work.replace(target)
        (target / PLAN).unlink()
    except KeyboardInterrupt as stop:
        if not (work / PLAN).is_file():
            raise
        raise KeyboardInterrupt(f"{work} has what is finished: the same call goes on") from stop
    except OSError as error:
        why = error.strerror or error
        resume = f"; {work} has what is finished, and the same command goes on from there"
        raise AdapterError(
            f"{target}: cannot be written ({why}){resume if (work / PLAN).is_file() else ''}"
        ) from error
    finally:
        if work.is_dir():
            shutil.rmtree(work / SCRATCH, ignore_errors=True)
            if not any(work.iterdir()):
                work.rmdir()


def _identity(
    source: str | Path, base: DiskModel, saved: DiskAdapters, shards: Shards
) -> dict[str, Any]:
    """What an unfinished export is of: it goes on only if all of this is the same."""
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in weight_files(source)]
    content = [[name, *map(str, stored)] for name, stored in shards.files.items()]
    return {
        "pliant": __version__,
        "model": str(source),
        "revision": getattr(base.model.config, "_commit_hash", None),
        "files": files,
        "adapters": saved.digests,
        "shards": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    }


def _begin(work: Path, identity: dict[str, Any], report: Report) -> None:
    """Go on with the export that is unfinished, if it is the same; else begin anew."""
    path = work / PLAN
    try:
        before = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        before = {}
    if before == identity:
        return
    if before is not None:
        report("beginning anew, for the unfinished export is another one", 0, 1)
        for old in work.iterdir():
            if old.name != SCRATCH:
                old.unlink()
    write_file(path, (json.dumps(identity, indent=2) + "\n").encode())


@torch.no_grad()
def _write(work: Path, shards: Shards, state: State, report: Report) -> None:
    total, missing = len(shards.files), shards.missing(work)
    for number, name in enumerate(missing, start=total - len(missing)):
        report("writing shards", number, total)
        shards.write(work, name, state)
    report("writing shards", total, total)
    shards.write_index(work)


def _write_rest(work: Path, skeleton: Any, base: Any, source: str | Path) -> None:
    """Configs, tokenizer and chat template."""
    skeleton.config.dtype = str(base.dtype).removeprefix("torch.")
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(work)
    if skeleton.can_generate():
        base.generation_config.save_pretrained(work)
    with suppress(ModelNotFound):  # a model may come without one
        load_tokenizer(source).save_pretrained(work)


# --- the proof -----------------------------------------------------------------------------------


def _probe(base: DiskModel, slots: Sequence[tuple[int, Slot]]) -> tuple[Tensor, Tensor]:
    """A few tokens, and the logits of the live model for them."""
    probe = trial_ids(base.anatomy, PROBE, base.device)
    return probe, _run(base, probe, slots)


def _proof(work: Path, base: DiskModel, probe: Tensor, live: Tensor, device: str | None) -> float:
    """Reload with plain transformers; raise unless it agrees with the live model."""
    dtype = base.model.dtype
    again = DiskModel.load(work, work / SCRATCH / "again", dtype=dtype, device=device)
    difference = difference_of(_run(again, probe), live)
    if difference > bound_of(live):
        raise disagreement(again.model, difference, live)
    return difference


def _run(model: DiskModel, probe: Tensor, slots: Sequence[tuple[int, Slot]] = ()) -> Tensor:
    with model.running(slots) as running:
        return logits_of(running, probe)


def _result(
    target: Path,
    base: DiskModel,
    skeleton: Any,
    removed: dict[str, int],
    zeroed: dict[str, int],
    difference: float,
    bound: float,
) -> ExportResult:
    return ExportResult(
        folder=str(target),
        architecture=type(skeleton).__name__,
        removed=removed,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        parameters_before=base.parameters,
        difference=difference,
        bound=bound,
        dtype=str(base.model.dtype).removeprefix("torch."),
        zeroed=zeroed,
    )
