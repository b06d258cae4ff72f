"""The base class of everything that Pliant attaches to a model.

A subclass creates its parameters in the constructor, which changes nothing in the model, and lists
in `wire` the modules that they act on. Everything else is here: attach, disable, detach, save,
load, push.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from pliant.adapters import files, saving
from pliant.adapters.fingerprint import Fingerprint, fingerprint
from pliant.adapters.hooks import Connection, Wire, switch_off, switch_on
from pliant.anatomy import Anatomy
from pliant.anatomy.find import unwrap
from pliant.errors import AdapterError, InvalidInput

BRANCH = "pliant"  # an adapter is registered as model.pliant.<name>


class Adapter(nn.Module, ModelHubMixin, library_name="pliant"):
    """A small module that is trained beside a model and saved without it.

    Its saved state is its parameters, its persistent buffers, and the JSON values of torch's
    `get_extra_state` and `set_extra_state` if it overrides them.
    """

    part: ClassVar[str]
    """The part of Pliant that it belongs to."""
    default_name: ClassVar[str] = ""
    """The name under which it is attached unless another is given; if empty, its part's."""
    config_class: ClassVar[type]
    """The frozen dataclass of its settings."""
    why_no_export: ClassVar[str] = ""
    """Why no stock checkpoint can contain what it does, for an export to raise; else empty."""
    retired_tensors: ClassVar[str] = ""
    """A pattern of names of tensors that earlier versions saved, and that are left out."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.config = config
        self._link: _Link | None = None
        self._fingerprint: Fingerprint | None = None

    def wire(self, model: nn.Module) -> Iterable[Wire]:
        """The hooks to set: `Before`, `After` or `Around` modules of the model."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The model that it is attached to, unwrapped."""
        return self._attached.model

    @property
    def anatomy(self) -> Anatomy:
        """The parts of that model, identified once."""
        return self._attached.anatomy

    @property
    def _attached(self) -> _Link:
        if self._link is None:
            raise AdapterError(f"this {type(self).__name__} is not attached to a model")
        return self._link

    @property
    def name(self) -> str:
        """The name under which it is attached; empty while it is detached."""
        return self._link.name if self._link else ""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable it in this thread for the duration of the block.

        Gradient checkpointing runs layers again in the backward pass, so call `backward` inside the
        block as well. That works on the CPU alone: an accelerator runs the backward pass in a
        thread of its own, where the adapter is active.
        """
        switch_off(self)
        try:
            yield
        finally:
            switch_on(self)

    def detach(self) -> None:
        """Restore the model to its state before `attach`; the adapter keeps its parameters."""
        base, name = self.base, self.name
        self._fingerprint = self.fingerprint()
        assert self._link is not None
        for connection in reversed(self._link.connections):
            connection.remove()
        self._link = None
        branch = base._modules[BRANCH]
        assert branch is not None
        del branch._modules[name]
        if not branch._modules:
            del base._modules[BRANCH]

    def in_place(self) -> bool:
        """Whether the modules that it acts on are still where they were found."""
        places = self._attached.places
        return all(parent._modules.get(name) is module for parent, name, module in places)

    def rewire(self) -> None:
        """Set its hooks anew, after modules were replaced: wrapped by a LoRA, or unwrapped."""
        link = self._attached
        vars(link).pop("anatomy", None)
        wires = list(self.wire(link.model))  # if this raises, the old hooks stay
        for connection in reversed(link.connections):
            connection.remove()
        link.connections.clear()
        link.places = _places(link.model, wires)
        for wire in wires:
            link.connections.append(wire.connect(self))

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of its base, as of now or as of `detach`.

        A base that was sharded after `attach` can no longer be sampled: its shapes are those seen
        at `attach`, and so are its values if it is frozen.
        """
        before = self._fingerprint
        if before is None:
            raise AdapterError(f"this {type(self).__name__} was never attached: it has no base yet")
        if self._link is None:
            return before
        now = fingerprint(self.base)
        if now.samples or now.why == before.why:
            return now
        branch = self.base._modules[BRANCH]
        assert branch is not None
        adapters = {id(p) for p in branch.parameters()}
        frozen = not any(p.requires_grad for p in self.base.parameters() if id(p) not in adapters)
        return before if frozen else replace(before, samples={}, why=now.why)

    def __str__(self) -> str:
        """One line: what it is, where it is attached, how many parameters it has, and `summary`."""
        base = f"attached to {type(self.base).__name__} as {self.name!r}" if self.name else ""
        size = sum(p.numel() for p in self.parameters())
        facts = ", ".join([base or "detached", *([f"{size:,} parameters"] if size else [])])
        return f"{type(self).__name__} ({facts}): {self.summary()}"

    def summary(self) -> str:
        """What it does, for `print`; here the settings that are not the defaults."""
        defaults = {f.name: f.default for f in fields(self.config)}
        changed = {k: v for k, v in vars(self.config).items() if v != defaults.get(k)}
        return ", ".join(f"{k} = {v!r}" for k, v in changed.items()) or "default settings"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copied with its model, it is attached to the copy; copied alone, it is detached."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = dict(vars(self))
        if self._link is not None and id(self._link.model) not in memo:
            state["_link"] = None
        vars(new).update(copy.deepcopy(state, memo))
        return new

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **push: Any
    ) -> str | None:
        """Write `pliant.json`, the weights and a model card; if this fails, an older save stays."""
        saving.save(self, Path(save_directory))
        repo_id = push.pop("repo_id", Path(save_directory).name)
        return self.push_to_hub(repo_id, **push) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Save to a repository on the hub, and replace the adapter that it holds."""
        push.setdefault("delete_patterns", files.WEIGHTS)
        push.setdefault("commit_message", f"{type(self).__name__}, trained with Pliant")
        return super().push_to_hub(repo_id, **push)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        source: str | Path,
        *,
        name: str | None = None,
        insist: bool = False,
        **hub: Any,
    ) -> Self:
        """Load an adapter from a folder or a hub repository and attach it to `model`.

        An error leaves `model` unchanged. If `model` is not the base that the adapter was trained
        on, this raises `WrongBase`, unless `insist` is set. `hub` (`revision`, `token`,
        `cache_dir`, ...) goes to `huggingface_hub.snapshot_download`.
        """
        return attach(model, saving.load(cls, model, source, insist, **hub), name)

    def restore(self, source: str | Path, *, insist: bool = False, **hub: Any) -> None:
        """Load the saved state of an adapter with the same configuration, in place."""
        saving.load_state(self, saving.read_matching(self, source, insist, **hub))


A = TypeVar("A", bound=Adapter)


def attach(model: nn.Module, adapter: A, name: str | None = None) -> A:
    """Attach `adapter` to `model` under a name, and return it.

    It is registered as `model.pliant.<name>` of the unwrapped model. Optimizers, DDP and
    `.to(device)` include it; the model's `state_dict` and changes of the model's dtype do not.
    Freezing the whole model freezes it as well, so call `get_peft_model` before. Attach before the
    first run under torch.compile, which does not notice hooks that are added later.
    """
    model = unwrap(model)
    name = (adapter.default_name or adapter.part) if name is None else name
    if adapter._link is not None:
        raise AdapterError(f"this {type(adapter).__name__} is already attached, as {adapter.name}")
    _check_name(model, name)
    adapter._fingerprint = fingerprint(model)
    adapter._link = _Link(model, name, saving.tensor_shapes(adapter.state_dict()))
    adapter.train(model.training)
    branch = model._modules.setdefault(BRANCH, Branch())
    assert branch is not None
    branch._modules[name] = adapter
    try:
        wires = list(adapter.wire(model))
        adapter._link.places = _places(model, wires)
        for wire in wires:
            adapter._link.connections.append(wire.connect(adapter))
    except BaseException:
        adapter.detach()
        raise
    return adapter


def attached(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of `model`, wrapped or not, by name."""
    for module in model.modules():
        if isinstance(module, Branch):
            return {k: v for k, v in module._modules.items() if isinstance(v, Adapter)}
    return {}


