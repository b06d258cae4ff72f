"""The life that every add-on shares: attach, switch off, detach, save, load, push.

A part subclasses `Adapter`: the constructor makes the parameters (it looks at the model and changes
nothing), and `wire` says where they act. All else is here, the same for every part.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from pliant.adapters import files, saving
from pliant.adapters.fingerprint import Fingerprint, fingerprint
from pliant.adapters.wires import Connection, Wire, switch_off, switch_on
from pliant.anatomy.unwrap import unwrap
from pliant.errors import AdapterError, InvalidInput

BRANCH = "pliant"  # what is attached is registered as model.pliant.<name>


class Adapter(nn.Module, ModelHubMixin, library_name="pliant"):
    """Something small that is trained beside a model and saved without it.

    What it keeps are its parameters, its persistent buffers, and, if it overrides torch's
    `get_extra_state` and `set_extra_state`, whatever JSON can hold.
    """

    part: ClassVar[str]
    """The part of Pliant that it belongs to: the default name of what is attached."""
    config_class: ClassVar[type]
    """The frozen dataclass of what a user may set."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.config = config
        self._link: _Link | None = None
        self._fingerprint: Fingerprint | None = None

    def wire(self, model: nn.Module) -> Iterable[Wire]:
        """Where it acts: `Before`, `After` and `Around` some of the model's modules."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The model that it is attached to, without wrappers."""
        if self._link is None:
            raise AdapterError(f"this {type(self).__name__} is not attached to a model")
        return self._link.model

    @property
    def name(self) -> str:
        """The name that it is attached under; empty while it is not."""
        return self._link.name if self._link else ""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as if this were not attached, in this thread, until the block is left.

        Gradient checkpointing runs layers again in the backward pass: then it belongs inside, too,
        and on the CPU (an accelerator's backward pass has a thread of its own, where this is on).
        """
        switch_off(self)
        try:
            yield
        finally:
            switch_on(self)

    def detach(self) -> None:
        """Leave the model as it was before `attach`; what was learned stays in the adapter."""
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

    def fingerprint(self) -> Fingerprint:
        """What the base is, or was when this was detached.

        Of a base that was sharded meanwhile, only what was seen when this was attached is within
        reach: its shapes, which still hold, and its values, if it is frozen.
        """
        before = self._fingerprint
        if before is None:
            raise AdapterError(f"this {type(self).__name__} was never attached: it has no base yet")
        if self._link is None:
            return before
        now = fingerprint(self.base)
        if now.samples or now.why == before.why:
            return now
        ours = {id(p) for p in self.base._modules[BRANCH].parameters()}  # type: ignore[union-attr]
        frozen = not any(p.requires_grad for p in self.base.parameters() if id(p) not in ours)
        return before if frozen else replace(before, samples={}, why=now.why)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copied with its model, it is attached to the copy; copied alone, to nothing."""
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
        """Write `pliant.json`, the weights and a card; on failure an older save still stands."""
        saving.save(self, Path(save_directory))
        repo_id = push.pop("repo_id", Path(save_directory).name)
        return self.push_to_hub(repo_id, **push) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Save to a repository on the hub, in place of what it held."""
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
        """Attach what a folder or a hub repository holds; on any error, `model` is as it was.

        On a base other than the one it was trained on: `WrongBase`, unless you `insist`. `hub`
        (`revision`, `token`, `cache_dir`, ...) goes to `huggingface_hub.snapshot_download`.
        """
        return attach(model, saving.load(cls, model, source, insist, **hub), name)

    def restore(self, source: str | Path, *, insist: bool = False, **hub: Any) -> None:
        """Take over, in place, what was saved of an adapter with the same configuration."""
        saving.restore(self, source, insist, **hub)


A = TypeVar("A", bound=Adapter)


def attach(model: nn.Module, adapter: A, name: str | None = None) -> A:
    """Put `adapter` on `model` under a name, and return it: it is the handle, too.

    It is registered as `model.pliant.<name>` of the model inside all wrappers: optimizers, DDP and
    `.to(device)` see it. The model's `state_dict` does not, and a change of the model's dtype
    passes it by. What freezes the whole model freezes it, too: `get_peft_model` comes first. And so
    does attaching before the first run under torch.compile, which notices no hook that is added.
    """
    model = unwrap(model)
    name = adapter.part if name is None else name
    if adapter._link is not None:
        raise AdapterError(f"this {type(adapter).__name__} is already attached, as {adapter.name}")
    _refuse_bad_name(model, name)
    adapter._fingerprint = fingerprint(model)
    adapter._link = _Link(model, name, saving.shapes(adapter.state_dict()))
    adapter.train(model.training)
    branch = model._modules.setdefault(BRANCH, Branch())
    assert branch is not None
    branch._modules[name] = adapter
    try:
        for wire in adapter.wire(model):
            adapter._link.connections.append(wire.connect(adapter))
    except BaseException:
        adapter.detach()
        raise
    return adapter


def attached(model: nn.Module) -> dict[str, Adapter]:
    """What is attached to `model`, or to the model inside its wrappers, by name."""
    for module in model.modules():
        if isinstance(module, Branch):
            return {k: v for k, v in module._modules.items() if isinstance(v, Adapter)}
    return {}


@dataclass
class _Link:
    """What an attached adapter knows of its model, kept out of the adapter's own module tree."""

    model: nn.Module
    name: str
    shapes: dict[str, torch.Size]
    connections: list[Connection] = field(default_factory=list)


class Branch(nn.Module):
    """The part of the module tree that holds what is attached: trained and moved with the model,
    but hidden from its `state_dict`, which stays the stock checkpoint's."""

    hidden_from_state_dict = True

    def __init__(self) -> None:
        super().__init__()
        self._prefix = ""
        self.register_load_state_dict_post_hook(_forget_missing)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing. (Each adapter's own `state_dict` has all that is its own.)"""
        return OrderedDict() if destination is None else destination

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._prefix = prefix

    def __deepcopy__(self, memo: dict[int, Any]) -> Branch:
        """An adapter that was copied before its model (both in one object, say) is attached now."""
        new = Branch.__new__(Branch)
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        for name, adapter in self._modules.items():
            twin = new._modules[name]
            assert isinstance(adapter, Adapter) and isinstance(twin, Adapter)
            if twin._link is None and adapter._link and id(adapter._link.model) in memo:
                twin._link = copy.deepcopy(adapter._link, memo)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Devices change for all of the model, dtypes for the base: `model.half()` would round what
        is trained in fp32 for a reason. (`adapter.half()` still does, if you mean it.)"""

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_dtype, recurse)


def _forget_missing(branch: Branch, incompatible: Any) -> None:
    """A stock checkpoint lacks nothing that the model expects."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.startswith(branch._prefix)]


def _refuse_bad_name(model: nn.Module, name: str) -> None:
    branch = getattr(model, BRANCH, None)
    if branch is not None and not isinstance(branch, Branch):
        raise AdapterError(f"{type(model).__name__} has something of its own called {BRANCH!r}")
    taken = list(branch._modules) if branch is not None else []
    if name in taken:
        raise AdapterError(f"the name {name!r} is taken (attached: {', '.join(taken)}): pass name=")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InvalidInput(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'")
