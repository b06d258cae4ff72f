"""A model at rest, and as it was afterwards: modes may differ from module to module."""

from __future__ import annotations

import pytest
from torch import nn

from pliant.anatomy.modes import eval_mode


def test_every_module_has_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    model[1].training = False  # it alone: its children train on
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before and any(before)
