"""Scorers on bases in 4 and 8 bits: exact gradients, an untouched base, kilobytes on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.complexity.training.test_trainer import losses, rows, trainer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import pliant
from pliant import CPXCausalLM, CPXTokenizer, loading
from pliant.adapters import attached
from pliant.adapters.quantized import PACKS
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.errors import UnsupportedModel

IDS = torch.tensor([[5, 6, 7, 8, 9]])
BITS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "8 bits, nothing set apart": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True),
    "nf4, scales in 8 bits": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}
FOUR = BITS["4 bits"]
WIDTH, SMALL = 128, 10_000  # bytes: two vectors of that width, a number, a config and a card
quantized = pytest.mark.parametrize("how", BITS.values(), ids=BITS.keys())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama whose layers say more than what passes them by; its tokenizer is nano-s's."""
    where = tmp_path_factory.mktemp("base")
    tokenizer = loading.load_tokenizer("nano-s")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            initializer_range=0.15,
        )
    ).save_pretrained(where)
    tokenizer.save_pretrained(where)
    yield where


def load(folder: Path, how: BitsAndBytesConfig) -> Any:
    return loading.load_model(folder, quantization_config=how)


def scorer_on(model: nn.Module) -> Complexity:
    """A scorer with random parameters, always the same."""
    scorer = attach(model, CPXConfig())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (scorer.rows, scorer.head.weight):
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.25)
    return scorer


def gradient(scorer: Complexity, count: int = 1) -> Tensor:
    scorer.zero_grad()
    (scorer.logits(IDS.repeat(count, 1)).sum() / count).backward()
    assert scorer.rows.grad is not None
    return scorer.rows.grad.clone()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the base is made of, scales included."""
    ours = {id(p) for adapter in attached(model).values() for p in adapter.parameters()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in ours}
    for name, module in model.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            weights[f"{name} scales"] = state.absmax.clone()
        if hasattr(state_8bit := getattr(module, "state", None), "SCB"):  # there after a forward
            scales = module.weight.SCB if state_8bit.SCB is None else state_8bit.SCB
            weights[f"{name} scales"] = scales.clone()
    return weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@quantized
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_the_seeds_loop_runs(folder: Path, how: BitsAndBytesConfig, device_map: str) -> None:
    tokenizer = CPXTokenizer.from_pretrained(folder, cpx_token="[CPX]")
    model = CPXCausalLM.from_pretrained(
        folder,
        cpx_token_id=tokenizer.convert_tokens_to_ids("[CPX]"),
        num_labels=1,
        is_cpx_token_trainable=True,
        tokenizer_size=len(tokenizer),
        device_map=device_map,
        quantization_config=how,
    )
    assert model.base_model.is_quantized
    inputs = tokenizer("2 + 2 [CPX]", return_tensors="pt")
    logits, outputs = model(inputs["input_ids"], inputs["attention_mask"])
    logits.sum().backward()
    assert logits.shape == (1, 1) and outputs.logits.shape[:2] == (1, 1)
    assert {p.dtype for p in model.scorer.parameters()} == {torch.float32}
    assert not any(p.requires_grad for _, p in model.scorer.base_parameters())
    output = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    plain = loading.load_model(folder, quantization_config=how).generate(
        inputs["input_ids"][:, :-1], max_new_tokens=3, do_sample=False
    )
    assert output.sequences[0].tolist() == plain[0].tolist()


@quantized
def test_the_rows_gradient_is_that_of_the_weights(folder: Path, how: BitsAndBytesConfig) -> None:
    """Of one prompt as of two, and as the same weights give it that nothing is packed in."""
    scorer = scorer_on(load(folder, how))
    one, two = gradient(scorer), gradient(scorer, 2)
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    plain = load(folder, how).dequantize()
    expected = gradient(scorer_on(plain.float()))
    if how.load_in_4bit:
        assert torch.allclose(one, expected, rtol=1e-3, atol=1e-3)
    else:  # what goes in is rounded to 8 bits as well
        assert cosine_similarity(one.flatten(), expected.flatten(), dim=0) > 0.99


def test_the_gradient_is_how_the_score_changes(folder: Path) -> None:
    scorer = scorer_on(load(folder, FOUR))
    scorer.score([IDS[0].tolist()])  # in eval mode, without gradient: when layers would be packed
    slope = gradient(scorer)
    direction, logits = slope / slope.norm(), []
    with torch.no_grad():
        for step in (0.02, -0.04):
            scorer.rows.add_(step * direction)
            logits.append(scorer.logits(IDS).item())
    assert (logits[0] - logits[1]) / 0.04 == pytest.approx(float(slope.norm()), rel=0.02)


@quantized
def test_scores_do_not_depend_on_the_batch(folder: Path, how: BitsAndBytesConfig) -> None:
    scorer = scorer_on(load(folder, how))
    prompts = [row["input_ids"] for row in rows(8)]
    alone = torch.tensor([scorer.score([prompt]).logits[0, 0] for prompt in prompts])
    together = torch.tensor(scorer.score(prompts, batch_size=8).logits[:, 0])
    # In 8 bits, what another prompt of the batch makes large is set apart in all of them.
    tolerance = 0.2 if how.load_in_8bit and how.llm_int8_threshold else 1e-3
    assert torch.allclose(alone, together, atol=tolerance) and alone.std() > 1


@quantized
def test_it_learns_and_the_base_stays(
    folder: Path, how: BitsAndBytesConfig, tmp_path: Path
) -> None:
    model = load(folder, how)
    scorer, before = attach(model, CPXConfig()), bits(model)
    run = trainer(scorer, tmp_path / "run", num_epochs=8)
    run.train()
    assert run.report.storage["train"].where == "memory"
    assert sum(losses(run)[-6:]) < 0.8 * sum(losses(run)[:6])
    assert same(bits(model), before)
    folder_of = tmp_path / "scorer"
    scorer.save_pretrained(folder_of)
    assert sum(path.stat().st_size for path in folder_of.iterdir()) < SMALL
    again = CPXCausalLM.from_pretrained(folder_of, base=folder, quantization_config=how)
    prompts = [row["input_ids"] for row in rows(8)]
    assert again.score(prompts).logits.tolist() == scorer.score(prompts).logits.tolist()


@pytest.mark.parametrize("double", [False, True])
def test_a_base_that_ran_before_is_taken_back(folder: Path, double: bool) -> None:
    """Packed or not, and whatever its state_dict did to it: within what bf16 scales change."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    expected = scorer_on(load(folder, how)).score(IDS).logits
    model = load(folder, how)
    with torch.no_grad():
        model(IDS)
        model.state_dict()
    scorer = scorer_on(model)
    assert scorer.score(IDS).logits == pytest.approx(expected, rel=0.02)
    assert gradient(scorer).norm() == pytest.approx(
        float(gradient(scorer_on(load(folder, how))).norm()), rel=0.02
    )


