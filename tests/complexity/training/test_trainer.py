"""A scorer learns on stored prefixes what a plain loop over whole prompts would teach it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import Scale, ScaleConfig, tiny_llama
from tests.processes import run_two
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback

from pliant import adapters
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.training.config import CPXTrainingConfig
from pliant.complexity.training.dataset import similar_length_order
from pliant.complexity.training.run import fit, remember
from pliant.complexity.training.trainer import CPXTrainer
from pliant.errors import AdapterError, InvalidInput
from pliant.prefill import supports_cache, supports_padding
from pliant.training.checkpoint import is_complete, last_complete

COUNT = 24


def rows(count: int = COUNT, seed: int = 5) -> list[dict[str, Any]]:
    """Prompts of 3 to 12 tokens; they are hard where most of their ids are large."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(0, 60, (length,), generator=generator)
        made.append({"input_ids": ids.tolist(), "label": float(ids.float().mean() > 30)})
    return made


def scorer_on(model: nn.Module | None = None, **changes: Any) -> Complexity:
    return attach(model or tiny_llama(), CPXConfig(**changes))


def trainer(scorer: Any, folder: Path, *, args: Any = None, **changes: Any) -> CPXTrainer:
    train, held = changes.pop("train", rows()), changes.pop("held", None)
    settings: dict[str, Any] = {"num_epochs": 3, "batch_size": 4, "scheduler": "constant"}
    settings |= {"rows_learning_rate": 1e-2, "lora_learning_rate": 1e-2}
    settings |= {"warmup": 0.0, "max_grad_norm": 0.0, "output_dir": str(folder)}
    config = CPXTrainingConfig(**{**settings, **changes})
    given = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, **(args or {})}
    made = config.training_arguments(evaluates=held is not None, **given)
    return CPXTrainer(scorer, made, config=config, train_dataset=train, eval_dataset=held)


def _nano() -> tuple[Any, CPXConfig, Any]:
    import pliant

    model, tokenizer = pliant.load("nano-s")
    return model, CPXConfig(), tokenizer


