"""A scorer is exported as a stock checkpoint that agrees with it without Pliant, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.complexity.test_tokenizer import (
    HOSTILE,
    TEXTS,
    byte_level,
    metaspace,
    word_pieces,
)
from tests.processes import Program
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pliant.adapters import fingerprint
from pliant.anatomy.config import truncated_config
from pliant.anatomy.tiny import tiny_config, tiny_model
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.export import BOUNDS, export
from pliant.complexity.facade import CPXCausalLM
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.loading import load
from pliant.routing.metrics.calibration import Isotonic, Platt, Temperature

PROMPTS = ["What is 3 + 4?", "[CPX] easy [CPX]!", "Sort: pear apple fig", "x"]


def of_bytes() -> PreTrainedTokenizerFast:
    """A token for each of a tiny model's 256 embeddings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0])


def trained(model: PreTrainedModel, tokenizer: Any = None, **settings: Any) -> Complexity:
    """A scorer with an opinion."""
    scorer = attach(model, CPXConfig(**settings), tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if name != "rows":
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return scorer


def nano(dtype: str = "float32", **settings: Any) -> Complexity:
    model, tokenizer = load("nano-s", dtype=dtype)
    return trained(model, tokenizer, **settings)


@torch.no_grad()
def stock_logits(folder: Path, prompts: list[str]) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    logits: Tensor = model(**inputs).logits.double()
    return logits


# --- it says the same ---


def test_without_pliant_it_says_the_same(tmp_path: Path, root: Path) -> None:
    """In a process that cannot import it."""
    scorer = nano(bias=False)
    result = scorer.export(tmp_path / "stock")
    words = [str(tmp_path / "stock"), *PROMPTS]
    with Program("tests.complexity.without_pliant", *words, cwd=root) as running:
        printed, errors = running.stdout.read(), running.stderr.read()
        assert running.wait(timeout=60) == 0, errors
    kind, logits = json.loads(printed.splitlines()[-1])
    assert kind == "LlamaForSequenceClassification" == result.architecture
    live = torch.from_numpy(
        scorer.score([*PROMPTS[:1], PROMPTS[1] + " [CPX]", *PROMPTS[2:]]).logits
    )
    torch.testing.assert_close(torch.tensor(logits).double(), live, atol=1e-5, rtol=1e-5)
    assert result.difference <= result.bound == 1e-5


TYPES = ["gpt2", "gemma2", "mistral", "qwen3", "bloom", "opt", "mixtral", "jamba", "gpt_neox"]


@pytest.mark.parametrize("type_", TYPES)
def test_whole_and_at_half_depth_it_says_the_same(type_: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(type_), of_bytes()
    before, weights = fingerprint(model), [p.clone() for p in model.parameters()]
    for layer in (None, 2):
        scorer = trained(model, tokenizer, bias=False, outputs=("score", "gain"), layer=layer)
        result = export(scorer, tmp_path / str(layer))
        assert result.layers == (layer or len(scorer.anatomy.layers)) and result.difference <= 1e-5
        live = torch.from_numpy(scorer.score(TEXTS[3:6]).logits)
        stock = stock_logits(tmp_path / str(layer), TEXTS[3:6])
        torch.testing.assert_close(stock, live, atol=1e-5, rtol=1e-5)
        scorer.detach()
    assert fingerprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert model.get_input_embeddings().weight.shape[0] == 256, "nothing was resized"


def test_a_copy_at_half_depth_is_half_the_model(tmp_path: Path) -> None:
    result = nano(layer=1, bias=False).export(tmp_path / "early")
    assert result.layers == 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "early")
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert json.loads((tmp_path / "early" / "pliant_export.json").read_text())["layers"] == 1


def test_lists_with_an_entry_for_each_layer_are_cut() -> None:
    config = truncated_config(tiny_config("gemma3_text"), 4, 2)
    assert config.num_hidden_layers == len(config.layer_types) == 2
    assert len(tiny_config("gemma3_text").layer_types) == 4
    config = truncated_config(tiny_config("gpt_neo"), 4, 1)
    assert len(config.attention_layers) == config.num_layers == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_a_bound_of_its_own(dtype: str, tmp_path: Path) -> None:
    result = nano(dtype=dtype, bias=False).export(tmp_path / "stock")
    assert result.dtype == dtype
    assert 0 < result.difference <= result.bound == BOUNDS[getattr(torch, dtype)]


@pytest.mark.parametrize("build", [of_bytes, metaspace, word_pieces])
def test_its_tokenizer_appends_the_token_by_itself(build: Any, tmp_path: Path) -> None:
    base = build()
    ours = CPXTokenizer.of(base)
    model = tiny_model("mistral")
    export(trained(model, base), tmp_path / "stock")
    stock = AutoTokenizer.from_pretrained(tmp_path / "stock")
    for text in TEXTS + HOSTILE:
        assert stock(text).input_ids == ours(text).input_ids
    batch = stock(["a b", "a b a b"], padding=True)
    assert batch["attention_mask"][0][-1] == 0, "padded on the right"
    assert stock.chat_template is None, "rendering it would leave [CPX] out"
    export(trained(tiny_model("mistral"), base), tmp_path / "rendered", rendered=True)
    stock = AutoTokenizer.from_pretrained(tmp_path / "rendered")
    assert stock("a b").input_ids == ours("a b", add_special_tokens=False).input_ids


def test_a_vocabulary_that_was_padded_has_room_for_the_token(tmp_path: Path) -> None:
    model = tiny_model("mistral")  # 256 rows
    base = metaspace()  # 102 tokens
    scorer = trained(model, base)
    old = model.get_input_embeddings().weight.clone()
    result = export(scorer, tmp_path / "stock")
    assert (result.cpx_token_id, result.rows_added) == (102, 0)
    copy = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    table = copy.get_input_embeddings().weight
    assert torch.equal(table[102], scorer.rows[0])
    assert torch.equal(old, model.get_input_embeddings().weight)
    keep = [i for i in range(256) if i != 102]
    assert torch.equal(table[keep], old[keep])


# --- what has no place ---


@pytest.mark.parametrize(
    ("reads", "problem", "read"),
    [
        ("classes", "single_label_classification", "softmax"),
        ("numbers", "regression", "numbers"),
    ],
)
def test_classes_and_numbers_are_called_so(
    tmp_path: Path, reads: Any, problem: str, read: str
) -> None:
    result = nano(outputs=("maths", "code"), reads=reads).export(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["problem_type"] == problem and result.reads == reads
    readme = (tmp_path / "stock" / "README.md").read_text()
    assert read in readme and "sigmoid" not in readme
    with pytest.raises(InvalidInput, match=f"the outputs are {reads}"):
        result.threshold(0.5)


def test_a_bias_goes_into_the_threshold_and_it_says_so(tmp_path: Path) -> None:
    scorer = nano(outputs=("score", "right:nano-l"))
    result = scorer.export(tmp_path / "stock")
    assert result.shift == pytest.approx(scorer.head.bias.tolist())
    live, stock = scorer.score(PROMPTS[:1]), stock_logits(tmp_path / "stock", PROMPTS[:1])
    shifted = stock.numpy() + result.shift
    assert shifted == pytest.approx(live.logits, abs=1e-5)
    there = torch.sigmoid(stock)[0]
    for output in (0, 1):
        own = float(live.values[0, output])
        assert result.threshold(own, output) == pytest.approx(float(there[output]), abs=1e-5)
    assert (result.threshold(0.0), result.threshold(1.0)) == (0.0, 1.0)
    assert "has a bias" in (tmp_path / "stock" / "README.md").read_text()
    assert json.loads((tmp_path / "stock" / "pliant_export.json").read_text())["shift"]
    nano(bias=False).export(tmp_path / "none")
    assert "bias" not in (tmp_path / "none" / "README.md").read_text()


def test_a_calibration_in_logits_goes_into_the_head(tmp_path: Path) -> None:
    scorer = nano()
    live = scorer.score(PROMPTS[:1])
    for name, calibration in (("t", Temperature(2.0)), ("p", Platt(0.5, 0.25))):
        result = scorer.export(tmp_path / name, calibration=calibration)
        shifted = stock_logits(tmp_path / name, PROMPTS[:1]).numpy() + result.shift
        wanted = calibration.apply(live.score)
        assert 1 / (1 + torch.exp(-torch.tensor(shifted[0]))).numpy() == pytest.approx(
            wanted, abs=1e-5
        )
    with pytest.raises(UnsupportedModel, match="isotonic calibration is a table"):
        scorer.export(tmp_path / "i", calibration=Isotonic((0.0, 1.0), (0.1, 0.9)))
    with pytest.raises(UnsupportedModel, match="gain"):
        nano(outputs=("gain",)).export(tmp_path / "g", calibration=Temperature(2.0))


@pytest.mark.parametrize(
    ("type_", "settings", "expected"),
    [
        ("llama", {"rows": 2}, "2 .CPX. rows"),
        ("llama", {"rows": 2, "aggregation": "mean"}, "2 .CPX. rows"),
        ("llama", {"lora_rank": 2}, "LoRA acts on the .CPX. position alone"),
        ("cohere", {}, "no sequence classifier"),
        ("bert", {}, "does not read one token by one linear layer"),
        ("minicpm3", {"layer": 2}, "does not agree with the scorer"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_has_no_stock_form_is_refused(
    type_: str, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    scorer = trained(tiny_model(type_), of_bytes(), **settings)
    with pytest.raises(UnsupportedModel, match=expected):
        scorer.export(tmp_path / "stock")
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_aggregation_of_one_row_is_that_row(tmp_path: Path) -> None:
    for how in ("mean", "max", "attention"):
        assert nano(aggregation=how).export(tmp_path / how).difference <= 1e-5


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    scorer = nano()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("long")
    with pytest.raises(InvalidInput, match="exists"):
        scorer.export(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "long"
    (tmp_path / "empty").mkdir()
    scorer.export(tmp_path / "empty")
    with pytest.raises(InvalidInput, match="exists"):
        scorer.export(tmp_path / "empty")


def test_it_needs_a_tokenizer_that_can_pad(tmp_path: Path) -> None:
    scorer = nano()
    tokenizer, scorer.tokenizer = scorer.tokenizer, None
    with pytest.raises(InvalidInput, match="has no tokenizer"):
        scorer.export(tmp_path / "stock")
    assert scorer.export(tmp_path / "stock", tokenizer).cpx_token == "[CPX]"
    own = CPXTokenizer.of(tokenizer, "<hard?>")
    assert scorer.export(tmp_path / "own", own).cpx_token == "<hard?>"
    bare = of_bytes()
    bare.eos_token = bare.pad_token = None
    with pytest.raises(InvalidInput, match="256 embeddings"):
        trained(tiny_model("llama"), byte_level()).export(tmp_path / "another")
    with pytest.raises(InvalidInput, match="no token to pad with"):
        trained(tiny_model("llama"), bare).export(tmp_path / "bare")


def test_the_proof_does_not_believe_an_untrained_head(tmp_path: Path) -> None:
    """Whose logits are all zero, whatever it reads."""
    model = tiny_model("minicpm3")
    scorer = attach(model, CPXConfig(layer=2), of_bytes())
    with pytest.raises(UnsupportedModel, match="does not agree"):
        scorer.export(tmp_path / "stock")


def test_the_facade_leaves_the_same_way(tmp_path: Path) -> None:
    model = CPXCausalLM.from_pretrained("nano-s")
    model.save_pretrained(tmp_path / "scorer")
    again = CPXCausalLM.from_pretrained(tmp_path / "scorer")
    assert again.export(tmp_path / "stock").architecture == "LlamaForSequenceClassification"


def test_an_adapter_on_the_base_is_no_part_of_the_proof_s_excuse(tmp_path: Path) -> None:
    """What else is attached and acts makes the live scorer another: the proof notices."""
    scorer = nano()
    layer = scorer.anatomy.layers[0]
    with (
        layer.register_forward_hook(lambda module, args, output: output * 1.01),
        pytest.raises(UnsupportedModel, match="does not agree with the scorer"),
    ):
        scorer.export(tmp_path / "stock")
