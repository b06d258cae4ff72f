"""Agency: states multiply gates, consent locks, and what is observed is what is there."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import anatomy_of, same_anatomy
from tests.structure.models import ARCHITECTURES, IDS, logits, model, same_bits
from torch.nn.functional import cross_entropy

from pliant.errors import AdapterError, InvalidInput, PliantError
from pliant.structure import AgencyConfig, GateConfig, Gates, attach, attach_agency
from pliant.structure.agency import Agency

BATCH = {"input_ids": IDS}


def agency_of(base: Any = None, **config: Any) -> Agency:
    return attach_agency(attach(model() if base is None else base), AgencyConfig(**config))


def gate(agency: Agency, layer: int, head: int, value: float) -> None:
    """A write past Agency."""
    with torch.no_grad():
        agency.gates["heads", layer][head] = value


# --- states ---------------------------------------------------------------------------------------


STATE_WEIGHTS = {"active": 1.0, "overloaded": 0.5, "misaligned": 0.7, "withdrawn": 0.0}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_state_multiplies_the_gate_and_is_undone_exactly(name: str) -> None:
    base = model(name)
    before = logits(base)
    agency = agency_of(base)
    assert same_bits(logits(base), before), "all active: no bit changes"
    for state, weight in STATE_WEIGHTS.items():
        gate(agency, 1, 2, 0.8)
        assert agency.set_head_state(1, 2, state)  # type: ignore[arg-type]
        with_state = logits(base)
        assert agency.gates["heads", 1][2] == torch.tensor(0.8), "the gate keeps its value"
        assert agency.set_head_state(1, 2, "active")
        gate(agency, 1, 2, 0.8 * weight)
        assert torch.allclose(with_state, logits(base), atol=1e-6)
        gate(agency, 1, 2, 1)
        assert same_bits(logits(base), before)


def test_it_comes_off_without_a_trace() -> None:
    base = model()
    parts = anatomy_of(base)
    agency = agency_of(base)
    gates, keys = agency.gates, set(base.state_dict())
    agency.set_head_state(0, 0, "withdrawn")
    agency.observe(BATCH)
    assert set(base.state_dict()) == keys == set(model().state_dict())
    with agency.disabled():
        assert same_bits(logits(base), logits(model()))
    agency.detach()
    assert same_bits(logits(base), logits(model())), "only the state was away from neutral"
    gates.detach()
    assert same_anatomy(anatomy_of(base), parts)


def test_a_head_in_generation_with_the_cache() -> None:
    agency = agency_of()
    agency.set_head_state(0, 1, "overloaded")
    base: Any = agency.base
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = [base.generate(IDS, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*tokens)


def test_a_compiled_model_sees_a_change_of_state() -> None:
    agency = agency_of()
    compiled: Any = torch.compile(agency.base, fullgraph=True, backend="eager")
    try:
        assert torch.allclose(logits(compiled), logits(agency.base), atol=1e-5)
        agency.set_head_state(2, 0, "withdrawn")
        assert torch.allclose(logits(compiled), logits(agency.base), atol=1e-5)
        assert not torch.allclose(logits(compiled), logits(model()), atol=1e-4)
    finally:
        torch.compiler.reset()


def test_a_copy_of_the_model_has_states_of_its_own() -> None:
    agency = agency_of()
    copied: Any = copy.deepcopy(agency.base)
    copied.pliant.agency.set_head_state(0, 0, "withdrawn")
    assert same_bits(logits(agency.base), logits(model()))
    assert not torch.allclose(logits(copied), logits(model()), atol=1e-4)


# --- consent --------------------------------------------------------------------------------------


def test_no_write_opens_a_head_without_consent() -> None:
    agency = agency_of()
    assert agency.set_head_state(1, 0, "active", consent=False)
    locked = logits(agency.base)
    gate(agency, 1, 0, 3)
    assert same_bits(logits(agency.base), locked), "a direct write has no effect"
    assert not agency.set_gate(1, 0, 0.9)
    assert agency.gates["heads", 1][0] == 3, "a write through Agency is refused"
    assert not agency.set_head_state(1, 0, "active")
    assert not agency.set_head_state(1, 0, "overloaded", reason="controller")
    reasons = [violation.reason for violation in agency.violations]
    assert reasons == [
        "set_gate: 0.9 was refused",
        "set_head_state: 'active' was refused",
        "controller: 'overloaded' was refused",
    ]
    assert agency.set_head_state(1, 0, "active", consent=True)
    assert agency.set_gate(1, 0, 1) and same_bits(logits(agency.base), logits(model()))
    assert len(agency.violations) == 3


def test_training_the_gates_opens_no_locked_head() -> None:
    agency = agency_of()
    agency.set_head_state(0, 0, "active", consent=False)
    agency.set_head_state(0, 1, "withdrawn")
    optimizer = torch.optim.SGD(agency.gates.parameters(), lr=1.0)
    base: Any = agency.base
    base(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = (agency.gates["heads", 0] != 1).tolist()
    assert changed == [False, False, True, True], "their derivative is 0"


def test_a_direct_write_is_counted_once_by_the_next_observation() -> None:
    agency = agency_of()
    agency.set_head_state(1, 0, "withdrawn")
    agency.set_head_state(1, 1, "active", consent=False)
    agency.observe(BATCH)
    assert agency.violations == [], "a gate that was 1 when it was locked"
    gate(agency, 1, 0, 0.2)
    agency.observe(BATCH)
    assert agency.violations == [], "it was lowered"
    gate(agency, 1, 1, 1.5)
    gate(agency, 2, 2, 1.5)  # not locked
    for _ in range(2):
        agency.observe(BATCH)
    (violation,) = agency.violations
    assert (violation.layer, violation.head, violation.observation) == (1, 1, 3)
    assert violation.reason == "its gate was raised from 1 to 1.5, without effect"


def locked_in_two_patterns() -> Agency:
    """Head 0 of layer 0 is withdrawn; its gate is 0.6 in pattern "a", which is active, 1 in "b"."""
    gates = attach(model(), GateConfig(patterns=("a", "b")))
    agency = attach_agency(gates)
    gate(agency, 0, 0, 0.6)
    agency.set_head_state(0, 0, "withdrawn")
    return agency


def test_the_lock_holds_in_every_pattern_and_a_change_of_pattern_is_no_write() -> None:
    agency = locked_in_two_patterns()
    agency.gates.add_pattern("c", like="b")
    agency.gates.use("b")
    agency.observe(BATCH)
    assert agency.violations == []
    for name in ("a", "b", "c"):
        agency.gates.use(name)
        closed = logits(agency.base)
        gate(agency, 0, 0, 3)
        assert same_bits(logits(agency.base), closed)
    with agency.gates.rows(["a", "b"]):
        rows = logits(agency.base)
        assert torch.allclose(rows, closed, atol=1e-6)


def test_a_write_is_counted_in_the_pattern_that_was_written(tmp_path: Path) -> None:
    agency = locked_in_two_patterns()
    with torch.no_grad():
        agency.gates.pattern("b")["heads", "0"][0] = 2.0
    agency.save_pretrained(tmp_path)
    agency.restore(tmp_path)
    for _ in range(2):
        agency.observe(BATCH)
    (violation,) = agency.violations
    assert violation.reason == ("its gate was raised from 1 to 2 in pattern 'b', without effect")
    agency.set_head_state(0, 0, "active")
    agency.set_head_state(0, 0, "withdrawn")  # from now on 2 is what it was
    agency.observe(BATCH)
    assert len(agency.violations) == 1


def test_observing_changes_no_locked_head() -> None:
    agency = agency_of(overload=0.0, momentum=0.0)
    agency.set_head_state(0, 0, "withdrawn")
    agency.set_head_state(0, 1, "active", consent=False)
    agency.observe(BATCH)
    report = agency.get_agency_report()
    states = [head.state for head in report.heads]
    assert states[:2] == ["withdrawn", "active"] and set(states[2:]) == {"overloaded"}


# --- observing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_utilisation_is_the_running_average_of_one_minus_entropy(name: str) -> None:
    base: Any = model(name)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        weights = base(IDS, output_attentions=True, use_cache=False).attentions[1]
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean((0, 2)) / math.log(12)
    agency = agency_of(model(name))
    for expected in (0.1, 0.19, 0.271):
        agency.observe(BATCH)
        seen = [head.utilisation for head in agency.get_agency_report().heads if head.layer == 1]
        assert torch.allclose(torch.tensor(seen), expected * (1 - entropy), atol=1e-5)


def test_the_derivative_is_that_of_the_loss_by_differences() -> None:
    base = model().double()
    agency = agency_of(base, derivative_momentum=0.0)
    agency.set_head_state(1, 3, "overloaded")  # its weight is divided out again
    agency.observe(BATCH)
    differences = []
    for head in range(4):
        step = 1e-3 / float(agency.heads["1"].weight[head])
        losses = []
        for value in (1 + step, 1 - step):
            gate(agency, 1, head, value)
            predictions = logits(base)[:, :-1].flatten(0, 1)
            losses.append(cross_entropy(predictions, IDS[:, 1:].flatten()))
        gate(agency, 1, head, 1)
        differences.append(float(losses[0] - losses[1]) / 2e-3)
    derivative = torch.tensor(differences)
    assert torch.allclose(agency.heads["1"].derivative, derivative, rtol=1e-2, atol=1e-6)
    misalignment = derivative / derivative.square().mean().sqrt()
    seen = [head.misalignment for head in agency.get_agency_report().heads if head.layer == 1]
    assert torch.allclose(torch.tensor(seen), misalignment, rtol=2e-2, atol=1e-3)


def test_only_labelled_and_real_tokens_count() -> None:
    padded = torch.cat([IDS, torch.full((2, 3), 4)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 3).long()], 1)
    half = IDS.masked_fill(torch.arange(12) < 6, -100)
    plain, with_padding, completion = (agency_of() for _ in range(3))
    plain.observe(BATCH)
    with_padding.observe({"input_ids": padded, "attention_mask": mask})
    completion.observe({"input_ids": IDS, "labels": half})
    own, same, other = (a.heads["2"].derivative for a in (plain, with_padding, completion))
    assert torch.allclose(own, same, atol=1e-6) and not torch.allclose(own, other, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_observing_leaves_everything_but_the_averages(name: str) -> None:
    base: Any = model(name)
    base.train()
    agency = agency_of(base)
    base.requires_grad_(False)
    parts = anatomy_of(base)
    implementation = base.config._attn_implementation
    agency.observe(BATCH)
    after = anatomy_of(base)
    assert agency.observations == 1
    for count in (parts, after):
        count.pop("pliant.agency.observations")
    assert same_anatomy(after, parts)
    assert base.config._attn_implementation == implementation
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())


def test_observing_in_train_mode_sees_no_dropout() -> None:
    in_eval, in_train = agency_of(model("gpt2")), agency_of(model("gpt2").train())
    for agency in (in_eval, in_train):
        agency.observe(BATCH)
    assert in_train.base.training
    assert in_eval.get_agency_report() == in_train.get_agency_report()


def test_the_models_own_forward_measures_nothing() -> None:
    agency = agency_of()
    before = {key: value.clone() for key, value in agency.named_buffers()}
    logits(agency.base)
    assert all(torch.equal(value, before[key]) for key, value in agency.named_buffers())
    assert agency.observations == 0


def test_an_overloaded_head_recovers_after_so_many_observations() -> None:
    agency = agency_of(overload=0.05, momentum=0.5, recovery=3)
    first = agency.observe(BATCH)
    assert first and {t.after for t in first} == {"overloaded"}
    assert "is above 0.05" in first[0].reason
    assert agency.observe(BATCH) == agency.observe(BATCH) == ()
    back = agency.observe(BATCH)
    assert [(t.layer, t.head) for t in back] == [(t.layer, t.head) for t in first]
    assert {(t.after, t.reason) for t in back} == {("active", "3 observations have passed")}
    assert agency.transitions == [*first, *back]
    again = [agency.observe(BATCH) for _ in range(4)]
    assert [len(changes) for changes in again] == [len(first), 0, 0, len(first)]


def test_a_head_against_the_loss_becomes_misaligned_and_active_when_it_helps_again() -> None:
    agency = agency_of(derivative_momentum=0.0, warmup=2, misalignment=0.6)
    assert agency.observe(BATCH) == (), "averages of few are noise"
    heads = agency.get_agency_report().heads
    against = {(h.layer, h.head) for h in heads if h.misalignment > 0.6}
    seen = agency.observe(BATCH)
    assert {(t.layer, t.head) for t in seen} == against and 0 < len(against) < 16
    assert {t.after for t in seen} == {"misaligned"} and "is above 0.6" in seen[0].reason
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed + 1)
        other = torch.randint(5, 95, (2, 12), generator=generator)
        back = [t for t in agency.observe({"input_ids": other}) if t.before == "misaligned"]
        if back:
            assert back[0].after == "active" and "no longer above 0" in back[0].reason
            return
    raise AssertionError("20 batches agree about every head")


def test_a_head_with_negated_weights_is_misaligned_and_no_other_is() -> None:
    """On the text that the model was trained on, where its own heads do not point against it."""
    import pliant
    from pliant.nano import questions

    base, tokenizer = pliant.load("nano-s")
    attention = agency_of(base, warmup=12, derivative_momentum=0.9)
    site = next(s for s in attention.gates.sites if s.layer == 1)
    weight: Any = site.module.weight
    with torch.no_grad():
        weight[:, : site.width] *= -1
    asked = questions("train", 12 * 8, 1)
    for start in range(0, len(asked), 8):
        rows = [_tokens(tokenizer, q) for q in asked[start : start + 8]]
        attention.observe({name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
    heads = attention.get_agency_report().heads
    worst = max(heads, key=lambda head: head.misalignment)
    assert (worst.layer, worst.head, worst.state) == (1, 0, "misaligned")
    assert not any(head.state == "misaligned" for head in heads if head.layer != 1)


def _tokens(tokenizer: Any, question: Any, length: int = 192) -> dict[str, list[int]]:
    turn = [{"role": "user", "content": question.prompt}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    turn.append({"role": "assistant", "content": question.answer})
    ids = tokenizer.apply_chat_template(turn, return_dict=False)[:length]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    pads = length - len(ids)
    return {
        "input_ids": ids + [0] * pads,
        "attention_mask": [1] * len(ids) + [0] * pads,
        "labels": labels + [-100] * pads,
    }


# --- the report and the file ----------------------------------------------------------------------


def test_the_report_is_json_and_one_sentence() -> None:
    agency = agency_of()
    agency.set_head_state(0, 0, "withdrawn", reason="too slow")
    agency.set_head_state(3, 1, "active", consent=False)
    agency.set_gate(3, 1, 1)
    agency.observe(BATCH)
    agency.set_head_state(0, 0, "withdrawn")  # which it is
    report = agency.get_agency_report()
    assert str(report) == (
        "Of 16 heads, 15 active, 1 withdrawn; 1 without consent, and 1 violations in "
        "1 observations."
    )
    values = json.loads(json.dumps(report.as_dict()))
    assert values["counts"] == {"active": 15, "overloaded": 0, "misaligned": 0, "withdrawn": 1}
    assert values["transitions"][0]["reason"] == "too slow" and len(values["transitions"]) == 2
    assert values["heads"][13]["weight"] == 0 and not values["heads"][13]["consent"]


def test_saved_and_loaded_states_agree(tmp_path: Path) -> None:
    base = model()
    agency = agency_of(base, recovery=7)
    agency.set_head_state(0, 0, "misaligned")
    agency.set_head_state(1, 1, "active", consent=False)
    agency.set_gate(1, 1, 1)
    agency.observe(BATCH)
    expected, report = logits(base), agency.get_agency_report()
    agency.save_pretrained(tmp_path)
    agency.detach()
    again = Agency.from_pretrained(base, tmp_path)
    assert again.name == "agency" and again.config == AgencyConfig(recovery=7)
    assert same_bits(logits(base), expected) and again.get_agency_report() == report


def test_states_of_an_earlier_version_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They held each locked head's gate of one pattern, in a tensor."""
    base = model()
    agency = agency_of(base)
    agency.set_head_state(1, 1, "withdrawn")
    expected = logits(base)
    agency.detach()
    with monkeypatch.context() as earlier:
        for heads in agency.heads.values():
            earlier.setitem(heads._buffers, "gate", torch.zeros(len(heads.state)))
        state = {k: v for k, v in agency.get_extra_state().items() if k != "locked_gates"}
        earlier.setattr(Agency, "get_extra_state", lambda self: state)
        agency.save_pretrained(tmp_path)
    again = Agency.from_pretrained(base, tmp_path)
    assert same_bits(logits(base), expected)
    again.observe(BATCH)
    gate(again, 1, 1, 2)
    again.observe(BATCH)
    assert len(again.violations) == 1  # the lock is still a lock


