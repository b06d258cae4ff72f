"""`pliant export MODEL`: a model with saved gates and new weights as a smaller stock checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pliant.cli import terminal
from pliant.cli.shared_options import DeviceOptions
from pliant.errors import InvalidInput
from pliant.loading.dtypes import Dtype
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.structure import ExportResult


@dataclass(frozen=True, kw_only=True)
class ExportOptions(DeviceOptions):
    model: Annotated[str, Flag(positional=True)]
    """nano-s, nano-l, a folder, or a name on the hub."""
    adapters: tuple[str, ...] = ()
    """A folder of saved gates or new weights, or one that Pruned.save wrote; repeatable. Needed."""
    out: Path | None = None
    """The smaller model's new folder. Needed."""
    stream: bool = False
    """Go from disk to disk, a shard at a time, with one layer in memory. This is the default for a
    model of which two copies do not fit into memory."""
    zeros: bool = False
    """Where a stock checkpoint needs heads or channels that are closed, write weights of zero in
    their place."""
    shard_size: str = "5GB"
    """The largest file of weights, as in 500MB or 5GB."""
    dtype: Dtype = "auto"
    """The weights' type; auto is that of the checkpoint."""
    json: bool = False
    """Print one JSON document."""


def export(options: ExportOptions) -> None:
    """Remove what saved gates close, and write the rest as a stock checkpoint.

    Heads, channels and layers with a gate at 0 are removed; other gates and new weights are
    multiplied in. The checkpoint is reloaded with plain transformers and compared with the gated
    model before it is kept. Interrupted while it streams, the same command goes on.

    Example: pliant export nano-l --adapters pruned --out smaller
    """
    check(options)
    terminal.hide_loading_bars()
    from pliant.structure.exporting.disk_export import fits_into_memory

    with terminal.Stages(lines=3) as report:
        streamed = options.stream or not fits_into_memory(options.model, options.dtype)
        result = (_streamed if streamed else _in_memory)(options, report)
    if options.json:
        terminal.print_json({"model": options.model, "streamed": streamed, **result.as_dict()})
    else:
        terminal.print_text(str(result))


def check(options: ExportOptions) -> None:
    """Refuse what cannot be done before a model is loaded."""
    if options.out is None:
        raise InvalidInput("give --out: the smaller model's new folder")
    if not options.adapters:
        raise InvalidInput("give --adapters: a folder of saved gates")
    for folder in options.adapters:
        if not Path(folder).expanduser().is_dir():
            raise InvalidInput(f"--adapters {folder}: no such folder")
    from pliant.loading import resolve, torch_device

    resolve(options.model)
    torch_device(options.device)
    from pliant.adapters.stock import bytes_of
    from pliant.files import check_new
    from pliant.structure.exporting.disk_export import check_on_disk
    from pliant.structure.exporting.saved import adapter_folders

    check_new(options.out.expanduser())
    bytes_of(options.shard_size)
    adapter_folders(options.adapters)
    if options.stream:
        check_on_disk(options.model)


def _in_memory(options: ExportOptions, report: terminal.Stages) -> ExportResult:
    from pliant.loading import load, not_computed_here
    from pliant.structure import export as write
    from pliant.structure.exporting.saved import load_adapters

    assert options.out is not None
    with not_computed_here():
        model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    load_adapters(model, options.adapters)
    return write(
        model,
        options.out,
        tokenizer,
        zeros=options.zeros,
        max_shard_size=options.shard_size,
        report=report,
    )


def _streamed(options: ExportOptions, report: terminal.Stages) -> ExportResult:
    from pliant.structure import export_from_disk

    assert options.out is not None
    return export_from_disk(
        options.model,
        options.adapters,
        options.out,
        dtype=options.dtype,
        device=options.device,
        zeros=options.zeros,
        max_shard_size=options.shard_size,
        report=report,
    )
