"""A candidate that does not run is passed over, and what is no fault of its is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.exporting.closest import closest
from pliant.structure.stock.smaller import Stock


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MemoryError("out of memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError("No space left on device"), True),
        (InvalidInput("no such layer"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_only_errors_of_a_candidate_itself_pass_it_over(error: Exception, passes: bool) -> None:
    model = tiny_model("llama")
    stock = Stock(model.config, type(model), model.state_dict())

    def agree(candidate: Any) -> float:
        raise error

    with pytest.raises(type(error) if passes else UnsupportedModel, match=str(error)):
        closest([stock], agree, "heads", 1e-5)
