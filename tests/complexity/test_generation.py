"""Scoring from the prefill never changes what is generated, in any kind of generation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.minimal_adapter import tiny_llama, trained
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, TextIteratorStreamer

from pliant.anatomy.tiny import tiny_model
from pliant.complexity import Complexity, CPXConfig, Scores, attach
from pliant.errors import InvalidInput
from pliant.loading import load
from pliant.prefill import supports_cache

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [16], [20, 21, 22, 23]]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture
def scorer(model: PreTrainedModel) -> Complexity:
    return made(model)


def made(model: nn.Module, **settings: Any) -> Complexity:
    return trained(attach(model, CPXConfig(**settings)))


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "a processor": {"do_sample": False, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_generation_is_as_without(
    model: PreTrainedModel, kind: str, layer: int | None
) -> None:
    scorer = made(model, layer=layer)
    options = {**NEW, **KINDS[kind]}
    torch.manual_seed(0)
    plain = model.generate(**padded(PROMPTS), **options)
    torch.manual_seed(0)
    given = padded(PROMPTS)
    output = scorer.generate(given["input_ids"], attention_mask=given["attention_mask"], **options)
    assert torch.equal(output.outputs[0], plain)
    assert output.scores.score == pytest.approx(scorer.score(PROMPTS).score, abs=1e-5)
    copies = len(plain) // len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        for sequence in output.sequences[i * copies : (i + 1) * copies]:
            assert sequence is not None and sequence[: len(prompt)].tolist() == prompt


def test_the_first_forward_is_the_only_one_over_the_prompt(scorer: Complexity) -> None:
    assert supports_cache(scorer.anatomy)  # tried once a model, with forwards of its own
    lengths: list[int] = []
    hook = scorer.anatomy.layers[0].register_forward_hook(
        lambda _, args, out: lengths.append((out if isinstance(out, Tensor) else out[0]).shape[1])
    )
    output = scorer.generate([PROMPTS[1]], **NEW, do_sample=False)
    hook.remove()
    assert lengths == [7, 1, 1, 1, 1, 1, 1]  # the prompt, [CPX], and five more of the six
    assert not output.prefilled_again


def test_assisted_decoding_is_scored_as_well(model: PreTrainedModel, scorer: Complexity) -> None:
    prompt = [[5, 6, 7, 5, 6, 7, 5, 6]]
    options = {**NEW, "do_sample": False, "prompt_lookup_num_tokens": 2}
    plain = model.generate(**padded(prompt), **options)
    output = scorer.generate(prompt, **options)
    assert torch.equal(output.outputs[0], plain)
    assert output.scores.score == pytest.approx(scorer.score(prompt).score, abs=1e-5)


def test_a_prompt_that_is_partly_cached_is_scored_whole(scorer: Complexity) -> None:
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    options = {**NEW, "do_sample": False}

    def cached() -> Any:
        with torch.no_grad():
            return scorer.base(prompt[:, :6], use_cache=True).past_key_values

    output = scorer.generate(prompt, past_key_values=cached(), **options)
    assert torch.equal(output.outputs[0], scorer.base.generate(prompt, **options))
    assert output.scores.score == pytest.approx(scorer.score(prompt).score, abs=1e-5)
    left = scorer.generate(prompt, past_key_values=cached(), leave_above=0.0, **options)
    assert left.sequences == (None,) and left.left.tolist() == [True]
    with pytest.raises(InvalidInput, match="one prompt at a time"):
        scorer.generate(prompt.repeat(2, 1), past_key_values=cached(), leave_above=0.5, **options)


def test_a_prompt_leaves_though_its_first_forward_ran_drafts_as_well(scorer: Complexity) -> None:
    options = {**NEW, "do_sample": False, "prompt_lookup_num_tokens": 2}
    output = scorer.generate([[5, 6, 7, 5, 6, 7, 5, 6]], leave_above=0.0, **options)
    assert output.sequences == (None,) and output.left.tolist() == [True]


def test_layers_that_draft_for_the_model_are_not_what_is_scored(
    model: PreTrainedModel, scorer: Complexity
) -> None:
    options = {**NEW, "do_sample": False, "assistant_early_exit": 1}
    plain = model.generate(**padded(PROMPTS[:1]), **options)
    output = scorer.generate(PROMPTS[:1], **options)
    assert torch.equal(output.outputs[0], plain)
    assert output.scores.score == pytest.approx(scorer.score(PROMPTS[:1]).score, abs=1e-5)


# --- leaving --------------------------------------------------------------------------------------


def between(scores: np.ndarray) -> float:
    """A threshold with half of the prompts above it."""
    low, high = np.sort(scores)[len(scores) // 2 - 1 : len(scores) // 2 + 1]
    return float((low + high) / 2)


@pytest.mark.parametrize("layer", [None, 2])
def test_hard_prompts_leave_and_the_others_are_generated(
    model: PreTrainedModel, layer: int | None
) -> None:
    scorer = made(model, layer=layer)
    scores = scorer.score(PROMPTS).score
    threshold = between(scores)
    whole = scorer.generate(PROMPTS, **NEW, do_sample=False)
    output = scorer.generate(PROMPTS, leave_above=threshold, **NEW, do_sample=False)
    assert output.left.tolist() == (scores > threshold).tolist()
    assert output.prefilled_again  # half of the batch left
    for sequence, other, left in zip(output.sequences, whole.sequences, output.left, strict=True):
        assert sequence is None if left else torch.equal(sequence, other)


def test_who_leaves_may_be_somebody_elses_decision(scorer: Complexity) -> None:
    seen: list[np.ndarray] = []

    def second_leaves(scores: Scores) -> list[bool]:
        seen.append(scores.score)
        return [i == 1 for i in range(len(scores))]

    output = scorer.generate(PROMPTS, leave_above=second_leaves, **NEW, do_sample=False)
    assert output.left.tolist() == [i == 1 for i in range(len(PROMPTS))]
    assert output.sequences[1] is None and output.sequences[0] is not None
    (scores,) = seen
    assert scores == pytest.approx(scorer.score(PROMPTS).score, abs=1e-5)


@pytest.mark.parametrize("leaving", [0, 1])
def test_prompts_that_stay_retain_their_own_options(scorer: Complexity, leaving: int) -> None:
    """Tensors with an entry for each prompt, and functions of a prompt's index."""
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14], [16, 17, 0, 0, 0, 0]])
    masked = {"attention_mask": (ids != 0).long()}

    def allowed(place: int, _: Tensor) -> list[int]:
        return list(range(20 * place + 1, 20 * place + 20))

    output = scorer.generate(
        ids,
        **masked,
        leave_above=lambda scores: [i == leaving for i in range(3)],
        prefix_allowed_tokens_fn=allowed,
        position_ids=torch.tensor([[0, 1, 2, 3, 9, 9], [0, 1, 2, 3, 4, 5], [0, 1, 9, 9, 9, 9]]),
        **NEW,
        do_sample=False,
    )
    plain = scorer.generate(ids, **masked, prefix_allowed_tokens_fn=allowed, **NEW, do_sample=False)
    for i, (ours, other) in enumerate(zip(output.sequences, plain.sequences, strict=True)):
        assert ours is None if i == leaving else torch.equal(ours, other)


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_place_is_the_prompts_own_in_every_batch(
    scorer: Complexity, batch_size: int | None, copies: int
) -> None:
    def allowed(place: int, _: Tensor) -> list[int]:
        return [30 + place]

    output = scorer.generate(
        PROMPTS,
        leave_above=lambda scores: scores.score > scores.score.min() if batch_size is None else [0],
        batch_size=batch_size,
        prefix_allowed_tokens_fn=allowed,
        num_return_sequences=copies,
        do_sample=True,
        **NEW,
    )
    for at, sequence in enumerate(output.sequences):
        assert sequence is None or sequence[-6:].tolist() == [30 + at] * 6
    assert sum(s is not None for s in output.sequences) == copies * (1 if batch_size is None else 4)


