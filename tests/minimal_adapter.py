"""The smallest adapters that use all features of `Adapter`, for its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pliant.adapters import Adapter, After, Around, Before, Wire


@dataclass(frozen=True)
class ScaleConfig:
    start: float = 1.0
    ends: tuple[str, ...] = ("embeddings", "head")


class Scale(Adapter):
    """Scales the embeddings and what the head reads, channel by channel; neutral at 1."""

    part = "minimal"
    config_class = ScaleConfig

    def __init__(self, model: nn.Module, config: ScaleConfig) -> None:
        super().__init__(model, config)
        width = model.get_input_embeddings().embedding_dim
        self.embeddings = nn.Parameter(torch.full((width,), config.start))
        self.head = nn.Parameter(torch.full((1,), config.start))

    def wire(self, model: PreTrainedModel) -> Iterator[Wire]:
        if "embeddings" in self.config.ends:
            yield After(model.get_input_embeddings(), self.scale_output)
        if "head" in self.config.ends and model.get_output_embeddings() is not None:
            yield Before(model.get_output_embeddings(), partial(self.scale_input, 0))

    def scale_output(self, module: nn.Module, args: Any, kwargs: Any, h_BTD: Tensor) -> Tensor:
        return (h_BTD * self.embeddings).to(h_BTD.dtype)

    def scale_input(self, which: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        scaled = (args[which] * self.head).to(args[which].dtype)
        return (*args[:which], scaled, *args[which + 1 :]), kwargs


@dataclass(frozen=True)
class WarmupConfig:
    steps: int = 4


class Warmup(Adapter):
    """Scales the loss up over the first training steps: a patched forward, and a state to keep."""

    part = "warmup"
    config_class = WarmupConfig

    def __init__(self, model: nn.Module, config: WarmupConfig) -> None:
        super().__init__(model, config)
        self.done = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"done": self.done}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.done = state["done"]

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        yield Around(model, self.warmed)

    def warmed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self.training and output.loss is not None:
            self.done += 1
            output.loss = output.loss * min(1.0, self.done / self.config.steps)
        return output


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of about 8,000 parameters."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).eval()


def logits(model: nn.Module, seed: int = 1) -> Tensor:
    """What the model says about a fixed batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (2, 7), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def trained(adapter: Adapter, seed: int = 2) -> Any:
    """The adapter, with its parameters away from neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapter


def anatomy_of(model: nn.Module) -> dict[str, Any]:
    """All that can be left behind: modules, attributes, hooks, parameters, flags."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            is_table = isinstance(value, dict)
            seen[f"{path}.{key}"] = {k: id(v) for k, v in value.items()} if is_table else id(value)
        seen[f"{path} training"] = module.training
    seen["requires_grad"] = [p.requires_grad for p in model.parameters()]
    seen["values"] = {k: v.clone() for k, v in model.state_dict().items()}
    return seen


def same_anatomy(a: dict[str, Any], b: dict[str, Any]) -> bool:
    values = a["values"].keys() == b["values"].keys() and all(
        torch.equal(a["values"][k], b["values"][k]) for k in a["values"]
    )
    return values and {**a, "values": 0} == {**b, "values": 0}
