"""A quantised base as the stock model that it computes: its weights, dequantised.

An expert of a quantised base belongs to the weights that this one multiplies by: the singular
vectors of the original weights are others. So these weights leave, in the base's 16 or 32 bits;
quantise them again to have them small.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from pliant.adapters.fingerprint import is_packed
from pliant.errors import UnsupportedModel

LIVE_BOUND = 0.05
"""The largest difference of a logit from the quantised model's, relative to the largest logit:
8-bit layers round their inputs, too, and the dequantised ones do not."""


def check_dequantisable(base: nn.Module) -> None:
    """Refuse a quantised base whose weights cannot be written as a stock model's."""
    for path, module in quantised_modules(base).items():
        if getattr(module, "source_cls", None) is Conv1D:
            raise UnsupportedModel(
                f"{path} is a quantised Conv1D, whose axes are others: train the expert on the "
                "base in 16 or 32 bits to export it"
            )
        try:
            dequantised_weight(module)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise UnsupportedModel(
                f"{path} cannot be dequantised ({error}): train the expert on the base in 16 or 32 "
                "bits, or in bitsandbytes' 4 or 8, to export it"
            ) from error


def dequantised_weight(module: Any) -> Tensor:
    """The weight that a quantised layer multiplies by; the layer stays as it is.

    On a CPU, PEFT puts a new parameter in its place, and an 8-bit one (bitsandbytes 0.50) that has
    run before has lost its scales then.
    """
    parameter = module.weight
    weight = dequantize_module_weight(module).detach()
    if module.weight is not parameter:
        module.weight = parameter
    return weight


def quantised_modules(base: nn.Module) -> dict[str, Any]:
    """The layers that hold packed weights, by the names that they had without PEFT."""
    return {
        path.replace(".base_layer", ""): module
        for path, module in base.named_modules()
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter)
        and (not weight.data.dtype.is_floating_point or type(weight.data) not in (Tensor, DTensor))
    }


def dequantised_state(base: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the stock model, from that of the quantised one without PEFT's names."""
    modules = quantised_modules(base)
    packed = {f"{path}.": module for path, module in modules.items()}
    own = {
        name: tensor
        for name, tensor in state.items()
        if name.endswith(".bias") or not any(name.startswith(path) for path in packed)
    }
    for path, module in modules.items():
        own[f"{path}.weight"] = dequantised_weight(module).to(base.dtype)
    return own


def stock_config(base: Any) -> Any:
    """The configuration of the model without its quantisation."""
    config = copy.deepcopy(base.config)
    if is_packed(base):
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, name):
                delattr(config, name)
        config.dtype = base.dtype
    return config
