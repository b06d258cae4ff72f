"""The model inside its wrappers."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT, torch.compile, DDP, FSDP and DeepSpeed, however they are nested."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """The model inside the outermost wrapper; None if there is no wrapper."""
    for name in ("_orig_mod", "_fsdp_wrapped_module"):  # torch.compile, FSDP version 1
        if isinstance(inner := model._modules.get(name), nn.Module):
            return inner
    if callable(get_base_model := getattr(model, "get_base_model", None)):  # PEFT
        return get_base_model()
    children = model._modules
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or (
        list(children) == ["module"]  # DeepSpeed's engine, and wrappers like it
    ):
        return children["module"]
    return None
