"""The Python blocks of the seeds that CPX came from run: other imports, another model's name.

What each block needs and does not make (a dataloader, say) is supplied beside it. The blocks that
no code can run are in docs/seeds.md, with why; a test counts that none is missing there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pliant
from pliant.complexity.facade import CPXCausalLM
from pliant.errors import InvalidInput

BASIC_USAGE = """
from pliant import CPXTokenizer
from pliant import CPXCausalLM

# Choose any causal LM
model_name = "nano-s"  # or "gpt2", "meta-llama/Llama-2-7b-hf", etc.

# Load tokenizer with CPX token
tokenizer = CPXTokenizer.from_pretrained(model_name, cpx_token='[CPX]')
cpx_token_id = tokenizer.convert_tokens_to_ids('[CPX]')

# Load model with CPX wrapper
model = CPXCausalLM.from_pretrained(
    model_name,
    cpx_token_id=cpx_token_id,
    num_labels=1,
    is_cpx_token_trainable=True,
    tokenizer_size=len(tokenizer),
    device_map="auto"
)

# Use the model
text = "Explain quantum computing [CPX]"
inputs = tokenizer(text, return_tensors="pt")

# Get complexity score
classifier_logits, outputs = model(
    input_ids=inputs['input_ids'],
    attention_mask=inputs['attention_mask']
)

import torch
complexity_score = torch.sigmoid(classifier_logits).item()
print(f"Complexity score: {complexity_score:.4f}")
"""

TRAINING = """
# Your training loop
for batch in dataloader:
    input_ids = batch['input_ids']
    attention_mask = batch['attention_mask']
    labels = batch['labels']
    
    # Forward pass
    classifier_logits, _ = model(input_ids=input_ids, attention_mask=attention_mask)
    
    # Compute loss
    loss = loss_fn(classifier_logits.squeeze(), labels.float())
    
    # Backward pass (only trains classifier + CPX embedding)
    loss.backward()
    optimizer.step()
"""  # noqa: W293

CONFIGURATION = """
@dataclass
class CPXTrainingConfig:
    # CPX-specific
    cpx_token = '[CPX]'
    is_cpx_token_trainable = True
    num_labels = 1
    
    # Training
    learning_rate = 1e-5
    weight_decay = 0.01
    num_epochs = 200
    
    # Memory optimization
    gradient_checkpointing = True
"""  # noqa: W293

GRADIENT_MASKING = """
class MaskGradHook:
    def __init__(self, token_id):
        self.token_id = token_id
    
    def __call__(self, grad):
        mask = torch.zeros_like(grad)
        mask[self.token_id] = 1.0
        return grad * mask
"""  # noqa: W293

GRADIENT_MASKING_AGAIN = """
class MaskGradHook:
    \"\"\"
    Ensures only CPX token embedding gets gradients
    \"\"\"
    def __init__(self, token_id):
        self.token_id = token_id
    
    def __call__(self, grad):
        mask = torch.zeros_like(grad)
        mask[self.token_id] = 1.0
        return grad * mask
"""  # noqa: W293

HIDDEN_SIZE = """
def _get_hidden_size(self):
    for attr in ['hidden_size', 'd_model', 'n_embd', 'dim']:
        if hasattr(config, attr):
            return getattr(config, attr)
"""

AFTER_MIGRATION = """
from pliant import CPXCausalLM

