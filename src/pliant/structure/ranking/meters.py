"""What is read from a forward pass about the units of one site: one meter for each score.

A meter's hook adds up numbers over the tokens of a batch that are no padding; `value` is the mean.
It sees what the module itself sees, after the hooks of all adapters that are attached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, one_hot
from torch.utils.hooks import RemovableHandle

from pliant.anatomy.slices import Slices
from pliant.errors import UnsupportedModel
from pliant.structure.calibration import without_padding
from pliant.structure.units import Site


class Meter:
    """Sums over tokens at one site, while connected."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.sum = torch.zeros(site.count * site.width, dtype=torch.float64)
        self.tokens = 0
        self.mask_BT = torch.ones(0)
        """False on the padding of the batch that runs."""

    def connect(self, layer: nn.Module) -> list[RemovableHandle]:
        """Set the hooks; `layer` is the one that the site lies in."""
        return [self.site.module.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        raise NotImplementedError

    def value(self) -> Tensor:
        """(units,)"""
        return self.sum / max(self.tokens, 1)

    def _add(self, sums: Tensor, tokens: int) -> None:
        self.sum += sums.detach().cpu().double()
        self.tokens += tokens


class InputMeter(Meter):
    """The root mean square of a unit's features times the norms of their weights."""

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = without_padding(args[0] if args else next(iter(kwargs.values())), self.mask_BT)
        self._add(x.float().square().sum(dim=0), len(x))

    def value(self) -> Tensor:
        squares = super().value() * column_squares(self.site)
        return squares.view(self.site.count, -1).sum(dim=1).sqrt()


class ExpertMeter(Meter):
    """The mean norm of what an expert adds to a token, weighed by the router."""

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            self._add_norms(self._norms(module, args, kwargs))

    def _add_norms(self, norms_TN: Tensor) -> None:
        norms_TN = without_padding(norms_TN, self.mask_BT)
        self._add(norms_TN.double().sum(dim=0), len(norms_TN))

    def _norms(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor:
        """(tokens, experts); 0 where the router does not choose the expert."""
        index = _chosen(args, kwargs)
        if index is None:  # Llama 4 runs each expert on all tokens, weighed by the router
            output: Tensor = module.forward(*args, **kwargs)
            return output.float().view(self.site.count, -1, output.shape[-1]).norm(dim=-1).T
        most = max(int(index.max()) + 1, self.site.count)
        norms_TN = torch.zeros(len(index), most, device=index.device)
        for k in range(index.shape[1]):
            # One choice of each token alone, by the module's own forward: no hook runs twice.
            first = [_choice(x, index, k) for x in args]
            named = {name: _choice(x, index, k) for name, x in kwargs.items()}
            x = module.forward(*first, **named).float().reshape(len(index), -1)
            norms_TN.scatter_add_(1, index[:, k : k + 1].long(), x.norm(dim=1, keepdim=True))
        # Some routers choose more experts than there are weights, to choose none.
        return norms_TN[:, : self.site.count]


class RelativeExpertMeter(ExpertMeter):
    """The same, relative to the norm of the token's hidden state after the layer."""

    norms_TN: Tensor | None = None

    def connect(self, layer: nn.Module) -> list[RemovableHandle]:
        return [*super().connect(layer), layer.register_forward_hook(self.after)]

    def _add_norms(self, norms_TN: Tensor) -> None:
        self.norms_TN = norms_TN

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.norms_TN is None:  # the layer did without its experts
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        norms_T = hidden.detach().float().reshape(len(self.norms_TN), -1).norm(dim=1)
        super()._add_norms(self.norms_TN / norms_T[:, None].clamp(min=1e-12))
        self.norms_TN = None


class ChoiceMeter(Meter):
    """How often the router chooses each expert, of all tokens."""

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        index = _chosen(args, kwargs)
        if index is None:
            inputs = args[0].view(self.site.count, -1, args[0].shape[-1])
            chosen = inputs.any(dim=-1).T
        else:
            most = max(int(index.max()) + 1, self.site.count)
            chosen = one_hot(index, most).sum(dim=1)[:, : self.site.count] > 0
        chosen = without_padding(chosen, self.mask_BT)
        self._add(chosen.sum(dim=0), len(chosen))


class InfluenceMeter(Meter):
    """One minus the cosine of a layer's input and output (Block Influence, ShortGPT)."""

    def connect(self, layer: nn.Module) -> list[RemovableHandle]:
        return [self.site.module.register_forward_hook(self.after, with_kwargs=True)]

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        before, after = (without_padding(x.float(), self.mask_BT) for x in (before, after))
        influence = 1 - cosine_similarity(before, after, dim=-1)
        self._add(influence.sum()[None], len(influence))


class EntropyMeter(Meter):
    """How sharply a head attends: one minus its entropy over that of uniform attention."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.sum = torch.zeros(site.count, dtype=torch.float64)

    def connect(self, layer: nn.Module) -> list[RemovableHandle]:
        """On the modules around the projection, one of which returns the probabilities."""
        path = next(name for name, m in layer.named_modules() if m is self.site.module)
        parts = path.split(".")[:-1]
        around = [layer.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
        return [module.register_forward_hook(self.after) for module in around]

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        sequences, length = self.mask_BT.shape
        expected = (sequences, self.site.count, length, length)
        outputs = output if isinstance(output, (tuple, list)) else ()
        p_BHTT = next((x for x in outputs if isinstance(x, Tensor) and x.shape == expected), None)
        if p_BHTT is None:
            return
        p_BHTT = p_BHTT.detach().float()
        visible_BHT = (p_BHTT > 0).sum(dim=-1)  # fewer than all before it in a sliding window
        sharpness_BHT = 1 - torch.special.entr(p_BHTT).sum(dim=-1) / visible_BHT.clamp(min=2).log()
        counts_BHT = self.mask_BT[:, None] & (visible_BHT > 1)  # where there is a choice
        sums = (sharpness_BHT * counts_BHT).sum(dim=(0, 2))
        self._add(sums, int(self.mask_BT.sum()))

    def value(self) -> Tensor:
        if not self.tokens:
            raise UnsupportedModel(
                f"the attention of layer {self.site.layer} returns no probabilities for its "
                f"{self.site.count} heads: use another score, such as fisher"
            )
        return super().value()


# --- weights -------------------------------------------------------------------------------------


@torch.no_grad()
def column_squares(site: Site) -> Tensor:
    """(features,) the squared norm of each input's weights."""
    module: Any = site.module
    weight = getattr(module, "weight", None)
    wrapped = hasattr(module, "base_layer")  # LoRA's own matrices count
    if not wrapped and isinstance(weight, Tensor) and weight.dim() == 2 and _is_plain(weight):
        return weight.detach().double().square().sum(dim=1 - site.axis).cpu()
    return _squares_by_calls(module, site.count * site.width)


def _squares_by_calls(module: nn.Module, features: int, at_once: int = 256) -> Tensor:
    """From the projection of unit vectors: it needs no knowledge of how weights are packed."""
    floats = (p for p in module.parameters() if p.is_floating_point())
    like = next(floats, torch.zeros(0, device=_at(module)))
    zero = module.forward(like.new_zeros(1, features))
    squares = []
    for start in range(0, features, at_once):
        unit = like.new_zeros(min(at_once, features - start), features)
        unit[range(len(unit)), range(start, start + len(unit))] = 1
        squares.append((module.forward(unit) - zero).double().square().sum(dim=1).cpu())
    return torch.cat(squares)


@torch.no_grad()
def expert_norms(site: Site) -> Tensor:
    """(experts,) the norm of each expert's weights."""
    squares = torch.zeros(site.count, dtype=torch.float64)
    for parameter in site.module.parameters():
        if parameter.shape[0] >= site.count:
            own = parameter[: site.count].double().flatten(1).square().sum(dim=1)
            squares += own.cpu()
    return squares.sqrt()


@torch.no_grad()
def slice_norms(slices: Slices) -> Tensor:
    """(units,) the norm of each unit's slice of the parameter."""
    parameter = getattr(slices.holder, slices.parameter)
    if not parameter.is_floating_point():
        raise UnsupportedModel(f"{slices.path} is packed: load the model in 16 or 32 bits")
    return slices.squares(parameter).sqrt().cpu()


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _at(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _chosen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """(tokens, choices) the experts that each token goes to."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value
    return None


def _choice(value: Any, index: Tensor, k: int) -> Any:
    """Column k of the index and of the weights beside it; other inputs as they are.

    Twice, the second time with weight 0: LongCat-Flash cannot run a single choice.
    """
    if not (isinstance(value, Tensor) and value.shape == index.shape):
        return value
    column = value[:, k : k + 1]
    second = torch.zeros_like(column) if value.is_floating_point() else column
    return torch.cat([column, second], dim=1)
