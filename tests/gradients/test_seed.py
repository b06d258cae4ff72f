"""The Python blocks of the seed that CGGR came from run: other imports, another model's name.

What a block needs and does not make (a dataloader, say) is supplied beside it. On a machine without
a GPU `.cuda()` leaves the model where it is.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import pliant
from pliant.gradients.cautions import BiasedWarning
from pliant.loading import WEIGHTS

NANO = str(WEIGHTS / "nano-l")

FLASH = f"""
from pliant import load_model_with_flash_attention, enable_flash_attention

# Option 1: Load model with Flash Attention
model = load_model_with_flash_attention("nano-l")

# Option 2: Enable on existing model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{NANO}")
model = enable_flash_attention(model)  # Auto-selects best backend
"""

BATCH_SPLITTING = f"""
from pliant import CGGRModel, create_truncated_router
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{NANO}").cuda()

# Create lightweight router (shares weights, 0 extra memory)
router = create_truncated_router(model, num_layers=4)

# Wrap model
cggr_model = CGGRModel(
    model, 
    router=router, 
    min_tokens_ratio=0.25
)

# Train
loss = cggr_model(input_ids, labels=labels)
loss.backward()
"""  # noqa: W291

MANUAL = """
from pliant import CGGRLoss

criterion = CGGRLoss(
    scoring='combined',      # 'entropy', 'margin', 'loss', 'combined'
    selection='stratified',  # 'topk', 'stratified', 'sequence_aware'
    min_tokens_ratio=0.25,
    warmup_steps=1000,
)

for batch in dataloader:
    logits = model(input_ids)
    loss = criterion(logits, targets)  # Only hard tokens
    loss.backward()
    optimizer.step()
    criterion.step()
"""

NATIVE = """
from pliant import CGGRScorer

# 1. Initialize Scorer
self.scorer = CGGRScorer(router, min_tokens_ratio=0.5)

# 2. Get Mask
difficulty, mask, info = self.scorer(input_ids)

# 3. Apply Mask (Null Routing)
# mask is Boolean: True=Hard (Route to Expert), False=Easy (Skip/Null)
expert_output = expert_layer(x) * mask.unsqueeze(-1)
"""

DYNAMIC = """
CGGRLoss(dynamic_threshold=True, threshold_sensitivity=0.5)
"""

FULL_API = """
CGGRLoss(
    # Scoring
    scoring='combined',
    
    # Selection
    selection='topk',
    num_strata=4,                  # For stratified
    min_tokens_per_sequence=1,     # For sequence_aware
    
    # Thresholding
    dynamic_threshold=True,
    threshold_sensitivity=0.5,
    
    # Curriculum
    min_tokens_ratio=0.25,
    warmup_steps=1000,
)
"""  # noqa: W293

BLOCKS = (FLASH, BATCH_SPLITTING, MANUAL, NATIVE, DYNAMIC, FULL_API)

IDS = torch.randint(5, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def run(block: str, **supplied: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "seed", **supplied}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedWarning)  # the seed's default is one of them
        exec(block, names)
    return names


@pytest.fixture(autouse=True)
def _where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(nn.Module, "cuda", lambda self: self)


def test_flash_attention(capsys: pytest.CaptureFixture[str]) -> None:
    model = run(FLASH)["model"]
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("LlamaForCausalLM: ") for line in said] == [True, True]
    assert model.config._attn_implementation in said[1]


def test_batch_splitting() -> None:
    left = run(BATCH_SPLITTING, input_ids=IDS, labels=IDS)
    assert all(p.grad is not None for p in left["model"].parameters())
    assert left["cggr_model"].get_metrics()["tokens_selected"] == 30, "the curriculum's first step"
    fresh = AutoModelForCausalLM.from_pretrained(NANO)
    torch.testing.assert_close(left["loss"], fresh(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("gives", ["logits", "a model's output"])
def test_manual_integration(gives: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(NANO).train()
    labels = IDS.roll(-1, dims=1) if gives == "logits" else IDS
    left = run(
        MANUAL,
        dataloader=range(3),
        model=(lambda ids: base(ids).logits) if gives == "logits" else base,
        input_ids=IDS,
        targets=labels,
        optimizer=torch.optim.SGD(base.parameters(), lr=0.1),
    )
    told = left["criterion"].get_metrics()
    assert told["step"] == 2 and told["token_ratio"] > 0.99
    assert told["tokens_total"] == (32 if gives == "logits" else 30)


def test_native_integration() -> None:
    base = AutoModelForCausalLM.from_pretrained(NANO)
    left = run(
        NATIVE,
        self=SimpleNamespace(),
        router=pliant.create_truncated_router(base, num_layers=2),
        input_ids=IDS,
        expert_layer=nn.Linear(48, 48),
        x=torch.randn(2, 16, 48),
    )
    assert left["mask"].dtype == torch.bool and left["mask"].shape == IDS.shape
    assert left["difficulty"].shape == IDS.shape and left["info"]["current_ratio"] == 1.0
    assert left["expert_output"].shape == (2, 16, 48)


def test_dynamic_thresholding_and_the_full_api() -> None:
    for block in (DYNAMIC, FULL_API):
        run(block, CGGRLoss=pliant.CGGRLoss)


def test_every_parameter_has_the_published_default() -> None:
    published = {
        pliant.CGGRLoss: {
            "scoring": "combined",
            "selection": "topk",
            "dynamic_threshold": True,
            "threshold_sensitivity": 0.5,
            "min_tokens_ratio": 0.25,
            "warmup_steps": 1000,
            "num_strata": 4,
            "min_tokens_per_sequence": 1,
            "base_loss": None,
        },
        pliant.CGGRScorer: {
            "min_tokens_ratio": 0.25,
            "warmup_steps": 1000,
            "dynamic_threshold": True,
            "threshold_sensitivity": 0.5,
            "selection": "topk",
        },
        pliant.CGGRModel: {
            "router": None,
            "min_tokens_ratio": 0.25,
            "warmup_steps": 1000,
            "dynamic_threshold": True,
            "threshold_sensitivity": 0.5,
            "selection": "topk",
        },
        pliant.create_truncated_router: {"num_layers": 2},
        pliant.load_model_with_flash_attention: {
            "backend": "auto",
            "torch_dtype": None,
            "device_map": "auto",
        },
        pliant.enable_flash_attention: {"backend": "auto", "verbose": True},
    }
    for called, defaults in published.items():
        parameters = inspect.signature(called).parameters
        assert {name: parameters[name].default for name in defaults} == defaults


def test_positional_arguments_mean_what_they_did() -> None:
    """Loss and scorer take their settings in the published order."""
    loss = list(inspect.signature(pliant.CGGRLoss).parameters)
    assert loss[:4] == ["scoring", "selection", "dynamic_threshold", "threshold_sensitivity"]
    model = list(inspect.signature(pliant.CGGRModel).parameters)
    assert model[:4] == ["model", "router", "min_tokens_ratio", "warmup_steps"]
    scorer = list(inspect.signature(pliant.CGGRScorer).parameters)
    assert scorer[:4] == ["router", "min_tokens_ratio", "warmup_steps", "dynamic_threshold"]


def test_the_table_has_a_row_for_every_block(root: Path) -> None:
    assert (root / "docs" / "seeds.md").read_text().count("| works |") == len(BLOCKS)
