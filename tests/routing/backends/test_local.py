"""An answer goes on from the prefill that its prompt was scored in, and is the same answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.routing.minimal_scorer import Letters, content

from pliant.complexity import CPXConfig, attach
from pliant.routing.backends.local import LocalBackend
from pliant.routing.prompts import Prompt
from pliant.routing.router import Router
from pliant.routing.router_file import make
from pliant.routing.scorers import Predictions, Prefilling

EASY, HARD = "2+2", "what is " + "2+" * 30 + "2"


class Reading(Letters):
    """Decides by the letters, and reads the cheap model's prefill as a [CPX] scorer does."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        config = CPXConfig(rows=2, outputs=("right:nano-s", "right:nano-l"))
        self.reader = attach(model, config, tokenizer, name="continuing")
        torch.nn.init.normal_(self.reader.head.weight)
        self.read: list[float] = []

    def while_answering(self, prompt: Prompt) -> Prefilling:
        def predictions(scores: Any) -> Predictions:
            self.read.append(float(scores.score[0]))
            return self.predict([prompt])

        return Prefilling(self.reader, predictions)


@pytest.fixture
def backends() -> dict[str, LocalBackend]:
    return {name: LocalBackend(name, name) for name in ("nano-s", "nano-l")}


@pytest.fixture
def scorer(backends: dict[str, LocalBackend]) -> Iterator[Reading]:
    result = Reading(backends["nano-s"].model, backends["nano-s"].tokenizer)
    yield result
    result.reader.detach()


def router(scorer: Any, backends: Any, **changes: Any) -> Router:
    return Router(make(**content(**changes)), scorer, backends=backends)


def forwards(model: Any) -> tuple[list[int], Any]:
    """The lengths of a model's forwards, and the hook that keeps the list."""
    lengths: list[int] = []
    first = model.get_input_embeddings()
    return lengths, first.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))


def test_the_answer_is_that_of_the_backend_and_the_prompt_runs_once(
    scorer: Reading, backends: dict[str, LocalBackend]
) -> None:
    plain = router(Letters(), backends).ask(EASY, max_new_tokens=8)
    r = router(scorer, backends)
    r.ask(EASY, max_new_tokens=8)  # what has to be tried on a model once is tried now
    lengths, hook = forwards(backends["nano-s"].model)
    reply = r.ask(EASY, max_new_tokens=8)
    hook.remove()
    assert reply.continued and not plain.continued
    assert (reply.text, reply.used.answer_tokens) == (plain.text, plain.used.answer_tokens)
    assert (reply.used.prompt_tokens, reply.cost) == (plain.used.prompt_tokens, plain.cost)
    assert reply.used.flops == 2 * 95_760 * (reply.used.prompt_tokens + reply.used.answer_tokens)
    prompt = len(EASY) + 2
    assert lengths[:2] == [prompt, 2], "the prompt, and the two rows"
    assert set(lengths[2:]) == {1} and len(lengths) == 2 + reply.used.answer_tokens - 1
    framed = [[{"role": "user", "content": EASY}]]
    assert scorer.read[-1] == pytest.approx(float(scorer.reader.score(framed).score[0]), abs=1e-5)
    assert r.report()["answered"] == r.report()["decisions"] == 2


def test_a_prompt_for_the_other_model_leaves_after_it_was_scored(
    scorer: Reading, backends: dict[str, LocalBackend]
) -> None:
    r = router(scorer, backends)
    r.ask(HARD, max_new_tokens=4)
    lengths, hook = forwards(backends["nano-s"].model)
    reply = r.ask(HARD, max_new_tokens=4)
    hook.remove()
    assert reply.model == "nano-l" and not reply.continued
    assert lengths == [len(HARD) + 2, 2]
    assert r.report()["decisions"] == 2


