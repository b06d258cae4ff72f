"""`pliant importance MODEL`: which heads, channels, experts and layers of a model matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.shared_options import DeviceOptions, RowOptions
from pliant.cli.training_text import calibration_rows, default_data, fitting_length
from pliant.errors import InvalidInput
from pliant.files import SVG, check_ours, write_file
from pliant.loading.dtypes import Dtype
from pliant.options import Flag
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.structure import Importance, ImportanceConfig

Kind = Literal[
    "heads",
    "channels",
    "experts",
    "layers",
    "attention",
    "mlp",
    "expert_channels",
    "recurrent_heads",
]
Score = Literal[
    "fisher",
    "taylor",
    "activation",
    "relative_activation",
    "leave_one_out",
    "entropy",
    "block_influence",
    "frequency",
    "magnitude",
    "random",
]


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions(RowOptions, DeviceOptions):
    model: Annotated[str, Flag(positional=True)]
    """nano-s, nano-l, a folder, or a name on the hub."""
    data: str | None = None
    """Calibration text (.txt); rows with text, prompt and completion, or messages, of Alpaca or
    ShareGPT (.jsonl, ...); a hub data set (name:split); or nano: questions of the embedded models'
    world. Default: nano, for nano models."""
    units: tuple[Kind, ...] = ()
    """What is scored; repeatable. Default: heads."""
    score: Score = "fisher"
    """How. entropy is for heads, block_influence for layers, frequency for experts."""
    tokens: Annotated[int, Ge(1)] = 8192
    """How much calibration text is read, in tokens."""
    length: Annotated[int, Ge(2)] = 256
    """The longest piece of text, in tokens."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Pieces of text per batch."""
    seed: Annotated[int, Ge(0)] = 0
    """For the score random."""
    out: Path | None = None
    """Write all scores to this file (.json). Default: none."""
    picture: Path | None = None
    """Write a heat map to this file (.svg). Default: none."""
    resume: Path | None = None
    """For leave_one_out: note each unit in this file (.jsonl), and go on from what it holds.
    Default: start anew, and note nothing."""
    dtype: Dtype = "float32"
    """The weights' type."""
    json: bool = False
    """Print one JSON document."""

    def config(self) -> ImportanceConfig:
        from pliant.structure import ImportanceConfig

        return ImportanceConfig(self.units or ("heads",), self.score, self.seed)


def importance(options: ImportanceOptions) -> None:
    """Score every head, channel, expert or layer of a model: the higher, the more it matters.

    Gradients of gates (fisher, taylor) need one forward and one backward pass over the text,
    leave_one_out a forward pass for each unit. The model is not changed.

    Example: pliant importance nano-s --units heads --units layers --picture heads.svg
    """
    check_files(options)
    config = options.config()
    rows = calibration(options)
    terminal.hide_loading_bars()
    from pliant.loading import load

    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    scores = measured(options, config, model, tokenizer, rows)
    content = {"model": options.model, "data": data_of(options), **scores.as_dict()}
    if options.out is not None:
        write_file(options.out, f"{json.dumps(content, allow_nan=False)}\n".encode())
    if options.picture is not None:
        write_file(options.picture, heat_map(scores).encode())
    if options.json:
        terminal.print_json(content)
    else:
        terminal.draw(tables(scores), [f"{options.model}: {scores}"])


def measured(
    options: ImportanceOptions,
    config: ImportanceConfig,
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
) -> Importance:
    """The scores, with a progress bar for what takes a while."""
    from pliant.structure import calibration_batches, importance

    batches = (
        calibration_batches(
            rows,
            tokenizer,
            tokens=options.tokens,
            length=fitting_length(options.length, model.config),
            rows=options.batch_size,
        )
        if rows
        else []
    )
    with terminal.Bar(options.score) as bar:
        return importance(model, batches, config, progress=bar, resume=options.resume)


# --- inputs --------------------------------------------------------------------------------------


def check_files(options: ImportanceOptions) -> None:
    """Refuse what cannot be written before the work begins."""
    for flag, path, ending, starts in (
        ("--out", options.out, ".json", (b'{"model":',)),
        ("--picture", options.picture, ".svg", SVG),
        ("--resume", options.resume, ".jsonl", (b"",)),
    ):
        if path is None:
            continue
        if path.suffix != ending:
            raise InvalidInput(f"{flag} {path}: name a {ending} file")
        if path.is_dir():
            raise InvalidInput(f"{flag} {path} is a folder")
        check_ours(path, *starts)
        path.parent.mkdir(parents=True, exist_ok=True)


def data_of(options: ImportanceOptions) -> str | None:
    """The calibration text by name; None if the score needs none."""
    if options.score in ("magnitude", "random"):
        return None
    return options.data or default_data(options.model)


def calibration(options: ImportanceOptions) -> list[dict[str, Any]]:
    data = data_of(options)
    if data is None and options.score in ("magnitude", "random"):
        return []
    return calibration_rows(data, options.tokens, options)


# --- output --------------------------------------------------------------------------------------


def tables(scores: Importance) -> Iterator[Table]:
    """For each kind a row for each layer: its mean, and its lowest and highest unit."""
    for kind, sites in scores.units.items():
        single = all(len(values) == 1 for values in sites.values())
        if single:
            head = ["layer", scores.score]
            rows = [[_layer(key), f"{float(values):.3g}"] for key, values in sites.items()]
        else:
            head = ["layer", "units", "mean", "lowest", "highest"]
            rows = [_row(key, values) for key, values in sites.items()]
        right = frozenset(head) - {"layer"}
        yield Table(f"{kind} by {scores.score}", head, rows, right=right)


def _row(key: str, values: Any) -> list[str]:
    low, high = int(values.argmin()), int(values.argmax())
    ends = [f"{values[i]:.3g} (unit {i})" for i in (low, high)]
    return [_layer(key), f"{len(values):,}", f"{values.mean():.3g}", *ends]


def _layer(key: str) -> str:
    layer, _, block = key.partition("_")
    return f"{layer}, block {block}" if block else layer


def heat_map(scores: Importance) -> str:
    """One map for each kind: a row for each layer, a cell for each unit."""
    from pliant.reports import plots

    maps = {
        str(kind): {_layer(key): values.tolist() for key, values in sites.items()}
        for kind, sites in scores.units.items()
    }
    return plots.heat_maps(maps, "layer", scores.score)