def test_agency_without_gates_is_refused(tmp_path: Path) -> None:
    agency = agency_of()
    agency.save_pretrained(tmp_path)
    base = model()
    parts = anatomy_of(base)
    with pytest.raises(AdapterError, match="needs gates on heads attached as 'structure'"):
        Agency.from_pretrained(base, tmp_path)
    assert same_anatomy(anatomy_of(base), parts)
    with pytest.raises(AdapterError, match="needs gates on heads"):
        attach_agency(attach(base, GateConfig(("layers",))))


def test_gates_of_other_names_and_patterns_have_agency() -> None:
    gates = attach(model(), GateConfig(("layers", "heads"), ("a", "b")), name="mine")
    agency = attach_agency(gates)
    gates.use("b")
    agency.set_head_state(0, 0, "withdrawn")
    agency.observe(BATCH)
    assert agency.gates is gates and isinstance(gates, Gates)
    closed = logits(gates.base)
    with torch.no_grad():
        gates["heads", 0][0] = 2
    assert same_bits(logits(gates.base), closed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.set_head_state(9, 0, "active"), "layer 9 has no heads"),
        (lambda a: a.set_head_state(0, 4, "active"), "no head 4: it has 4"),
        (lambda a: a.set_head_state(0, -1, "active"), "no head -1"),
        (lambda a: a.set_head_state(0, 0, "asleep"), "'asleep': give one of active"),
        (lambda a: a.set_gate(0, 7, 1), "no head 7"),
        (lambda a: a.observe({}), "no input_ids"),
        (lambda a: a.observe({"input_ids": IDS[:, :1]}), "fewer than 2 tokens"),
        (
            lambda a: a.observe({"input_ids": IDS, "labels": torch.full_like(IDS, -100)}),
            "no label that the position before it predicts",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(call: Any, message: str) -> None:
    agency = agency_of()
    with pytest.raises(InvalidInput, match=message):
        call(agency)
    report = agency.get_agency_report()
    assert report.transitions == report.violations == () and report.observations == 0


@pytest.mark.parametrize(
    "config",
    [
        {"momentum": 1.0},
        {"derivative_momentum": -0.1},
        {"overload": math.nan},
        {"recovery": 0},
        {"warmup": 1.5},
    ],
)
def test_settings_that_cannot_be_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(PliantError, match=next(iter(config))):
        AgencyConfig(**config)