def test_the_longest_answer_may_depend_on_the_score(
    scorer: Reading, backends: dict[str, LocalBackend]
) -> None:
    bands = [{"up_to": 0.1, "max_new_tokens": 1}, {"up_to": 1.0, "max_new_tokens": 9}]
    r = router(scorer, backends, settings=bands)
    plain = router(Letters(), backends, settings=bands)
    for prompt in (EASY, "what is 12 plus 30"):
        reply = r.ask(prompt)
        assert reply.continued and reply.text == plain.ask(prompt).text
    assert r.ask(EASY).used.answer_tokens == 1


def test_answers_that_are_drawn_are_drawn_by_the_backend(
    scorer: Reading, backends: dict[str, LocalBackend]
) -> None:
    r, plain = router(scorer, backends), router(Letters(), backends)
    how = {"max_new_tokens": 8, "temperature": 2.0, "samples": 4, "seed": 1}
    reply = r.ask(EASY, **how)
    assert not reply.continued and reply.texts == plain.ask(EASY, **how).texts
    assert r.report()["decisions"] == 1


def test_a_session_that_keeps_its_model_is_not_scored(
    scorer: Reading, backends: dict[str, LocalBackend]
) -> None:
    r = router(scorer, backends)
    assert r.ask(EASY, session="a", max_new_tokens=4).continued
    again = r.ask(HARD, session="a", max_new_tokens=4)
    assert again.model == "nano-s" and not again.continued and len(scorer.read) == 1


def test_another_copy_of_the_model_goes_on_from_nothing(scorer: Reading) -> None:
    """The scorer reads a model that no backend answers with."""
    far = {name: LocalBackend(name, "nano-l") for name in ("nano-s", "nano-l")}
    reply = router(scorer, far).ask(EASY, max_new_tokens=4)
    assert not reply.continued and scorer.read == []


def test_a_scorer_that_reads_the_cheap_model_offers_its_prefill(
    backends: dict[str, LocalBackend], tmp_path: Path
) -> None:
    """Trained for a moment, saved and loaded; both ways of scoring must agree."""
    from pliant import nano
    from pliant.routing import Outcomes, scorers
    from pliant.routing.scorers.cpx import Capacity
    from pliant.routing.scorers.linear import folds
    from pliant.routing.scorers.novelty import NoveltyDetector, WithNovelty

    texts = tuple(q.prompt for q in nano.questions("dev", 120, seed=5))
    right = [[float(len(text) % 2), float(len(text) % 3 > 0)] for text in texts]
    outcomes = Outcomes(texts, ("nano-s", "nano-l"), right, [[1.0, 5.0]] * len(texts))
    few = {"base": "nano-s", "capacities": (Capacity(1, 0),), "epochs": 1}
    detector = NoveltyDetector.fit(outcomes, [folds(outcomes, 5, 0)])
    fitted = WithNovelty(scorers.make("cpx", **few).fit(outcomes), detector)
    file = content(scorer={"kind": "cpx"}, threshold={"value": 9.0, "sentence": "never"})
    Router(make(**file), fitted).save(tmp_path)

    with Router.load(tmp_path, backends=backends) as r:
        assert isinstance(r.scorer, WithNovelty)
        for text in (texts[0], texts[1]):
            chosen, reply = r.choose(text), r.ask(text, max_new_tokens=8)
            assert reply.model == chosen.model == "nano-s" and reply.continued
            assert reply.decision.score == pytest.approx(chosen.score, abs=1e-5)
            assert reply.decision.gain == pytest.approx(chosen.gain, abs=1e-5)
        novel = r.ask("Ωμέγα ☃ ☃ ☃ ☃", max_new_tokens=4)
        assert novel.model == "nano-l" and novel.decision.novel and not novel.continued
    with Router.load(tmp_path, device="cpu") as r:
        assert r.ask(texts[0], max_new_tokens=4).continued, "scorer and backend share a device"
    plain = router(Letters(), backends, threshold=file["threshold"])
    assert plain.ask(texts[0], max_new_tokens=8).text == reply_of(tmp_path, texts[0], backends)


def reply_of(folder: Path, prompt: str, backends: dict[str, LocalBackend]) -> str:
    with Router.load(folder, backends=backends, ledger=None) as r:
        return r.ask(prompt, max_new_tokens=8).text
