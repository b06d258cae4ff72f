"""Keys and values with free positions at their end, so that a step appends without copying them.

A cache layer grows by `torch.cat([cached, new])`, which copies everything cached. The tensors here
override that one call: the new positions are written into the free ones, once; a second call
copies, as for any tensor. On a CPU, attention to them also skips the gradient of the prompt, which
nothing reads. In all other respects, autograd included, they behave like plain tensors.
(benchmarks/cpx_training.py: together they halve a step at 1,024 tokens.)

Shapes: B prompts, H heads, G of them to a key's, T positions, r rows, K features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Appendable(Tensor):
    """The first positions of a (B, H, T + r, K) tensor; the rest may be written once."""

    whole: list[Tensor]
    """The tensor with its free positions; empty once they are used."""

    @classmethod
    def of(cls, whole_BHTK: Tensor, length: int) -> Tensor:
        """The first `length` positions of `whole`; a plain tensor if none are free."""
        if whole_BHTK.shape[2] <= length:
            return whole_BHTK
        appendable = whole_BHTK[:, :, :length].as_subclass(cls)
        appendable.whole = [whole_BHTK]
        return appendable

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.cat and (joined := _joined(*args, **(kwargs or {}))) is not None:
                return joined
            return func(*args, **(kwargs or {}))


class Joined(Tensor):
    """Cached positions followed by new ones; only the new ones have a gradient."""

    new_BHrK: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention and len(args) == 3:
                attended = _attended(*args, **(kwargs or {}))
                if attended is not None:
                    return attended
            return func(*args, **(kwargs or {}))


def _joined(tensors: Any, dim: int = 0, **options: Any) -> Tensor | None:
    """The result of `torch.cat`; None if the new tensor does not fit the free positions."""
    if options or len(tensors) != 2 or dim not in (-2, 2) or not isinstance(tensors[0], Appendable):
        return None
    cached, new_BHrK = tensors
    try:
        whole = cached.whole.pop()  # only one of two threads gets it
    except IndexError:
        return None
    free = whole[:, :, cached.shape[2] :][:, :, : new_BHrK.shape[2]]
    alike = (whole.dtype, whole.device) == (new_BHrK.dtype, new_BHrK.device)
    if free.shape != new_BHrK.shape or not alike:
        cached.whole.append(whole)
        return None
    joined: Tensor = _Behind.apply(new_BHrK, [whole], cached.shape[2])
    joined = joined.as_subclass(Joined)
    joined.new_BHrK = new_BHrK
    return joined


class _Behind(torch.autograd.Function):
    """Writes `new` into the free positions; its gradient is that of its own positions."""

    @staticmethod
    def forward(ctx: Any, new_BHrK: Tensor, whole: list[Tensor], start: int) -> Tensor:
        ctx.start, stop = start, start + new_BHrK.shape[2]
        whole[0][:, :, start:stop] = new_BHrK
        return whole[0][:, :, :stop]

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, None, None]:
        return grad_BHTK[:, :, ctx.start :], None, None


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any
) -> Tensor | None:
    """torch's attention, with a gradient to the new positions only. None where torch's own is as
    fast (no gradients, not a CPU) or has other options (causal, dropout)."""
    if not isinstance(key, Joined) or not isinstance(value, Joined):
        return None
    plain = not how.get("is_causal") and not how.get("dropout_p")
    learns = torch.is_grad_enabled() and query.requires_grad
    if not (plain and learns and query.device.type == "cpu"):
        return None
    whole = (key.detach().as_subclass(Tensor), value.detach().as_subclass(Tensor))
    attended: Tensor = _Attended.apply(query, key.new_BHrK, value.new_BHrK, whole, attn_mask, how)
    return attended


class _Attended(torch.autograd.Function):
    """Attention to keys and values whose last few positions are new."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, new_k: Tensor, new_v: Tensor, whole: Any, mask: Any, how: Any
    ) -> Tensor:
        k, v = whole
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.new, ctx.scale = new_k.shape[2], how.get("scale") or q.shape[-1] ** -0.5
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Prompt by prompt: a product over all prompts would copy their heads."""
        q, k, v, mask, out = ctx.saved_tensors
        gradients = [
            _gradients(q[b], k[b], v[b], _of(mask, b), out[b], grad[b], ctx.scale, ctx.new)
            for b in range(len(q))
        ]
        return (*(torch.stack(stack) for stack in zip(*gradients, strict=True)), None, None, None)


def _gradients(
    q: Tensor,
    k_HTK: Tensor,
    v_HTK: Tensor,
    mask: Tensor | None,
    out: Tensor,
    grad: Tensor,
    scale: float,
    new: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one prompt's queries, new keys and new values. Query heads that share a key
    head are adjacent."""
    heads, groups = k_HTK.shape[0], q.shape[0] // k_HTK.shape[0]
    q_HrK, out_HrK, grad_HrK = (
        t.unflatten(0, (heads, groups)).flatten(1, 2) for t in (q, out, grad)
    )
    scores = torch.bmm(q_HrK, k_HTK.transpose(1, 2)).float() * scale
    if mask is not None:
        scores = _masked(scores.view(heads * groups, -1, k_HTK.shape[1]), mask).view_as(scores)
    share_HrT = scores.softmax(dim=-1)
    pull = torch.bmm(grad_HrK, v_HTK.transpose(1, 2)).float()
    pull = share_HrT * (pull - (grad_HrK * out_HrK).float().sum(dim=-1, keepdim=True)) * scale
    share_HrT, pull = share_HrT.to(q.dtype), pull.to(q.dtype)
    to_q = torch.bmm(pull, k_HTK).view_as(q)
    to_k = torch.bmm(pull[:, :, -new:].transpose(1, 2), q_HrK)
    return to_q, to_k, torch.bmm(share_HrT[:, :, -new:].transpose(1, 2), grad_HrK)


def _of(mask: Tensor | None, prompt: int) -> Tensor | None:
    """One prompt's mask; all prompts may share one."""
    if mask is None or mask.dim() < 4:
        return mask
    return mask[prompt if mask.shape[0] > 1 else 0]


def _masked(scores_HrT: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores_HrT.masked_fill(~mask, float("-inf"))
    return scores_HrT + mask
