"""Learning is the same by seed, goes on after a kill, and counts only the answers."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from pliant.errors import CorruptFile, InvalidInput
from pliant.nano import questions
from pliant.nano.train import trainer as training
from pliant.nano.train.__main__ import CONTEXT, build_tokenizer, small_config
from pliant.nano.train.trainer import (
    Position,
    Schedule,
    Trainer,
    answer_loss,
    batches,
    frame,
    orthogonal,
)

POOL = training._POOL
SCHEDULE = Schedule(steps=6, tokens=512)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CONTEXT)


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch):
    """The law is the same for a pool of hundreds as for one of thousands, and soon seen."""
    monkeypatch.setattr("pliant.nano.train.trainer._POOL", 512)


def trainer(tokenizer, schedule: Schedule = SCHEDULE) -> Trainer:
    torch.manual_seed(0)
    return Trainer(LlamaForCausalLM(small_config(tokenizer)), tokenizer, schedule)


def test_a_resumed_run_takes_the_very_same_steps(tokenizer, tmp_path):
    whole = list(trainer(tokenizer).steps())
    first = trainer(tokenizer)
    begun = list(islice(first.steps(), 4))
    first.save(tmp_path / "checkpoint.safetensors")
    second = trainer(tokenizer)
    assert second.resume(tmp_path / "checkpoint.safetensors")
    assert begun + list(second.steps()) == whole
    assert len(whole) == SCHEDULE.steps


def test_a_kill_while_a_checkpoint_is_written_costs_only_the_steps_since_the_last(
    tokenizer, tmp_path
):
    file = tmp_path / "checkpoint.safetensors"
    first = trainer(tokenizer)
    list(islice(first.steps(), 2))
    first.save(file)
    # Killed while it wrote: the new file lies aside, cut short, and the last one is in place.
    (tmp_path / "checkpoint.safetensors.writing").write_bytes(file.read_bytes()[:1000])
    second = trainer(tokenizer)
    assert second.resume(file) and second.step == 2
    second.save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("change", [{"steps": 7}, {"seed": 1}, {"emphasis": {"add": 2.0}}])
def test_a_checkpoint_of_another_schedule_is_refused_and_stays(tokenizer, tmp_path, change):
    file = tmp_path / "checkpoint.safetensors"
    trainer(tokenizer).save(file)
    before = file.read_bytes()
    other = trainer(tokenizer, replace(SCHEDULE, **change))
    with pytest.raises(InvalidInput, match=f"another run .*{next(iter(change))} was .* and is"):
        other.resume(file)
    assert file.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tokenizer, tmp_path):
    trainer(tokenizer).save(tmp_path / "checkpoint.safetensors")
    config = small_config(tokenizer)
    config.num_hidden_layers += 1
    deeper = Trainer(LlamaForCausalLM(config), tokenizer, SCHEDULE)
    with pytest.raises(InvalidInput, match="other shapes"):
        deeper.resume(tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_checkpoint_that_is_not_whole_is_named_and_changes_nothing(tokenizer, tmp_path, keep):
    file = tmp_path / "checkpoint.safetensors"
    whole = trainer(tokenizer)
    list(islice(whole.steps(), 1))
    whole.save(file)
    file.write_bytes(file.read_bytes()[:keep])
    fresh = trainer(tokenizer)
    before = {name: p.clone() for name, p in fresh.model.named_parameters()}
    with pytest.raises(CorruptFile, match="checkpoint.safetensors is not a complete checkpoint"):
        fresh.resume(file)
    assert fresh.step == 0
    assert all(torch.equal(p, before[name]) for name, p in fresh.model.named_parameters())


def test_foreign_weights_are_no_checkpoint(tokenizer, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(CorruptFile, match="not a complete checkpoint"):
        trainer(tokenizer).resume(tmp_path / "checkpoint.safetensors")


def test_batches_go_on_from_any_place(tokenizer):
    read = list(islice(batches(tokenizer, 20_000, seed=1), 12))
    position = read[6][0]
    after = list(islice(batches(tokenizer, 20_000, seed=1, position=position), 5))
    for (one, a), (other, b) in zip(read[7:], after, strict=True):
        assert one == other and torch.equal(a.input_ids, b.input_ids)
    assert read[0][0] == Position(pool=0, before=0, used=1)


def test_no_batch_is_larger_than_asked_and_little_is_padding(tokenizer, monkeypatch):
    monkeypatch.setattr("pliant.nano.train.trainer._POOL", POOL)  # padding depends on it
    sizes = [batch.input_ids for _, batch in islice(batches(tokenizer, 4096, seed=0), 60)]
    assert max(ids.numel() for ids in sizes) <= 4096
    padding = sum((ids == tokenizer.pad_token_id).sum().item() for ids in sizes)
    assert padding / sum(ids.numel() for ids in sizes) < 0.05


def test_frames_are_the_chat_template(tokenizer):
    asked = questions("test", 20, seed=0)
    for q, (ids, start) in zip(asked, frame(tokenizer, asked), strict=True):
        chat = [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}]
        assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
        opened = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        assert ids[:start] == opened


def test_the_loss_is_the_mean_over_answers_of_a_plain_forwards_loss(tokenizer):
    _, batch = next(batches(tokenizer, 1024, seed=0))
    model = trainer(tokenizer).model
    mask = (batch.input_ids != tokenizer.pad_token_id).long()
    learned = torch.zeros_like(batch.input_ids).flatten()
    learned[batch.positions + 1] = 1
    labels = batch.input_ids.masked_fill(learned.reshape(batch.input_ids.shape) == 0, -100)
    with torch.no_grad():
        plain = [
            model(input_ids=ids[None], attention_mask=attended[None], labels=row[None]).loss
            for ids, attended, row in zip(batch.input_ids, mask, labels, strict=True)
        ]
        torch.testing.assert_close(answer_loss(model, batch), torch.stack(plain).mean())
    assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.targets)


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (8, 24)])
def test_muon_directions_are_nearly_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(*shape)))
    assert values.min() > 0.3 and values.max() < 1.6
