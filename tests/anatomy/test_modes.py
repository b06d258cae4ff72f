"""What a mode changes inside its block is as before after it, even if the block raises."""

from __future__ import annotations

import pytest
from torch import nn

from pliant.anatomy.modes import attention_among, eval_mode, without_checkpointing
from pliant.anatomy.tiny import tiny_model


def test_eval_mode_restores_the_mode_of_each_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    model[1].training = False  # this module alone, not its children
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before and any(before)


def test_checkpointing_is_off_inside_and_on_again_after() -> None:
    def flags() -> list[bool]:
        modules = [m for m in model.modules() if "gradient_checkpointing" in vars(m)]
        return [module.gradient_checkpointing for module in modules]

    model = tiny_model("llama")
    with without_checkpointing(model) as was_on:
        assert not was_on
    model.gradient_checkpointing_enable()
    before = flags()
    assert any(before)
    with pytest.raises(KeyError), without_checkpointing(model) as was_on:
        assert was_on and not any(flags())
        raise KeyError
    assert flags() == before


@pytest.mark.parametrize(
    ("allowed", "inside"), [(("eager",), "eager"), (("sdpa",), "sdpa"), (("eager", "sdpa"), "sdpa")]
)
def test_another_attention_is_used_only_if_the_current_one_is_not_allowed(
    allowed: tuple[str, ...], inside: str
) -> None:
    model = tiny_model("llama")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), attention_among(model, *allowed):
        assert model.config._attn_implementation == inside
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
