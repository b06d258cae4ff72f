"""Learning is the same by seed, goes on after a kill, and counts only the answers."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from pliant.loading import load
from pliant.nano import questions
from pliant.nano.batches import Place, batches, frame
from pliant.nano.learning import Learner, Schedule, answer_loss
from pliant.nano.muon import orthogonal
from pliant.nano.tokenizer import build_tokenizer
from pliant.nano.train import CONTEXT, small_config

SCHEDULE = Schedule(steps=6, tokens=512)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CONTEXT)


def learner(tokenizer) -> Learner:
    torch.manual_seed(0)
    return Learner(LlamaForCausalLM(small_config(tokenizer)), tokenizer, SCHEDULE)


def test_a_resumed_run_takes_the_very_same_steps(tokenizer, tmp_path):
    whole = list(learner(tokenizer).steps())
    first = learner(tokenizer)
    begun = list(islice(first.steps(), 4))
    first.save(tmp_path / "checkpoint")
    second = learner(tokenizer)
    assert second.resume(tmp_path / "checkpoint")
    assert begun + list(second.steps()) == whole
    assert len(whole) == SCHEDULE.steps


def test_a_kill_while_a_checkpoint_is_written_costs_only_the_steps_since_the_last(
    tokenizer, tmp_path
):
    first = learner(tokenizer)
    list(islice(first.steps(), 2))
    first.save(tmp_path / "checkpoint")
    # Killed between the two renames: the old folder is aside, the new one not yet in place.
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.writing").mkdir()
    second = learner(tokenizer)
    assert second.resume(tmp_path / "checkpoint") and second.step == 2


def test_a_checkpoint_of_another_schedule_is_not_gone_on_from(tokenizer, tmp_path):
    first = learner(tokenizer)
    first.save(tmp_path / "checkpoint")
    torch.manual_seed(0)
    other = Learner(LlamaForCausalLM(small_config(tokenizer)), tokenizer, Schedule(steps=7))
    assert not other.resume(tmp_path / "checkpoint")


def test_batches_go_on_from_any_place(tokenizer):
    read = list(islice(batches(tokenizer, 20_000, seed=1), 12))
    place = read[6][0]
    after = list(islice(batches(tokenizer, 20_000, seed=1, place=place), 5))
    for (one, a), (other, b) in zip(read[7:], after, strict=True):
        assert one == other and torch.equal(a.input_ids, b.input_ids)
    assert read[0][0] == Place(pool=0, before=0, used=1)


def test_no_batch_is_larger_than_asked_and_none_is_mostly_padding(tokenizer):
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
    model = learner(tokenizer).model
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


def test_the_program_trains_both_models_and_goes_on_after_it_was_stopped(tmp_path):
    """The real program, ten thousand times shorter, twice: the second call finds all done."""
    command = [sys.executable, "-m", "pliant.nano.train", "--shorter", "10000", "--threads", "1"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "step" in done.stdout and "step" not in again.stdout
    small, _ = load(tmp_path / "out" / "nano-s")
    large, tokenizer = load(tmp_path / "out" / "nano-l")
    assert small.dtype == large.dtype == torch.float32
    assert large.num_parameters() >= 4 * small.num_parameters()
    assert type(tokenizer).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert not list(Path(tmp_path / "out").glob("*.writing"))
