"""Recovery trains the smaller model and nothing else, and a run resumes as if it had not ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.structure.models import logits, same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM

from pliant import nano
from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.loading import load
from pliant.structure import (
    GateConfig,
    PruneConfig,
    RecoveryConfig,
    RecoveryResult,
    attach,
    export,
    prune,
    recover,
)
from pliant.structure.recovery import split
from pliant.training.folder import RECORD
from pliant.training.texts import Texts, texts

SETTINGS = {
    "max_steps": "4",
    "save_steps": "2",
    "logging_steps": "1",
    "per_device_train_batch_size": "4",
    "use_cpu": "true",
}
TOKENIZER = load("nano-s")[1]
TEXTS = texts(nano.conversations("train", 100), TOKENIZER, 256)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano-s without a random quarter of its channels."""
    folder = tmp_path_factory.mktemp("recovery") / "smaller"
    model, tokenizer = load("nano-s")
    prune(model, [{"input_ids": IDS}], PruneConfig(channels=0.25, score="random", compensate=False))
    export(model, folder, tokenizer)
    return folder


IDS = torch.randint(5, 95, (2, 12), generator=torch.Generator().manual_seed(0))


def recovered(
    model: Any, folder: Path, config: RecoveryConfig | None = None, **options: Any
) -> RecoveryResult:
    settings = {**SETTINGS, **options.pop("settings", {})}
    options = {"say": lambda line: None, **options}
    return recover(model, TOKENIZER, TEXTS, folder, config, settings=settings, **options)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}