@pytest.mark.parametrize(("threshold", "runs"), [(0.0, 0), (1.0, 1)])
def test_a_prompt_that_leaves_early_never_reaches_the_later_layers(
    model: PreTrainedModel, threshold: float, runs: int
) -> None:
    scorer = made(model, layer=2)
    assert supports_cache(scorer.anatomy)
    calls = [0, 0]

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    layers = (scorer.anatomy.layers[0], scorer.anatomy.layers[3])
    ran = [layer.self_attn.register_forward_hook(count(n)) for n, layer in enumerate(layers)]
    output = scorer.generate([PROMPTS[0]], leave_above=threshold, max_new_tokens=1)
    for hook in ran:
        hook.remove()
    assert calls == [2, runs]  # the prompt and [CPX]; and whether it was resumed, not run again
    assert output.left.tolist() == [runs == 0] and not output.prefilled_again


# --- texts, streams, threads ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> Iterator[Complexity]:
    model, tokenizer = load("nano-s")
    scorer = trained(attach(model, CPXConfig(rows=2), tokenizer))
    yield scorer
    scorer.detach()


def test_texts_come_back_in_their_order(nano: Complexity) -> None:
    questions = ["What is 2 + 2?", "What is the colour of a red bag?", "What is 7 + 1?"]
    output = nano.generate(questions, chat=True, max_new_tokens=8, do_sample=False)
    assert output.texts is not None and output.texts[0] == "4" and output.texts[2] == "8"
    one_by_one = nano.generate(questions, chat=True, batch_size=1, max_new_tokens=8)
    assert one_by_one.texts == output.texts
    assert one_by_one.scores.score == pytest.approx(output.scores.score, abs=1e-5)