def test_layers_may_be_packed_again_when_the_last_scorer_leaves(folder: Path) -> None:
    model = load(folder, FOUR)
    layer = model.model.layers[0].mlp.up_proj
    setattr(layer, PACKS, True)  # as on a CPU with bf16 instructions
    one, other = attach(model, CPXConfig()), attach(model, CPXConfig(), name="other")
    assert not getattr(layer, PACKS)
    one.detach()
    assert not getattr(layer, PACKS)
    other.detach()
    assert getattr(layer, PACKS)


def test_widths_that_bitsandbytes_cannot_pack() -> None:
    """nano-s is 192 wide, and its keys and values 64 or less."""
    model, tokenizer = pliant.load("nano-s", quantization_config=FOUR)
    scorer = attach(model, CPXConfig(), tokenizer)
    assert gradient(scorer_on_other(scorer)).norm() > 0
    assert scorer.score(["What is 2 + 2?"]).score == pytest.approx([0.5])


def scorer_on_other(scorer: Complexity) -> Complexity:
    other = attach(scorer.base, CPXConfig(), name="other")
    nn.init.ones_(other.head.weight)
    return other


def test_it_does_not_leave_as_a_stock_checkpoint(folder: Path, tmp_path: Path) -> None:
    scorer = attach(load(folder, FOUR), CPXConfig(bias=False))
    with pytest.raises(UnsupportedModel, match="quantised: load the base in 16 or 32 bits"):
        scorer.export(tmp_path / "stock", CPXTokenizer.from_pretrained(folder))