def losses(run: CPXTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def values(scorer: Complexity) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in scorer.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- exactness ------------------------------------------------------------------------------------


def plain_loop(model: LlamaForCausalLM, scorer: Complexity, epochs: int = 3) -> list[float]:
    """Whole prompts through the model's own decoder, [CPX] in the last place of inputs_embeds."""
    row, head = scorer.rows.detach().clone().requires_grad_(True), nn.Linear(16, 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    groups = [
        {"params": [row, head.bias], "weight_decay": 0.0},
        {"params": [head.weight], "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    data, found = rows(), []
    for epoch in range(epochs):
        lengths = torch.tensor([len(r["input_ids"]) for r in data])
        for batch in torch.tensor(similar_length_order(lengths, 4, 0, epoch)).split(4):
            logits = []
            for i in batch.tolist():
                prompt = model.get_input_embeddings()(torch.tensor([data[i]["input_ids"]]))
                whole = torch.cat([prompt, row[None]], dim=1)
                hidden = model.model(inputs_embeds=whole, use_cache=False).last_hidden_state
                logits.append(head(hidden[:, -1]))
            wanted = torch.tensor([[data[i]["label"]] for i in batch.tolist()])
            loss = nn.functional.binary_cross_entropy_with_logits(torch.cat(logits), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("prefixes", ["memory", "disk", "recompute"])
def test_the_loss_curve_is_a_full_forwards(tmp_path: Path, prefixes: str) -> None:
    model = tiny_llama()
    scorer = scorer_on(model)
    whole = plain_loop(tiny_llama(), scorer)
    run = trainer(scorer, tmp_path, prefixes=prefixes)
    run.train()
    assert torch.allclose(torch.tensor(losses(run)), torch.tensor(whole), atol=1e-5, rtol=0)
    assert whole[-1] != whole[0] and len(whole) == 18
    assert run.report.storage["train"].where == prefixes


def test_prompts_are_run_once(tmp_path: Path) -> None:
    """The base sees the prompts' tokens in one forward each, and then the rows alone."""
    model, seen = tiny_llama(), []
    scorer = scorer_on(model)
    assert supports_cache(scorer.anatomy) and supports_padding(scorer.anatomy)  # tried once a model
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1])
    )
    run = trainer(scorer, tmp_path, prefixes="memory", num_epochs=10)
    run.train()
    tokens = sum(len(row["input_ids"]) for row in rows())
    assert tokens + 10 * COUNT <= sum(seen) < 2 * tokens + 10 * COUNT  # some to know their size
    assert run.report.stored_tokens == run.report.prompt_tokens == tokens


def test_the_base_does_not_move_and_is_not_written(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(scorer_on(model, lora_rank=2), tmp_path, save_epochs=True)
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert same(dict(model.state_dict()), before)
    files = {p.name for p in (tmp_path / "checkpoint-18").iterdir()}
    assert not files & {"model.safetensors", "pytorch_model.bin", "base.safetensors"}
    trained = sum(p.numel() for p in run.scorer.parameters())
    assert (tmp_path / "checkpoint-18" / "optimizer.pt").stat().st_size < 100_000 + 8 * trained
    again = Complexity.from_pretrained(tiny_llama(), tmp_path / "final")
    assert same(values(again), values(run.scorer))


def test_it_learns() -> None:
    """Products are hard for nano-s; what it has not seen in training it can tell as well."""
    from pliant.nano import questions

    asked = questions("dev", 300, 1, ["multiply", "subtract"])
    prompts, labels = [q.prompt for q in asked], [q.family == "multiply" for q in asked]
    scorer = attach(*_nano())
    held = (prompts[200:], labels[200:])
    report = fit(scorer, prompts[:200], labels[:200], evaluation=held, num_epochs=6, batch_size=16)
    assert report.evaluation["loss"] < 0.35


# --- off by itself --------------------------------------------------------------------------------


def test_dropout_turns_the_store_off(tmp_path: Path) -> None:
    model = tiny_llama(attention_dropout=0.5)
    run = trainer(scorer_on(model), tmp_path / "a", base_dropout=True, prefixes="memory")
    run.train()
    assert run.report.storage["train"].where == "recompute"
    assert "dropout is on" in run.report.storage["train"].why
    quiet = trainer(scorer_on(tiny_llama(attention_dropout=0.5)), tmp_path / "b", prefixes="memory")
    quiet.train()
    assert quiet.report.storage["train"].where == "memory"
    assert losses(run) != losses(quiet)


def test_a_lora_on_prompt_positions_turns_the_store_off_and_is_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(attach(model, CPXConfig()), tmp_path, prefixes="memory", save_epochs=True)
    run.train()
    assert run.report.storage["train"].where == "recompute"
    assert "the base is trained" in run.report.storage["train"].why
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all("lora" in name for name in moved)
    assert (tmp_path / "checkpoint-18" / "base.safetensors").stat().st_size < 10_000


def test_a_cache_that_cannot_be_split_still_trains(tmp_path: Path) -> None:
    from pliant.anatomy.tiny import tiny_model

    model = tiny_model("mamba")
    run = trainer(scorer_on(model), tmp_path, num_epochs=2)
    run.train()
    assert run.report.storage["train"].where == "recompute"
    assert (
        "cannot" in run.report.storage["train"].why or "no cache" in run.report.storage["train"].why
    )
    assert len(losses(run)) == 12


def test_the_untouched_base_is_frozen_and_train_base_trains_it(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(scorer_on(model), tmp_path, num_epochs=1, train_base=True)
    run.train()
    assert not same(dict(model.state_dict()), before)
    with pytest.raises(InvalidInput, match="gradient_checkpointing"):
        trainer(
            scorer_on(), tmp_path, train_base=True, args={"gradient_checkpointing": True}
        ).train()


def test_a_base_that_is_trained_learns_through_the_whole_prompt(tmp_path: Path) -> None:
    one, other = scorer_on(), scorer_on()
    run = trainer(one, tmp_path, train_base=True)
    ids, mask = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.ones(1, 6, dtype=torch.long)
    for scorer in (one, other):
        torch.nn.init.ones_(scorer.head.weight)
    run.module(ids, mask)["logits"].sum().backward()
    other.logits(ids, mask, whole=True).sum().backward()
    found, wanted = one.base.get_input_embeddings(), other.base.get_input_embeddings()
    assert wanted.weight.grad is not None and wanted.weight.grad[5:11].any()
    assert torch.allclose(found.weight.grad, wanted.weight.grad, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_another_scorer_on_the_base_is_no_part_of_it(frozen: bool) -> None:
    model = tiny_llama().requires_grad_(not frozen)
    one, other = (attach(model, CPXConfig(), name=name) for name in ("one", "other"))
    data = rows()
    prompts, labels = [r["input_ids"] for r in data], [r["label"] for r in data]
    report = fit(one, prompts, labels, num_epochs=2)
    assert report.storage["train"].where == "memory"
    assert all(p.requires_grad for p in other.parameters())
    before = values(other)
    fit(other, prompts, labels, num_epochs=2, batch_size=4)
    assert not any(torch.equal(p, before[name]) for name, p in values(other).items())


def test_gradient_checkpointing_changes_nothing_on_a_frozen_base(tmp_path: Path) -> None:
    plain = trainer(scorer_on(), tmp_path / "a", num_epochs=1)
    plain.train()
    args = {"gradient_checkpointing": True}
    run = trainer(scorer_on(), tmp_path / "b", num_epochs=1, args=args)
    run.train()
    assert losses(run) == losses(plain)


# --- what a user sets -----------------------------------------------------------------------------


def test_each_kind_of_parameter_has_its_rate_and_decay(tmp_path: Path) -> None:
    scorer = scorer_on(lora_rank=2, aggregation="attention", rows=2)
    run = trainer(
        scorer, tmp_path, learning_rate=3e-4, rows_learning_rate=1e-4, lora_learning_rate=1.5e-4
    )
    run.create_optimizer()
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in run.optimizer.param_groups
        for name, p in scorer.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert found.pop("rows") == (1e-4, 0.0)
    assert found.pop("head.weight") == (3e-4, 0.01)
    assert found.pop("head.bias") == found.pop("query") == (3e-4, 0.0)
    assert set(found.values()) == {(1.5e-4, 0.01)} and len(found) == 2 * 7 * 2


def test_the_rows_rate_goes_with_their_size(tmp_path: Path) -> None:
    scorer = scorer_on()
    torch.nn.init.constant_(scorer.rows, 0.5)
    run = trainer(scorer, tmp_path, learning_rate=0.01, rows_learning_rate=None)
    run.create_optimizer()
    found = sorted({group["lr"] for group in run.optimizer.param_groups})
    assert found == pytest.approx([0.01, 0.09])


def test_rows_stay_where_only_the_head_is_trained(tmp_path: Path) -> None:
    scorer = scorer_on()
    before = values(scorer)
    trainer(scorer, tmp_path, is_cpx_token_trainable=False).train()
    assert torch.equal(scorer.rows, before["rows"])
    assert not torch.equal(scorer.head.weight, before["head.weight"])


@pytest.mark.parametrize(
    ("settings", "config", "label"),
    [
        ({"loss": "bce", "label_smoothing": 0.1, "class_weights": (2.0,)}, {}, 0.7),
        ({"loss": "regression"}, {}, -3.5),
        ({"loss": "ce"}, {"num_labels": 3}, 2),
        ({"loss": "ce", "class_weights": (1.0, 2.0, 3.0)}, {"num_labels": 3}, [0.2, 0.3, 0.5]),
        ({}, {"outputs": ("score", "gain")}, [1.0, -0.5]),
        ({"class_weights": (2.0, 1.0)}, {"outputs": ("right:a", "right:b")}, [0.0, 1.0]),
    ],
)
def test_every_loss_trains(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], label: Any
) -> None:
    data = [{**row, "label": label} for row in rows()]
    run = trainer(scorer_on(**config), tmp_path, train=data, num_epochs=10, **settings)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_outputs_are_read_as_they_were_learned(tmp_path: Path) -> None:
    asked = [row["input_ids"] for row in rows()][:20]
    numbers = scorer_on()
    fit(numbers, asked, [30.0] * 20, loss="regression", num_epochs=60, learning_rate=0.1)
    assert numbers.score(asked)["score"] == pytest.approx([30.0] * 20, abs=3)
    with pytest.raises(InvalidInput, match="not a probability"):
        numbers.generate(asked, leave_above=0.5)
    classes = scorer_on(num_labels=3)
    fit(classes, asked, [1] * 20, loss="ce", num_epochs=1)
    assert classes.score(asked).values.sum(axis=1) == pytest.approx([1.0] * 20)
    classes.save_pretrained(tmp_path / "saved")
    base = classes.base
    classes.detach()
    again = Complexity.from_pretrained(base, tmp_path / "saved")
    assert again.config.reads == "classes"
    fit(again, asked, [[1.0, 0.0, 1.0]] * 20, num_epochs=1)
    assert again.config.reads == "probabilities"


def test_patience_stops_and_the_best_comes_back(tmp_path: Path) -> None:
    held = [{**row, "label": 1 - row["label"]} for row in rows()]  # what is learned is wrong there
    run = trainer(scorer_on(), tmp_path, held=held, num_epochs=20, patience=2)
    run.train()
    assert run.state.epoch == 3 and run.state.best_model_checkpoint.endswith("checkpoint-6")
    best = Complexity.from_pretrained(tiny_llama(), tmp_path / "checkpoint-6/adapters/complexity")
    assert same(values(best), values(run.scorer))
    with pytest.raises(InvalidInput, match="no evaluation"):
        trainer(scorer_on(), tmp_path, patience=2)


def test_evaluation_and_prediction_keep_the_order(tmp_path: Path) -> None:
    run = trainer(scorer_on(), tmp_path, held=rows(10, 7))
    run.train()
    predicted = run.predict(rows(10, 7))
    alone = [run.scorer.score([row["input_ids"]]).logits[0, 0] for row in rows(10, 7)]
    assert torch.allclose(
        torch.tensor(predicted.predictions[:, 0]).double(), torch.tensor(alone), atol=1e-5
    )
    assert predicted.metrics["test_loss"] == pytest.approx(run.evaluate()["eval_loss"], abs=1e-5)


def test_duplicates_are_reported(tmp_path: Path) -> None:
    run = trainer(scorer_on(), tmp_path, held=rows()[:3] + rows(5, 11), num_epochs=1)
    run.train()
    assert run.duplicates.test_rows == (0, 1, 2)
    assert "3 of the 8 test rows" in str(run.report)


def test_the_report_says_the_whole_run_first(tmp_path: Path) -> None:
    run = trainer(scorer_on(), tmp_path, held=rows(8, 3))
    run.train()
    first, second, *rest = str(run.report).splitlines()
    assert first.startswith(f"{run.report.seconds:.1f} s for 3 epochs over 24 prompts")
    assert second.startswith("an epoch on top of that")
    assert run.report.seconds >= run.report.prefill_seconds + sum(run.report.epoch_seconds)
    assert any(line.startswith("evaluation: memory") for line in rest)
    assert json.dumps(run.report.as_dict()) and run.report.kept is run.report.storage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 3}, "num_labels = 3, and the scorer has 1"),
        ({"loss": "hinge"}, "loss = 'hinge'"),
        ({"prefixes": "cloud"}, "prefixes = 'cloud'"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"cpx_token": "<hard>"}, "cpx_token"),
        ({"class_weights": (1.0, 2.0)}, "class_weights"),
        ({"class_weights": (2.0,), "loss": "regression"}, "class_weights"),
        ({"gradient_checkpointing": True, "train_base": True}, "gradient_checkpointing"),
        ({"train": [{"input_ids": [5, 64], "label": 1.0}]}, "prompt 0 holds ids"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import pliant

    scorer = scorer_on()
    scorer.tokenizer = pliant.CPXTokenizer.from_pretrained("nano-s")
    with pytest.raises(InvalidInput, match=message):
        trainer(scorer, tmp_path, **change)


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [4, 6])
def test_resumed_equals_uninterrupted(tmp_path: Path, keep: int) -> None:
    """In the middle of an epoch, and between two."""
    args = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(scorer_on(lora_rank=2), tmp_path / "whole", args=args, scheduler="linear")
    whole.train()
    cut = trainer(scorer_on(lora_rank=2), tmp_path / "cut", args=args, scheduler="linear")
    cut.train()
    for path in (tmp_path / "cut").glob("checkpoint-*"):
        if path.name != f"checkpoint-{keep}":
            shutil.rmtree(path)
    resumed = trainer(scorer_on(lora_rank=2), tmp_path / "cut", args=args, scheduler="linear")
    resumed.train(resume_from_checkpoint=True)
    assert same(values(resumed.scorer), values(whole.scorer))
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_that_a_kill_tore_is_passed_over(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(scorer_on(), tmp_path, args=args)
    whole.train()
    kept = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert last_complete(tmp_path) == kept[-1] and len(kept) > 2
    (kept[-1] / "trainer_state.json").write_text('{"half')
    shutil.rmtree(kept[-2])
    kept[-2].mkdir()
    again = trainer(scorer_on(), tmp_path, args=args)
    again.train(resume_from_checkpoint=True)
    assert same(values(again.scorer), values(whole.scorer))
    for path in kept:
        shutil.rmtree(path)
    kept[0].mkdir()
    assert last_complete(tmp_path) is None
    with pytest.raises(InvalidInput, match="no complete checkpoint"):
        trainer(scorer_on(), tmp_path).train(resume_from_checkpoint=True)


class Die(TrainerCallback):
    """As a kill, while the checkpoint of step 4 is saved."""

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 4:
            raise SystemExit


def beside_a_scale(folder: Path) -> CPXTrainer:
    """On a frozen base, an adapter that is trained beside the scorer."""
    model = tiny_llama().requires_grad_(False)
    adapters.attach(model, Scale(model, ScaleConfig()))
    args = {"save_strategy": "steps", "save_steps": 2}
    return trainer(scorer_on(model), folder, args=args)


def test_a_checkpoint_is_complete_once_every_callback_has_written(tmp_path: Path) -> None:
    """The Trainer's own state comes first: it says nothing of the adapters' files."""
    killed = beside_a_scale(tmp_path)
    killed.add_callback(Die())
    with pytest.raises(SystemExit):
        killed.train()
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_another_adapter_is_saved_and_resumed_with_the_scorer(tmp_path: Path) -> None:
    whole = beside_a_scale(tmp_path / "whole")
    before = values(adapters.attached(whole.scorer.base)["minimal"])
    whole.train()
    killed = beside_a_scale(tmp_path / "killed")
    killed.add_callback(Die())
    with pytest.raises(SystemExit):
        killed.train()
    resumed = beside_a_scale(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    saved = {path.name for path in (tmp_path / "killed/checkpoint-18/adapters").iterdir()}
    assert saved == {"complexity", "minimal"}
    ours, theirs = (adapters.attached(run.scorer.base) for run in (resumed, whole))
    assert all(same(values(ours[name]), values(theirs[name])) for name in saved)
    assert not same(values(ours["minimal"]), before) and losses(resumed) == losses(whole)


def test_a_checkpoint_of_the_former_layout_is_resumed(tmp_path: Path) -> None:
    """Pliant 0.1 wrote the scorer beside the Trainer's own files, and no marker."""
    args = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(scorer_on(lora_rank=2), tmp_path / "whole", args=args)
    whole.train()
    former = tmp_path / "former" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", former)
    (former / "complete.json").unlink()
    for file in (former / "adapters" / "complexity").iterdir():
        file.rename(former / file.name)
    shutil.rmtree(former / "adapters")
    resumed = trainer(scorer_on(lora_rank=2), tmp_path / "former", args=args)
    resumed.train(resume_from_checkpoint=True)
    assert same(values(resumed.scorer), values(whole.scorer)) and losses(resumed) == losses(whole)
    (former / "trainer_state.json").write_text('{"half')
    assert not is_complete(former)


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    whole = trainer(scorer_on(), tmp_path / "whole")
    whole.train()
    run = trainer(scorer_on(), tmp_path / "cut")
    run.add_callback(Interrupt())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "cut" / "checkpoint-8").is_dir()
    again = trainer(scorer_on(), tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert same(values(again.scorer), values(whole.scorer))


def test_a_checkpoint_of_another_scorer_is_refused(tmp_path: Path) -> None:
    trainer(scorer_on(), tmp_path, save_epochs=True).train()
    other = trainer(scorer_on(rows=2), tmp_path)
    with pytest.raises(AdapterError, match="another configuration"):
        other.train(resume_from_checkpoint=True)


# --- without boilerplate --------------------------------------------------------------------------


def test_fit_trains_in_place_and_leaves_nothing(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows(60)
    prompts, labels = [r["input_ids"] for r in data], [r["label"] for r in data]
    scorer = scorer_on()
    report = fit(scorer, prompts, labels, evaluation=(prompts[:9], labels[:9]), num_epochs=2)
    assert report.epochs == 2 and report.storage["train"].where == "memory"
    assert scorer.head.weight.abs().max() > 0 and not any(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    shared = remember(scorer, prompts)
    one, other = scorer_on(), scorer_on()
    fit(one, prompts, torch.tensor(labels), prefixes=shared)
    fit(other, prompts, labels)
    assert same(values(one), values(other))
    with pytest.raises(InvalidInput, match="60 prefixes are stored for 59"):
        fit(one, prompts[:59], labels[:59], prefixes=shared)
    for wrong in (scorer_on(layer=1), scorer_on(tiny_llama(seed=1))):
        with pytest.raises(InvalidInput, match="differs from what the base computes now"):
            fit(wrong, prompts, labels, prefixes=shared)
    with pytest.raises(InvalidInput, match="differs from what the base computes now"):
        fit(one, prompts[::-1], labels[::-1], prefixes=shared)
    with pytest.raises(InvalidInput, match="60 prompts and 3 labels"):
        fit(one, prompts, labels[:3])
    with pytest.raises(InvalidInput, match="'epochs'; did you mean 'num_epochs'"):
        fit(one, prompts, labels, epochs=3)


def test_fit_takes_texts_and_a_facade() -> None:
    import pliant

    model = pliant.CPXCausalLM.from_pretrained("nano-s")
    model.scorer.tokenizer = pliant.CPXTokenizer.from_pretrained("nano-s")
    texts = ["2 + 2", "17 * 23 [CPX]", "what comes after a", "9"]
    report = fit(model, texts, [0, 1, 0, 1], num_epochs=4, batch_size=2)
    plain = model.scorer.tokenizer.base(["2 + 2", "17 * 23", *texts[2:]])["input_ids"]
    assert report.prompt_tokens == sum(map(len, plain))


def test_two_processes_learn_what_one_does(tmp_path: Path, root: Path) -> None:
    run_two("tests.complexity.training.two_processes", str(tmp_path), cwd=root)
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first == second and all(first.values()), first