@dataclass
class _Link:
    """The model that an adapter is attached to, outside the adapter's own module tree."""

    model: nn.Module
    name: str
    shapes: dict[str, torch.Size]
    connections: list[Connection] = field(default_factory=list)
    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """The modules that it acts on, each with its parent and its name there."""

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of(self.model)


def _places(model: nn.Module, wires: Iterable[Wire]) -> list[tuple[nn.Module, str, nn.Module]]:
    acted_on = {id(m) for wire in wires for m in vars(wire).values() if isinstance(m, nn.Module)}
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in acted_on and not isinstance(parent, Branch)
    ]


class Branch(nn.Module):
    """The module that holds a model's adapters: trained and moved with the model, but hidden from
    its `state_dict`, which stays that of the stock checkpoint."""

    hidden_from_state_dict = True

    def __init__(self) -> None:
        super().__init__()
        self._prefix = ""
        self.register_load_state_dict_post_hook(_forget_missing)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Empty: each adapter has a `state_dict` of its own."""
        return OrderedDict() if destination is None else destination

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._prefix = prefix

    def __deepcopy__(self, memo: dict[int, Any]) -> Branch:
        """Attach the copies of adapters that were copied before their model."""
        new = Branch.__new__(Branch)
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        for name, adapter in self._modules.items():
            copied = new._modules[name]
            assert isinstance(adapter, Adapter) and isinstance(copied, Adapter)
            if copied._link is None and adapter._link and id(adapter._link.model) in memo:
                copied._link = copy.deepcopy(adapter._link, memo)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a change of device, but not of dtype: `model.half()` would round parameters that
        are trained in fp32 for a reason. (`adapter.half()` still converts them.)"""

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_dtype, recurse)


def _forget_missing(branch: Branch, incompatible: Any) -> None:
    """A stock checkpoint has no keys for the adapters, and that is no fault of it."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.startswith(branch._prefix)]


def _check_name(model: nn.Module, name: str) -> None:
    branch = getattr(model, BRANCH, None)
    if branch is not None and not isinstance(branch, Branch):
        raise AdapterError(
            f"{type(model).__name__} has an attribute {BRANCH!r} of its own, where adapters would "
            "be registered"
        )
    names = list(branch._modules) if branch is not None else []
    if name in names:
        raise AdapterError(f"the name {name!r} is taken (attached: {', '.join(names)}): pass name=")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InvalidInput(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'")
