"""The Python blocks of the seed that structure came from run: other imports, another model's name.

They run on every architecture of the seed's table, in the seed's order and with its variables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.structure.models import ARCHITECTURES, logits, same_bits, saved

import pliant

BASIC_USAGE = """
from pliant import load_baseline_model, load_adaptive_model
from transformers import AutoTokenizer
import torch

# Load model and tokenizer
model_name = "{name}"  # Or any supported model
device = torch.device("cpu")  # Or "cuda" for GPU
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token

# Load baseline model
baseline_model = load_baseline_model(model_name, device)

# Convert to adaptive model
adaptive_model = load_adaptive_model(model_name, baseline_model, device)

# Generate text
prompt = "The future of AI is"
inputs = tokenizer(prompt, return_tensors="pt").to(device)
outputs = adaptive_model.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_length=30,
    do_sample=True
)
generated_text = tokenizer.decode(outputs[0], skip_special_tokens=True)
print(generated_text)
"""

PRUNING = """
import torch
import numpy as np

# Apply pruning to 50% of attention heads
pruning_level = 0.5
num_layers = len(adaptive_model.blocks)
num_heads = adaptive_model.blocks[0]["attn"].num_heads
total_heads = num_layers * num_heads
heads_to_prune = int(total_heads * pruning_level)

# Get a flattened list of (layer, head) tuples
all_heads = [(l, h) for l in range(num_layers) for h in range(num_heads)]

# Randomly select heads to prune
pruned_head_indices = np.random.choice(len(all_heads), heads_to_prune, replace=False)

# Set gates to near-zero for pruned heads
with torch.no_grad():
    for idx in pruned_head_indices:
        layer_idx, head_idx = all_heads[idx]
        adaptive_model.blocks[layer_idx]["attn"].gate[head_idx] = torch.tensor(0.001, device=device)

# Generate text with pruned model
outputs = adaptive_model.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_length=30,
    do_sample=True
)
pruned_text = tokenizer.decode(outputs[0], skip_special_tokens=True)
print(pruned_text)
"""

BLOCKS = (BASIC_USAGE, PRUNING)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_page_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(name, tmp_path / name)
    names: dict[str, Any] = {"__name__": "seed"}
    exec(BASIC_USAGE.format(name=folder), names)
    adaptive, ids = names["adaptive_model"], names["inputs"].input_ids
    assert names["outputs"].shape[1] <= 30 and names["generated_text"].startswith(names["prompt"])
    before = logits(pliant.load_baseline_model(folder), ids)
    assert same_bits(logits(adaptive, ids), before)

    exec(PRUNING, names)
    gates = torch.cat([block["attn"].gate.detach() for block in adaptive.blocks])
    assert int((gates == torch.tensor(0.001)).sum()) == names["heads_to_prune"] == len(gates) // 2
    assert not torch.allclose(logits(adaptive, ids), before, atol=1e-4)
    assert names["pruned_text"].startswith(names["prompt"])
    printed = capsys.readouterr().out
    assert names["generated_text"] in printed and names["pruned_text"] in printed
    assert same_bits(logits(adaptive.detach(), ids), before)


def test_the_table_has_a_row_for_every_block(root: Path) -> None:
    """Of the seed's three: two run above, one has a row that says why not."""
    section = (root / "docs" / "seeds.md").read_text().split("\n## Sentinel")[1].split("\n## ")[0]
    assert section.count("| as written |") == len(BLOCKS)
    assert section.count("| an excerpt |") == 1
