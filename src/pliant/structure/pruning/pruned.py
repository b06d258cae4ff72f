"""A pruned model: the adapters that prune it, in one folder or on the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from pliant.adapters import Adapter
from pliant.adapters.files import first_fault
from pliant.errors import AdapterError, CorruptFile
from pliant.files import check_new, new_folder
from pliant.structure.config import PruneConfig
from pliant.structure.gates import Gates
from pliant.structure.pruning.close_experts import ClosedExperts
from pliant.structure.pruning.compensation import Compensation
from pliant.structure.pruning.remaining_experts import RemainingExperts
from pliant.structure.ranking.measures import Score

SAVED = "pruned.json"
NOTES = "notes.json"


@dataclass(frozen=True, eq=False)
class Pruned:
    """The adapters that prune a model, and what was measured on the way."""

    config: PruneConfig
    gates: Gates
    compensation: Compensation | None
    experts: ClosedExperts | None
    removed: dict[str, dict[str, tuple[int, ...]]]
    """Units by kind and site, in the order of removal."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each projection the squared error of its output on the calibration text, relative to the
    output; with compensation as the text was fitted, so it is a little too good."""

    @property
    def adapters(self) -> list[Adapter]:
        """All that prune the model, in the order of attaching."""
        experts = None if self.experts is None else self.experts.adapter
        return [a for a in (self.gates, experts, self.compensation) if a is not None]

    def detach(self) -> None:
        for adapter in reversed(self.adapters):
            adapter.detach()

    def save(self, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write gates and new weights to a new folder, for `load` and `pliant export`.

        All of it or nothing: gates alone would be another model. `notes` are written beside it.
        """
        target = Path(folder).expanduser()
        check_new(target)
        with new_folder(target) as unfinished:
            self.gates.save_pretrained(unfinished / "gates")
            if self.compensation is not None:
                self.compensation.save_pretrained(unfinished / "compensation")
            if self.experts is not None:
                self.experts.adapter.save_pretrained(unfinished / "experts")
            if notes is not None:
                (unfinished / NOTES).write_text(json.dumps(notes, indent=2) + "\n")
            (unfinished / SAVED).write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> Pruned:
        """Attach what `save` wrote; an error leaves `model` as it was."""
        folder = Path(folder).expanduser()
        saved = _read_saved(folder / SAVED)
        gates = Gates.from_pretrained(model, folder / "gates")
        pruned = cls(saved.config, gates, None, None, saved.removed, saved.errors)
        try:
            if (folder / "compensation").is_dir():
                own = Compensation.from_pretrained(
                    model, folder / "compensation", name="compensation"
                )
                pruned = replace(pruned, compensation=own)
            if (folder / "experts").is_dir():
                closed = RemainingExperts.from_pretrained(model, folder / "experts")
                pruned = replace(
                    pruned, experts=ClosedExperts.of(closed, expert_score(saved.config))
                )
        except BaseException:
            pruned.detach()
            raise
        return pruned

    def as_dict(self) -> dict[str, Any]:
        removed = {k: {s: list(u) for s, u in sites.items()} for k, sites in self.removed.items()}
        return {"removed": removed, "errors": self.errors, "config": asdict(self.config)}

    def __str__(self) -> str:
        parts = [
            f"{sum(map(len, sites.values())):,} {kind}" for kind, sites in self.removed.items()
        ]
        how = "compensated" if self.compensation is not None else "not compensated"
        return f"{' and '.join(parts)} pruned, {how}"


def expert_score(config: PruneConfig) -> Score:
    """How experts are ranked: nothing is known of how well others make up for one."""
    if config.score == "error" or config.score == "activation":
        return "relative_activation"
    return config.score


@dataclass(frozen=True)
class _Saved:
    """What `Pruned.as_dict` gave."""

    config: PruneConfig
    removed: dict[str, dict[str, tuple[int, ...]]]
    errors: dict[str, dict[str, float]]


def _read_saved(path: Path) -> _Saved:
    from pydantic import TypeAdapter, ValidationError  # not needed to prune

    try:
        return TypeAdapter(_Saved).validate_python(json.loads(path.read_bytes()))
    except OSError as error:
        raise AdapterError(f"{path.parent}: no saved pruning (it has no {SAVED})") from error
    except ValidationError as error:
        raise CorruptFile(f"{path}: damaged ({first_fault(error)})") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: damaged ({error})") from error
