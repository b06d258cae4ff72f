"""`SvdComponent` and `SVFWrapper`: singular values of a model's weights, under the seed's names.

    wrapper = SVFWrapper(model)
    optimizer = torch.optim.Adam(wrapper.z.parameters(), lr=0.01)
    wrapper(input_ids, labels=input_ids).loss.backward()    # the model's own output
    optimizer.step()
    wrapper.patch_weights()                                 # U diag(S z) V^T, in place
    wrapper.restore_weights()                               # bit by bit

The seed stored U and V^T and rebuilt each weight; here an expert of PEFT does the work, so a
wrapper can be trained, saved and merged like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pliant.errors import InvalidInput, did_you_mean
from pliant.experts.basis import basis_of
from pliant.experts.config import SVFConfig
from pliant.experts.expert import Expert
from pliant.experts.factors import Factors, factors, factors_of
from pliant.experts.model import svf_layers

NAME = "default"
"""PEFT's name for the expert of a wrapper."""


@dataclass(frozen=True, eq=False)
class SvdComponent:
    """The singular value decomposition of a weight, or of each weight of a stack."""

    U: Tensor
    """(..., out, rank)"""
    S: Tensor
    """(..., rank): the largest first."""
    Vt: Tensor
    """(..., rank, in)"""

    @classmethod
    def of(cls, weight: Tensor, rank: int | None = None) -> SvdComponent:
        """Of a weight (..., out, in), by the eigenvectors of its smaller side."""
        if weight.dim() < 2:
            raise InvalidInput(f"a weight of shape {list(weight.shape)} has no singular values")
        return cls.from_factors(factors(weight, basis_of(weight, rank).vectors.to(weight.device)))

    @classmethod
    def from_factors(cls, product: Factors) -> SvdComponent:
        divisors = product.divisors
        if product.left_is_orthonormal:
            return cls(product.left, product.values, product.right / divisors[..., :, None])
        return cls(product.left / divisors[..., None, :], product.values, product.right)

    def reconstruct(self, z: Tensor | None = None) -> Tensor:
        """U diag(S z) V^T; the weight itself without z."""
        scale = self.S if z is None else self.S * z.to(self.S)
        return (self.U * scale[..., None, :]) @ self.Vt

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vt))


class SVFWrapper(nn.Module):
    """A frozen model whose weights' singular values are scaled by `z`, which is all that trains."""

    z: nn.ParameterDict
    """One vector a matrix, 1 at the start, by the matrix's path with `_` for each dot; (rank,), or
    (experts, rank) for the stacked weights of a mixture."""
    model: PeftModel

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        """`settings` are those of `SVFConfig`: parts, rank, target_modules, ..."""
        super().__init__()
        if isinstance(model, PeftModel | SVFWrapper) or getattr(model, "peft_config", None):
            raise InvalidInput("the model has adapters of PEFT: wrap the base model itself")
        training = model.training
        self.model = get_peft_model(model, SVFConfig(**settings), NAME)
        self.model.train(training)
        self.train(training)
        self.z, self._layers = nn.ParameterDict(), dict[str, Any]()
        for path, layer in svf_layers(self.get_base_model()):
            if layer.tied_to:  # its z is that of the first module with this weight
                continue
            scale = Scale(layer.changes()[NAME])
            layer.svf_z[NAME] = scale
            key = "_".join([*path.split("."), *_stacked(layer)])
            assert key not in self.z, f"two matrices are called {key}"
            self.z[key], self._layers[key] = scale.z, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output.

        Where a gradient is asked for, patched weights are restored first: z learns through its own
        place in the model, which a weight that was written has not.
        """
        if self.is_patched and torch.is_grad_enabled():
            self.restore_weights()
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    # --- weights ---------------------------------------------------------------------------------

    @property
    def is_patched(self) -> bool:
        return any(layer.merged for layer in self._layers.values())

    @torch.no_grad()
    def patch_weights(self) -> None:
        """Write U diag(S z) V^T into the model's weights, with z as it is now."""
        self.restore_weights()
        self.model.merge_adapter()

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put the weights back as they were, bit by bit."""
        if self.is_patched:
            self.model.unmerge_adapter()

    def component(self, key: str) -> SvdComponent:
        """U, S and V^T of the weight that this z scales."""
        if key not in self._layers:
            raise InvalidInput(f"no z {key!r}{did_you_mean(key, self._layers)}")
        layer = self._layers[key]
        return SvdComponent.from_factors(factors_of(layer, layer.ranks[NAME]))

    def components(self) -> dict[str, SvdComponent]:
        """All of them: together twice as large as the weights, or larger."""
        return {key: self.component(key) for key in self._layers}

    # --- as an expert ----------------------------------------------------------------------------

    def expert(self) -> Expert:
        """The z of this moment, as a value."""
        return Expert.of(self.model, NAME)

    @torch.no_grad()
    def load_z(self, source: Expert | Mapping[str, Tensor] | str | Path) -> None:
        """Take z from an expert, an expert's folder, or a `z.state_dict()`."""
        patched = self.is_patched
        self.restore_weights()
        if isinstance(source, Mapping):
            self.z.load_state_dict(dict(source))
        else:
            expert = source if isinstance(source, Expert) else Expert.load(source)
            expert.apply(self.model, NAME, trainable=True)
        if patched:
            self.patch_weights()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write z as an expert, which PEFT loads."""
        self.expert().save(folder)

    def get_base_model(self) -> nn.Module:
        base: nn.Module = self.model.get_base_model()
        return base

    def unload(self) -> nn.Module:
        """The model as it came: its own modules and weights, without z."""
        self.restore_weights()
        base: nn.Module = self.model.unload()
        return base

    def __getattr__(self, name: str) -> Any:
        """What else a model has: config, device, generation_config, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self._modules:
                raise
            return getattr(self._modules["model"], name)


class Scale(nn.Module):
    """An expert's z, from which its layer takes d = z - 1; saved and loaded as d, as PEFT does.

    The difference is exact in fp32 for z in [0.5, 2], so z and d cannot drift apart.
    """

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter((1 + change.detach()).float())

    @property
    def weight(self) -> Tensor:
        return self.z - 1

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        change = state_dict.get(f"{prefix}weight")
        if change is None:
            missing.append(f"{prefix}weight")
            return
        with torch.no_grad():
            self.z.copy_(1 + change)


def _stacked(layer: Any) -> list[str]:
    name = getattr(layer, "parameter_name", None)
    return [] if name is None else [name]
