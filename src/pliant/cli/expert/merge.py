"""`pliant expert merge EXPERT`: an expert and its base as one stock model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pliant.cli import terminal
from pliant.cli.shared_options import DeviceOptions
from pliant.errors import InvalidInput
from pliant.loading.dtypes import Dtype
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.experts.expert import Expert


@dataclass(frozen=True, kw_only=True)
class LeavingOptions(DeviceOptions):
    expert: Annotated[str, Flag(positional=True)]
    """An expert's folder."""
    base: str | None = None
    """Its base: nano-s, a folder, or a name on the hub. Default: the one that it names."""
    out: Path | None = None
    """The new folder. Needed."""
    dtype: Dtype = "auto"
    """The weights' type; auto is that of the base."""
    json: bool = False
    """Print one JSON document."""

    def loaded(self) -> tuple[Any, Any]:
        """The expert on its base, and the base's tokenizer, after all else was checked."""
        from pliant.experts.expert import Expert
        from pliant.experts.export import on_its_base
        from pliant.files import check_new
        from pliant.loading import resolve, torch_device

        assert self.out is not None
        check_new(self.out.expanduser())
        expert: Expert = Expert.load(self.expert)
        if self.base is not None:
            resolve(self.base)
        torch_device(self.device)
        terminal.hide_loading_bars()
        return on_its_base(expert, self.base, dtype=self.dtype, device=self.device)

    def check_out(self) -> None:
        if self.out is None:
            raise InvalidInput("give --out: the new folder")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(LeavingOptions):
    shard_size: str = "5GB"
    """The largest file of weights, as in 500MB or 5GB."""


def merge(options: MergeOptions) -> None:
    """Write an expert and its base as one stock model, which needs neither Pliant nor PEFT.

    The model is reloaded with plain transformers and compared with the live one before it is kept.

    Example: pliant expert merge math --base nano-s --out math-model
    """
    options.check_out()
    model, tokenizer = options.loaded()
    from pliant.experts.export import merge as write

    assert options.out is not None
    result = write(model, options.out, tokenizer, max_shard_size=options.shard_size)
    if options.json:
        terminal.print_json({"expert": options.expert, **result.as_dict()})
    else:
        terminal.print_text(str(result))
