"""One `attach`: the configuration tells the part, and the result is that of the part's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.minimal_adapter import Scale, ScaleConfig

import pliant
from pliant import CPXConfig
from pliant.adapters import attached
from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.experts import SVFConfig, SVFModel
from pliant.gradients import GradientConfig
from pliant.structure import AgencyConfig, GateConfig, PruneConfig, SkipConfig, attach_agency

IDS = torch.arange(5, 15)[None]


@pytest.mark.parametrize(
    ("config", "kind", "name"),
    [
        (CPXConfig(), "Complexity", "complexity"),
        (GradientConfig(selection="sampled"), "Gradients", "gradients"),
        (GateConfig(units=("heads", "layers")), "Gates", "structure"),
        (SkipConfig(), "Skips", "skips"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_configuration_tells_the_part(config: Any, kind: str, name: str) -> None:
    model = tiny_model("llama")
    before = model(IDS).logits
    adapter = pliant.attach(model, config)
    assert (type(adapter).__name__, adapter.config) == (kind, config)
    named = pliant.attach(model, config, None, "second") if kind != "Gradients" else adapter
    assert attached(model) == {name: adapter, named.name: named}
    assert torch.equal(model(IDS).logits, before)
    for each in {id(a): a for a in (named, adapter)}.values():
        each.detach()
    assert attached(model) == {}


def test_an_expert_is_pefts() -> None:
    model = tiny_model("llama")
    before = model(IDS).logits
    expert = pliant.attach(model, SVFConfig(rank=2), name="sums")
    assert isinstance(expert.base_model, SVFModel) and list(expert.peft_config) == ["sums"]
    assert torch.equal(expert(IDS).logits, before)


def test_a_scorer_has_the_tokenizer_and_gradients_the_router() -> None:
    model, tokenizer = pliant.load("nano-s")
    scorer = pliant.attach(model, CPXConfig(), tokenizer)
    assert scorer.tokenizer is tokenizer
    router = pliant.create_truncated_router(model, 1)
    gradients = pliant.attach(model, GradientConfig(selection="sampled"), tokenizer, router=router)
    assert gradients.selector.router is router


def test_an_adapter_is_attached_as_it_is() -> None:
    model = tiny_model("llama")
    scale = Scale(model, Scale.config_class())
    assert pliant.attach(model, scale) is scale
    second = Scale(model, Scale.config_class())
    assert pliant.attach(model, second, "louder").name == "louder"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config = None: give an instance of CPXConfig, GradientConfig"),
        (CPXConfig, "give an instance of CPXConfig"),
        (PruneConfig(heads=0.5), "config = PruneConfig.*give an instance"),
        (AgencyConfig(), "attach_agency"),
    ],
    ids=str,
)
def test_anything_else_is_named(config: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        pliant.attach(tiny_model("llama"), config)


def test_printed_an_adapter_is_one_line() -> None:
    model, tokenizer = pliant.load("nano-s")
    scorer = pliant.attach(model, CPXConfig(rows=2, layer=1, lora_rank=2), tokenizer)
    assert str(scorer) == (
        f"Complexity (attached to LlamaForCausalLM as 'complexity', "
        f"{sum(p.numel() for p in scorer.parameters()):,} parameters): "
        "2 [CPX] rows read after layer 1, LoRA of rank 2, for score"
    )
    scorer.detach()
    assert str(scorer).startswith("Complexity (detached, ")
    gates = pliant.attach(model, GateConfig(units=("heads", "layers"), patterns=("a", "b")))
    with torch.no_grad():
        gates["heads", 1][:2] = 0
    assert str(gates).endswith(
        ": 2 of 9 heads closed, 0 of 3 layers closed in pattern 'a' (2 patterns)"
    )
    gradients = pliant.attach(model.train(), GradientConfig())
    assert str(gradients).endswith(
        "'gradients'): trains 25% of the tokens, sampled by gradient, engine sparse; step 0"
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert str(gradients).endswith("step 0, 3 of 9 tokens in the last batch")
    assert str(pliant.attach(model, SkipConfig())).endswith("48 parameters): default settings")
    assert str(attach_agency(gates)).endswith(
        "'agency'): Of 9 heads, 9 active; 0 without consent, and 0 violations in 0 observations."
    )
    assert repr(gradients) == "Gradients()", "print(model) stays as it is"


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llama", "4 layers of width 64, 4 heads, 4 KV heads, 128 channels"),
        ("mixtral", "experts"),
        ("mamba", "MambaForCausalLM: 4 layers of width 64, a vocabulary of 256"),
    ],
)
def test_printed_an_anatomy_is_its_sizes(kind: str, parts: str) -> None:
    text = str(pliant.Anatomy.of(tiny_model(kind)))
    assert parts in text and "\n" not in text and text.endswith(" parameters"), text


def test_what_is_attached_is_no_part_of_an_anatomy() -> None:
    model = tiny_model("llama")
    before = str(pliant.Anatomy.of(model))
    pliant.attach(model, CPXConfig())
    assert str(pliant.Anatomy.of(model)) == before


def test_what_would_be_ignored_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInput, match="name='mine'"):
        pliant.attach(model, GateConfig(("layers",)), "mine")
    with pytest.raises(InvalidInput, match="give its name, and nothing else"):
        pliant.attach(model, Scale(model, ScaleConfig()), "scale", router=model)

    class Own(CPXConfig):
        pass

    assert type(pliant.attach(model, Own())).__name__ == "Complexity"