model = CPXCausalLM.from_pretrained("nano-s")  # Works with ANY causal LM!
"""


def run(block: str, **supplied: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "seed", **supplied}
    exec(block, names)
    return names


def test_basic_usage(capsys: pytest.CaptureFixture[str]) -> None:
    left = run(BASIC_USAGE)
    assert "Complexity score: 0.5000" in capsys.readouterr().out, "an untrained one knows nothing"
    assert left["cpx_token_id"] == 260 and len(left["tokenizer"]) == 261
    assert left["outputs"].logits.shape == (1, 1, 260)


def test_training() -> None:
    left = run(BASIC_USAGE)
    model, tokenizer = left["model"], left["tokenizer"]
    texts = ["What is 3 + 4?", "Is it?", "Sort: b a c", "Which is largest: 3 9 27?"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    batch["labels"] = torch.tensor([0, 0, 1, 1])
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == 48 + 48 + 1, "one row, and the head"
    before = {name: p.clone() for name, p in model.base_model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    supplied = {
        "dataloader": [batch] * 20,
        "model": model,
        "loss_fn": nn.BCEWithLogitsLoss(),
        "optimizer": optimizer,
    }
    losses = [run(TRAINING, **supplied)["loss"].item() for _ in range(2)]
    assert losses[1] < losses[0] < 0.69
    assert all(torch.equal(before[n], p) for n, p in model.base_model.state_dict().items())


def test_configuration() -> None:
    """The seed's settings are ours, by the same names."""
    seed = run(CONFIGURATION, dataclass=dataclass)["CPXTrainingConfig"]
    settings = {name: v for name, v in vars(seed).items() if not name.startswith("__")}
    assert len(settings) == 7
    ours = pliant.CPXTrainingConfig(**settings)
    assert {name: getattr(ours, name) for name in settings} == settings


def test_gradient_masking_has_no_row_to_mask() -> None:
    """The seed masks the gradient of the whole vocabulary; here it never has one."""
    for block in (GRADIENT_MASKING, GRADIENT_MASKING_AGAIN):
        mask = run(block, torch=torch)["MaskGradHook"](3)
        assert mask(torch.ones(5, 2)).nonzero()[:, 0].unique().tolist() == [3]
    model = CPXCausalLM.from_pretrained("nano-s")
    with torch.no_grad():
        model.classifier.weight.normal_()
    model(torch.tensor([[70, 71, 72, 260]]), labels=torch.ones(1)).loss.backward()
    assert model.base_model.get_input_embeddings().weight.grad is None
    assert model.scorer.rows.grad.shape == (1, 48) and model.scorer.rows.grad.any()


def test_hidden_size() -> None:
    model = CPXCausalLM.from_pretrained("nano-s")
    names = run(HIDDEN_SIZE, config=model.config)
    assert names["_get_hidden_size"](None) == model.classifier.in_features == 48


def test_after_the_migration() -> None:
    assert isinstance(run(AFTER_MIGRATION)["model"], CPXCausalLM)


def test_the_architecture_s_parts() -> None:
    """cpx-wrapper-architecture.md: base_model, classifier, config, cpx_token_id."""
    model = CPXCausalLM.from_pretrained("nano-s")
    assert type(model.base_model).__name__ == "LlamaForCausalLM"
    assert isinstance(model.classifier, nn.Linear) and model.classifier.out_features == 1
    assert model.cpx_token_id == model.config.cpx_token_id == 260
    assert model.config.hidden_size == 48
    assert isinstance(model, nn.Module)


def test_the_older_names() -> None:
    assert pliant.CPXMistralTokenizer is pliant.CPXTokenizer
    assert pliant.CPXMistralConfig is pliant.CPXConfig
    assert pliant.MistralTrainingConfig is pliant.CPXTrainingConfig
    assert pliant.CPXMistralDatasetConfig is pliant.CPXDatasetConfig


def test_what_cannot_run_is_in_the_table(root: Path) -> None:
    """Of the seeds' nine Python blocks: seven run above, two have a row that says why not."""
    table = (root / "docs" / "seeds.md").read_text()
    assert table.count("| runs |") == 7 and table.count("| cannot run |") == 2


def test_a_wrong_tokenizer_is_said() -> None:
    """The seed resized the vocabulary to `tokenizer_size`; here it is only checked."""
    with pytest.raises(InvalidInput, match="tokenizer_size"):
        CPXCausalLM.from_pretrained("nano-s", cpx_token_id=260, tokenizer_size=32001)
