"""The survey asks, answers with reasons, and examines a model of any size without its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, LlamaConfig, MambaConfig, ReformerConfig, XLMConfig

from pliant.anatomy.tiny import tiny_config, tiny_model
from pliant.errors import UnsupportedModel
from pliant.survey import (
    CAPABILITIES,
    Capability,
    Examination,
    Specimen,
    Verdict,
    ask,
    examine,
    register,
)
from pliant.survey.__main__ import Row, count, page, write
from pliant.survey.capability import PARTS, by_part, yes_if
from pliant.survey.foundation import chosen_logits, head
from pliant.survey.structure import head_gates

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


@pytest.fixture
def registry() -> Iterator[list[Capability]]:
    """The capabilities, put back afterwards."""
    saved = list(CAPABILITIES)
    yield CAPABILITIES
    CAPABILITIES[:] = saved


# --- asking ---


def test_a_registered_check_is_asked() -> None:
    llama = Specimen("llama")
    assert ask(llama)["runs"] == Verdict(True)


def test_a_later_part_registers_its_own_question(registry: list[Capability]) -> None:
    @register("experts", "has a projection", needs=["runs"])
    def check(specimen: Specimen) -> Verdict:
        """Is there
        one?

        It was not checked.
        """
        return yes_if(False, "not checked")

    assert registry[-1].check is check and registry[-1].question == "Is there one?"
    assert ask(Specimen("llama"))["has a projection"] == Verdict(False, "not checked")


def test_what_lacks_a_need_has_its_reason_and_is_not_run() -> None:
    def impossible(_: Specimen) -> Verdict:
        raise AssertionError("asked all the same")

    first = Capability("a", "first", "?", lambda _: Verdict(False, "too small"))
    second = Capability("a", "second", "?", impossible, needs=("first",))
    assert ask(Specimen("llama"), [first, second])["second"] == Verdict(False, "too small")


def test_an_error_of_the_model_is_its_reason() -> None:
    def broken(_: Specimen) -> Verdict:
        raise RuntimeError("shapes\n  do not fit")

    answers = ask(Specimen("llama"), [Capability("a", "broken", "?", broken)])
    assert answers["broken"] == Verdict(False, "RuntimeError: shapes do not fit")


def test_a_name_is_registered_once(registry: list[Capability]) -> None:
    with pytest.raises(AssertionError):
        register("foundation", "runs")(lambda _: Verdict(True))


def test_asking_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ask(Specimen("reformer"))
    assert capsys.readouterr().out == ""


def test_asking_leaves_the_model_as_it_was() -> None:
    specimen = Specimen("gpt2")
    before = {name: value.clone() for name, value in specimen.model.state_dict().items()}
    ask(specimen)
    after = specimen.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in specimen.model.modules())


# --- a check can fail ---


def test_a_head_count_that_is_wrong_is_noticed() -> None:
    specimen = Specimen("llama")
    right = specimen.anatomy.attentions(0)[0]
    specimen.anatomy._attention[0] = (replace(right, heads=2),)
    assert ask(specimen)["attention"] == Verdict(False, "one takes 64 features, not 32")


def test_layers_that_run_twice_are_noticed() -> None:
    answer = ask(Specimen("hrm_text"))["in order"]
    assert not answer.ok and "0, 1, 0, 1" in answer.reason


def test_logits_that_are_scaled_or_capped_are_told_apart() -> None:
    assert "scales its logits by 0.0625" in head(Specimen("cohere")).reason
    assert "caps its logits" in head(Specimen("gemma2")).reason
    assert head(Specimen("llama")) == head(Specimen("bert")) == Verdict(True)


def test_a_head_without_effect_is_noticed() -> None:
    specimen = Specimen("llama")
    specimen.anatomy.attentions(0)[0].output.weight.data.zero_()
    assert head_gates(specimen) == Verdict(False, "a gate at 0 has no effect")


def test_a_model_that_ignores_logits_to_keep_is_noticed() -> None:
    assert chosen_logits(Specimen("prophetnet")) == Verdict(False, "it takes no logits_to_keep")


# --- examining ---


@pytest.fixture(scope="module")
def large() -> Examination:
    return examine(LLAMA_70B)


def test_a_70b_is_examined_from_its_config(large: Examination) -> None:
    assert large.sizes is not None
    assert large.sizes.parameters == 70_553_706_496
    assert large.sizes.bytes["bf16"] == 2 * large.sizes.parameters
    assert large.sizes.bytes["int4"] == large.sizes.parameters // 2
    assert (large.sizes.layers, large.sizes.attention_layers) == (80, 80)
    assert (large.sizes.heads, large.sizes.kv_heads) == ((64,), (8,))
    # keys and values x layers x key heads x head_dim x bf16
    assert large.sizes.cache_bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert [finding.name for finding in large.findings if not finding.ok] == ["fewer experts"]


def test_parameters_are_those_of_the_parts_and_the_rest_is_norms(large: Examination) -> None:
    assert large.sizes is not None
    parts = sum(large.sizes.layer_parameters) + large.sizes.embedding_parameters
    assert large.sizes.parameters - parts == LLAMA_70B.hidden_size


def test_an_examination_is_plain_data(large: Examination) -> None:
    plain: dict[str, Any] = json.loads(json.dumps(large.as_dict()))
    assert plain["model_type"] == "llama"
    every = len(CAPABILITIES)  # a Llama is no mixture of experts
    assert str(large) == f"LlamaForCausalLM has {every - 1} of {every} capabilities."
    assert [finding["name"] for finding in plain["findings"]] == [c.name for c in by_part()]


def test_capabilities_are_shown_part_by_part_and_all_of_them() -> None:
    shown = [capability.part for capability in by_part()]
    assert shown == sorted(shown, key=PARTS.index)
    assert sorted(c.name for c in by_part()) == sorted(c.name for c in CAPABILITIES)


def test_estimates_tell_their_formula(large: Examination) -> None:
    by_part = {estimate.part: estimate for estimate in large.estimates}
    assert set(by_part) == {"complexity", "structure", "experts", "gradients"}
    assert by_part["structure"].bytes == 4 * (80 * 64 + 80)
    assert "5120 heads + 80 layers" in by_part["structure"].formula


def test_sizes_are_those_of_the_real_weights() -> None:
    config = tiny_config("mistral")
    sizes = examine(config).sizes
    assert sizes is not None
    assert sizes.parameters == sum(p.numel() for p in tiny_model("mistral").parameters())


def test_a_recurrent_model_has_a_state_and_no_growing_cache() -> None:
    sizes = examine(MambaConfig(num_hidden_layers=2)).sizes
    assert sizes is not None
    assert sizes.attention_layers == sizes.cache_bytes_per_token == 0 < sizes.state_bytes


def test_shared_keys_are_counted_once() -> None:
    own, shared = (
        examine(tiny_config(f"gemma4_text{variant}")).sizes for variant in ("", "+shared_keys")
    )
    assert own is not None and shared is not None
    assert shared.cache_bytes_per_token * 2 == own.cache_bytes_per_token


def test_a_model_whose_layers_are_not_found_is_examined_as_far_as_it_goes() -> None:
    examination = examine(tiny_config(XLMConfig()))
    assert examination.sizes is None and examination.estimates == ()
    assert {f.name: f.ok for f in examination.findings}["runs"]


def test_what_is_no_causal_lm_is_refused_in_one_line() -> None:
    with pytest.raises(UnsupportedModel, match="'clip' is no causal language model"):
        examine(CLIPConfig())
    with pytest.raises(UnsupportedModel, match="cannot build a 'reformer' model") as refusal:
        examine(ReformerConfig(is_decoder=False))
    assert "\n" not in str(refusal.value)


# --- the page ---


def table() -> list[Row]:
    yes = {c.name: Verdict(True) for c in CAPABILITIES}
    no = {**yes, "crop": Verdict(False, "a | b"), "runs": Verdict(True, "slowly")}
    return [Row("one", yes), Row("one+more", no), Row("two", no)]


def test_the_page_counts_types_and_not_their_variants() -> None:
    assert (count(table(), "crop"), count(table(), "runs")) == (1, 2)
    assert "Of 2 types, **2 build and run**" in page(table())


def test_a_reason_is_listed_once_and_breaks_no_table() -> None:
    text = page(table())
    assert text.count("a \\| b") == 1 and text.count("slowly") == 1
    rows = [line for line in text.splitlines() if line.startswith(("| one", "| two"))]
    assert {line.count("|") for line in rows} == {len(CAPABILITIES) + 2}
    assert "✗ 2" in rows[1] and "✓ 1" in rows[1] and "✗" not in rows[0]


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.md"
    write(target, "text\n")
    assert target.read_text() == "text\n"
    assert list(target.parent.iterdir()) == [target]