def sharing(smaller: Path, teacher: Any) -> Any:
    """The smaller model, whose tensors are the teacher's where they have the same shape."""
    model, _ = load(smaller)
    theirs = dict(teacher.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.shape == theirs[name].shape:
            parameter.data = theirs[name].data
    return model


@pytest.mark.parametrize("train", ["lora", "norms", "all"])
def test_the_teacher_does_not_change_by_a_bit(train: Any, smaller: Path, tmp_path: Path) -> None:
    teacher, _ = load("nano-s")
    model = sharing(smaller, teacher)
    before, own = state(teacher), state(model)
    result = recovered(model, tmp_path / "run", RecoveryConfig(train, distill=0.5), teacher=teacher)
    assert changed(before, state(teacher)) == set()
    assert not teacher.training and all(p.requires_grad for p in teacher.parameters())
    moved = changed(own, state(model))
    assert {"lora": "q_proj", "norms": "norm", "all": "embed"}[train] in " ".join(moved)
    assert all("norm" in name for name in moved) or train != "norms"
    assert all("proj" in name for name in moved) or train != "lora"
    assert all(p.requires_grad for p in model.parameters())
    assert result.trained == 336 if train == "norms" else result.trained > 10_000


def test_some_of_what_was_lost_comes_back(smaller: Path, tmp_path: Path) -> None:
    teacher, _ = load("nano-s")
    model, _ = load(smaller)
    settings = {"max_steps": "30", "learning_rate": "1e-3", "per_device_train_batch_size": "16"}
    config = RecoveryConfig("all", distill=0.5)
    result = recovered(model, tmp_path / "run", config, teacher=teacher, settings=settings)
    assert result.teacher is not None and result.teacher < result.after < result.before
    assert result.recovered is not None and result.recovered > 0.2
    assert str(result).startswith(f"{result.recovered:.0%} of what was lost is back")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not model.training and same_bits(logits(again.eval()), logits(model))
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["ended"] == json.loads(json.dumps(result.as_dict()))


@pytest.mark.parametrize(("train", "dtype"), [("lora", "float32"), ("all", "bfloat16")])
def test_a_killed_run_resumes_as_if_it_had_not_been(
    train: Any, dtype: str, smaller: Path, tmp_path: Path
) -> None:
    config = RecoveryConfig(train, rank=2, distill=0.5)
    teacher, _ = load("nano-s", dtype=dtype)

    def run(folder: str, **options: Any) -> tuple[Any, RecoveryResult]:
        model, _ = load(smaller, dtype=dtype)
        return model, recovered(model, tmp_path / folder, config, teacher=teacher, **options)

    def die(line: str) -> None:
        if line.startswith("training, step 3"):
            raise KeyboardInterrupt  # between the checkpoints 2 and 4

    whole, uninterrupted = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", say=die)
    lines: list[str] = []
    again, resumed = run("killed", resume=True, say=lines.append)
    assert lines[0] == "resuming from checkpoint-2" and resumed.resumed_at == 2
    assert changed(state(whole), state(again)) == set()
    assert replace(resumed, seconds=0, resumed_at=0) == replace(uninterrupted, seconds=0)
    histories = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())
        for name in ("whole", "killed")
    ]
    losses = [[e["loss"] for e in h["log_history"] if "loss" in e] for h in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_an_interrupted_model_has_no_lora_layers_left(smaller: Path, tmp_path: Path) -> None:
    model, _ = load(smaller)
    before = state(model)

    def die(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(model, tmp_path / "run", RecoveryConfig("lora"), say=die)
    assert changed(before, state(model)) == set()


def test_weights_of_16_bits_are_trained_in_32(smaller: Path, tmp_path: Path) -> None:
    """Single steps of 1e-5 are below what bf16 can resolve; their sum need not be."""
    model, _ = load(smaller, dtype="bfloat16")
    before = state(model)
    recovered(model, tmp_path / "run", RecoveryConfig("all"), settings={"learning_rate": "1e-5"})
    checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert checkpoint[name].dtype == torch.float32
    moved = (checkpoint[name] - before[name].float()).abs()
    assert 1e-6 < float(moved.max()) < 1e-4
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_bits(model.state_dict()[name], checkpoint[name].bfloat16())


def test_two_half_batches_are_one_batch(smaller: Path, tmp_path: Path) -> None:
    """The loss is averaged over the tokens of a step, however they are cut into batches."""
    teacher, _ = load("nano-s")
    results = []
    for rows, times in ((4, 1), (2, 2)):
        model, _ = load(smaller)
        settings = {
            "per_device_train_batch_size": str(rows),
            "gradient_accumulation_steps": str(times),
            "max_steps": "2",
        }
        config = RecoveryConfig("all", distill=0.5)
        run = tmp_path / str(rows)
        results.append(recovered(model, run, config, teacher=teacher, settings=settings))
    assert results[0].first_loss == pytest.approx(results[1].first_loss, rel=1e-4)
    assert results[0].after == pytest.approx(results[1].after, rel=1e-4)


def test_the_record_of_the_export_is_passed_on(smaller: Path, tmp_path: Path) -> None:
    model, _ = load(smaller)
    settings = {"max_steps": "1"}
    settings["gradient_checkpointing"] = "true"
    result = recovered(model, tmp_path / "run", source=smaller, settings=settings)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["use_cache"]
    before = json.loads((smaller / "pliant_export.json").read_text())
    after = json.loads((tmp_path / "run" / "pliant_export.json").read_text())
    assert after.pop("recovery") == result.as_dict() and after == before


@pytest.mark.parametrize(("count", "held"), [(2, 1), (19, 1), (100, 5), (6400, 64)])
def test_what_is_held_out_is_spread_evenly(count: int, held: int) -> None:
    pieces = [{"input_ids": [i, i], "labels": [i, i]} for i in range(count)]
    train, held_out = split(Texts(pieces))
    assert len(held_out.pieces) == held and len(train.pieces) == count - held
    both = sorted(piece["input_ids"][0] for piece in (*train.pieces, *held_out.pieces))
    assert both == list(range(count))
    at = [piece["input_ids"][0] for piece in held_out.pieces]
    gaps = {b - a for a, b in zip(at, at[1:], strict=False)}
    assert len(gaps) <= 1 and at[0] < count / held


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": "some"}, "train = 'some': give one of lora, norms, all"),
        ({"rank": 0}, "rank = 0: give a whole number, 1 or more"),
        ({"distill": 1.5}, "distill = 1.5: give a share from 0 to 1"),
        ({"distill": float("nan")}, "distill = nan: give a share"),
        ({"distill": True}, "distill = True: give a share"),
        ({"temperature": 0.0}, "temperature = 0.0: give a number above 0"),
    ],
)
def test_settings_outside_their_bounds(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        RecoveryConfig(**values)


def test_models_that_cannot_be_recovered(smaller: Path, tmp_path: Path) -> None:
    model, _ = load(smaller)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (InvalidInput, {"config": RecoveryConfig(distill=0.5)}, "give a teacher to distill from"),
        (InvalidInput, {"teacher": model}, "the teacher is the model itself"),
        (InvalidInput, {"teacher": tiny_model("llama")}, "the teacher has a vocabulary of"),
    ]
    for kind, options, message in refused:
        with pytest.raises(kind, match=message):
            recovered(model, tmp_path / "run", **options)
    gates = attach(model, GateConfig(("channels",)))
    with pytest.raises(UnsupportedModel, match="structure is attached: .* export it first"):
        recovered(model, tmp_path / "run")
    gates.detach()
    teacher, _ = load("nano-s")
    gates = attach(teacher, GateConfig(("channels",)))
    with pytest.raises(UnsupportedModel, match="structure is attached to the teacher"):
        recovered(model, tmp_path / "run", teacher=teacher)
    with gates.disabled(), pytest.raises(InvalidInput, match="eval_strategy"):
        settings = {"eval_strategy": "nonsense"}  # it got as far as this
        recovered(model, tmp_path / "run", teacher=teacher, settings=settings)
    with pytest.raises(InvalidInput, match="a single piece"):
        recover(model, TOKENIZER, Texts(TEXTS.pieces[:1]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_vectors_has_no_norms_to_train(smaller: Path, tmp_path: Path) -> None:
    model, _ = load(smaller)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            del module.weight
            module.weight = 1.0
    with pytest.raises(UnsupportedModel, match="has no vectors of norms or biases"):
        recovered(model, tmp_path / "run", RecoveryConfig("norms"))
    assert not (tmp_path / "run").exists() and all(p.requires_grad for p in model.parameters())


def test_settings_that_the_trainer_refuses_leave_the_folder_free(
    smaller: Path, tmp_path: Path
) -> None:
    model, _ = load(smaller)
    with pytest.raises(InvalidInput, match="settings do not go together"):
        settings = {"eval_strategy": "steps"}
        recovered(model, tmp_path / "run", RecoveryConfig("lora"), settings=settings)
    assert not list((tmp_path / "run").iterdir())
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("before", "after", "share", "said"),
    [
        (2.0, 1.5, 0.5, "50% of what was lost is back: "),
        (1.005, 0.9, None, "too little was lost (1 % of the perplexity) to say what share is back"),
        (0.9, 0.8, None, "nothing was lost: "),
    ],
)
def test_a_share_of_next_to_nothing_is_not_printed(
    before: float, after: float, share: float | None, said: str
) -> None:
    facts: Any = {"losses": None, "eval_loss": after, "seconds": 1.0, "resumed_at": 0}
    losses = {"before": before, "after": after, "teacher": 1.0}
    result = RecoveryResult(20, 2.0, 1.0, **facts, train="all", trained=9, **losses)
    assert result.recovered == share and str(result).startswith(said)