@pytest.mark.parametrize("leave_above", [None, 0.0])
def test_a_stream_streams_and_ends(nano: Complexity, leave_above: float | None) -> None:
    streamer = TextIteratorStreamer(nano.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"leave_above": leave_above, "streamer": streamer, "chat": True}
    thread = threading.Thread(
        target=nano.generate, args=(["What is 2 + 2?"],), kwargs={**options, "max_new_tokens": 4}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == ("4" if leave_above is None else "")


@pytest.mark.parametrize("leaving", [(), (0,), (0, 1)])
def test_only_prompts_that_stay_are_streamed_once(
    scorer: Complexity, leaving: tuple[int, ...]
) -> None:
    streamed: list[list[int]] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            streamed.append(list(value.shape))

        def end(self) -> None:
            streamed.append([])

    rule = {"leave_above": lambda scores: [i in leaving for i in range(2)]} if leaving else {}
    prompts = [PROMPTS[0], PROMPTS[3]]
    scorer.generate(prompts, **rule, streamer=Streamer(), **NEW, do_sample=False)
    stay = 2 - len(leaving)
    assert streamed == ([[stay, 4], *([[stay]] * 6), []] if stay else [[]])


def test_threads_do_not_hear_each_other() -> None:
    model = tiny_llama()
    configs = {f"rows-{count}": CPXConfig(rows=count) for count in (1, 2, 3)}
    attached = [attach(model, config, name=name) for name, config in configs.items()]
    scorers = [trained(scorer, seed) for seed, scorer in enumerate(attached)]
    plain = model.generate(**padded(PROMPTS), **NEW, do_sample=False)
    expected = [scorer.score(PROMPTS).score for scorer in scorers]
    wrong: list[str] = []

    def work(scorer: Complexity | None, score: Any) -> None:
        for _ in range(10):
            if scorer is None:
                if not torch.equal(
                    model.generate(**padded(PROMPTS), **NEW, do_sample=False), plain
                ):
                    wrong.append("the base")
                continue
            output = scorer.generate(PROMPTS, **NEW, do_sample=False)
            if not np.allclose(output.scores.score, score, atol=1e-5):
                wrong.append(scorer.name)

    jobs = [*zip(scorers, expected, strict=True), (None, None)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- what cannot be -------------------------------------------------------------------------------


def test_nothing_to_begin_with_is_refused() -> None:
    scorer = made(tiny_llama(bos_token_id=None))
    with pytest.raises(InvalidInput, match="prompt 1 is empty"):
        scorer.generate([[5], []])


def test_a_mask_goes_with_a_tensor(scorer: Complexity) -> None:
    with pytest.raises(InvalidInput, match="attention_mask"):
        scorer.generate(PROMPTS, attention_mask=torch.ones(1, 1))


def test_a_threshold_needs_a_score(model: PreTrainedModel, scorer: Complexity) -> None:
    with pytest.raises(InvalidInput, match="leave_above = 'high'"):
        scorer.generate(PROMPTS, leave_above="high")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="each of the 4 prompts"):
        scorer.generate(PROMPTS, leave_above=lambda scores: [True], batch_size=4)
    other = trained(attach(model, CPXConfig(outputs=("maths", "code")), name="other"))
    with pytest.raises(InvalidInput, match="none is called 'score'"):
        other.generate(PROMPTS, leave_above=0.5)


def test_padding_on_the_right_is_moved(scorer: Complexity) -> None:
    ids = torch.tensor([[5, 6, 7, 0, 0], [9, 10, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    output = scorer.generate(ids, attention_mask=mask, **NEW, do_sample=False)
    lists = scorer.generate([[5, 6, 7], [9, 10, 11, 12, 13]], **NEW, do_sample=False)
    assert torch.equal(output.outputs[0], lists.outputs[0])


@pytest.mark.parametrize("eos", [63, 0])
def test_without_a_mask_padding_is_what_generate_takes_for_it(
    model: PreTrainedModel, scorer: Complexity, eos: int
) -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])
    options = {**NEW, "do_sample": False, "eos_token_id": eos}
    output = scorer.generate(ids, **options)
    assert torch.equal(output.outputs[0], model.generate(ids, **options))
    prompt = [5, 6, 7] if eos else [0, 0, 5, 6, 7]
    assert output.scores.score[0] == pytest.approx(scorer.score([prompt]).score[0], abs=1e-5)


@pytest.mark.parametrize("name", ["input_ids", "inputs", "inputs_embeds"])
def test_prompts_are_given_once(scorer: Complexity, name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        scorer.generate(PROMPTS, **{name: torch.tensor([[5, 6]])})


def test_where_padding_is_not_borne_prompts_are_grouped_by_length() -> None:
    scorer = made(tiny_model("bart"))
    output = scorer.generate(PROMPTS, **NEW, do_sample=False)
    assert len(output.outputs) == 3  # lengths 1, 4 and 7
    for prompt, sequence in zip(PROMPTS, output.sequences, strict=True):
        alone = scorer.base.generate(torch.tensor([prompt]), **NEW, do_sample=False)
        assert sequence is not None and torch.equal(sequence, alone[0])


def test_processors_of_your_own_are_passed_on(scorer: Complexity) -> None:
    only = LogitsProcessorList([lambda ids, scores: scores.index_fill(1, torch.arange(60), -1e9)])
    output = scorer.generate([PROMPTS[0]], logits_processor=only, **NEW, do_sample=False)
    assert output.sequences[0] is not None and (output.sequences[0][4:] >= 60).all()
