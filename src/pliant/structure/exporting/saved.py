"""Saved gates and new weights, put on a model again: in memory, or on one that stays on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from pliant import adapters
from pliant.adapters import Adapter
from pliant.adapters.files import INDEX, Index, check_finite, open_weights
from pliant.adapters.fingerprint import fingerprint, with_values
from pliant.errors import AdapterError, CorruptFile, InvalidInput, UnsupportedModel, WrongBase
from pliant.structure.config import Kind
from pliant.structure.exporting.disk_model import DiskModel, Slot
from pliant.structure.gates import Gates
from pliant.structure.pruning.compensation import Compensation, CompensationConfig


def adapter_folders(folders: Sequence[str | Path]) -> list[Path]:
    """The folder of each saved adapter: those given, or the ones inside them.

    `Pruned.save` writes such a folder, with gates and new weights.
    """
    own: list[Path] = []
    for each in folders:
        folder = Path(each).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"{each}: no such folder")
        inside = sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
        if not (folder / INDEX).is_file() and not inside:
            raise AdapterError(f"{each}: holds no saved adapter (looked for {INDEX})")
        own += [folder] if (folder / INDEX).is_file() else inside
    if not own:
        raise InvalidInput("no adapters: name the folder of saved gates")
    return own


def load_adapters(model: nn.Module, folders: Sequence[str | Path]) -> list[Adapter]:
    """Attach all adapters in these folders; after an error none is attached."""
    loaded: list[Adapter] = []
    try:
        for number, folder in enumerate(adapter_folders(folders)):
            loaded.append(Adapter.from_pretrained(model, folder, name=_name(number)))
    except BaseException:
        for adapter in reversed(loaded):
            adapter.detach()
        raise
    return loaded


@dataclass(frozen=True, eq=False)
class DiskAdapters:
    """Gates, and new weights that are read from their file when they are needed."""

    gates: list[Gates]
    compensation: Compensation | None
    weights: Path | None
    """The file of the new weights."""
    digests: list[str]
    """Of the content of each adapter."""

    @property
    def slots(self) -> list[tuple[int, Slot]]:
        """The places of the new weights, by layer."""
        if self.compensation is None:
            return []
        holder = self.compensation.weights
        return [
            (site.layer, Slot(holder, _slot(site.kind, site.key), self.read(site.kind, site.key)))
            for site in self.compensation.sites
        ]

    def read(self, kind: Kind, key: str) -> Callable[[], Tensor]:
        assert self.weights is not None
        return partial(_read, self.weights, f"weights.{_slot(kind, key)}")

    def weight(self, kind: Kind, key: str) -> Tensor:
        return self.read(kind, key)()


def attach_from_disk(base: DiskModel, folders: Sequence[str | Path]) -> DiskAdapters:
    """Attach these adapters to a model on disk, after comparing it with their base."""
    gates: list[Gates] = []
    compensation: Compensation | None = None
    weights: Path | None = None
    digests: list[str] = []
    for number, folder in enumerate(adapter_folders(folders)):
        index, path = open_weights(folder)
        _check_base(base, index, folder)
        digests.append(index.sha256)
        if (index.part, index.kind) == (Gates.part, Gates.__name__):
            own = Gates.from_pretrained(base.model, folder, name=_name(number))
            gates.append(own.to(base.device))
        elif (index.part, index.kind) == (Compensation.part, Compensation.__name__):
            if compensation is not None:
                raise InvalidInput("two adapters hold new weights: give one of them")
            compensation, weights = _without_weights(base, index, path), path
            adapters.attach(base.model, compensation, _name(number))
        else:
            raise UnsupportedModel(
                f"{folder}: holds a {index.kind} of pliant.{index.part}, and gates and new weights "
                "alone can be exported from disk"
            )
    return DiskAdapters(gates, compensation, weights, digests)


def _without_weights(base: DiskModel, index: Index, path: Path) -> Compensation:
    """New weights of the right shapes, without values."""
    sites = index.config.get("sites", ())
    adapter = Compensation(base.model, CompensationConfig(tuple(map(tuple, sites))))
    expected = {name: list(tensor.shape) for name, tensor in adapter.state_dict().items()}
    with safe_open(path, "pt") as file:
        names = file.keys()
        stored = {name: list(file.get_slice(name).get_shape()) for name in names}
    if stored != expected:
        odd = sorted(stored.keys() ^ expected.keys()) or ["shapes"]
        raise CorruptFile(f"{path}: holds other weights than its index says ({odd[0]})")
    return adapter


def _check_base(base: DiskModel, index: Index, folder: Path) -> None:
    """As for a model in memory: by its shapes and a few values."""
    here, trained_on = fingerprint(base.model), index.base
    differences = trained_on.differences(here)
    if not differences:
        here = with_values(here, ((name, base.read(name)) for name in trained_on.samples))
        differences = trained_on.differences(here)
    if differences:
        raise WrongBase(
            f"{folder}: was made on another base than this one ({trained_on.name or 'a'} "
            f"{trained_on.model}): {differences}. Export it with its own base"
        )


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    check_finite(tensor, name, path)
    return tensor


def _slot(kind: Kind, key: str) -> str:
    return f"{kind}_{key}"


def _name(number: int) -> str:
    return f"saved-{number}"
