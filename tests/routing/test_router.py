"""The router: it chooses by the file, falls over, remembers sessions, and keeps the books."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.routing.chat_server import ChatServer, chat_server
from tests.routing.minimal_scorer import Letters, content

from pliant.errors import InvalidInput
from pliant.routing.backends import BackendError, Retry
from pliant.routing.backends.remote import OpenAIBackend
from pliant.routing.live import drift
from pliant.routing.router import DriftWarning, Router
from pliant.routing.router_file import make
from pliant.routing.scorers import Predictions

EASY, HARD = "2+2", "what is " + "2+" * 30 + "2"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


_open: list[Router] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Connections do not outlive their test."""
    yield
    while _open:
        _open.pop().close()


def opened(new: Router) -> Router:
    _open.append(new)
    return new


def router(*, scorer: Letters | None = None, clock: Clock | None = None, **changes: Any) -> Router:
    file = make(**content(**changes))
    return opened(Router(file, scorer or Letters(), clock=clock or Clock()))


def far_models(**urls: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "backend": f"{name}=openai:m@{url}", "cost": 1.0 + 4.0 * at}
        for at, (name, url) in enumerate(urls.items())
    ]


def two_servers(weak: ChatServer, strong: ChatServer, **changes: Any) -> Router:
    """A router over two real servers, which does not try a failing call again."""
    clock = changes.pop("clock", None) or Clock()
    models = far_models(weak=weak.url, strong=strong.url)
    file = make(**content(**{"models": models, "default": "strong", **changes}))
    backends = {
        name: OpenAIBackend(name, "m", server.url, retry=Retry(tries=1), timeout=10)
        for name, server in (("weak", weak), ("strong", strong))
    }
    return opened(Router(file, Letters(), backends=backends, clock=clock))


# --- choosing -------------------------------------------------------------------------------------


def test_a_gain_above_the_threshold_goes_to_the_strong_model() -> None:
    r = router()
    easy, hard = r.choose(EASY), r.choose(HARD)
    assert (easy.model, hard.model) == ("nano-s", "nano-l")
    assert easy.score == pytest.approx(len(EASY) / 100) == easy.gain
    assert "not above +0.200" in easy.reason and ", above +0.200" in hard.reason
    assert not hard.fell_over and not hard.novel and not hard.from_session


def test_a_gain_that_looks_like_the_threshold_has_more_digits() -> None:
    gain = len(EASY) / 100
    r = router(threshold={"value": gain + 1e-5, "sentence": "nearly"})
    assert r.choose(EASY).reason == f"expected gain {gain:+.6f}, not above {gain + 1e-5:+.6f}"


@pytest.mark.parametrize(("value", "model"), [(float("inf"), "nano-s"), (float("-inf"), "nano-l")])
def test_an_infinite_threshold_sends_all_to_one_model(value: float, model: str) -> None:
    r = router(threshold={"value": value, "sentence": "all"})
    assert {r.choose(EASY).model, r.choose(HARD).model} == {model}


def test_of_many_models_the_one_that_is_worth_the_most_answers() -> None:
    """Gains of 0, h/2 and h for costs of 1, 2 and 5: by hand, at .1 for a unit of cost."""
    models = [
        {"name": name, "backend": f"{name}=nano-s", "cost": cost}
        for name, cost in (("a", 1.0), ("b", 2.0), ("c", 5.0))
    ]
    worth = {"on": "worth", "value": 0.1, "sentence": "s"}
    r = router(scorer=Letters(3), models=models, threshold=worth, default="c")
    assert [r.choose("x" * n).model for n in (10, 21, 59, 61, 100)] == ["a", "b", "b", "c", "c"]


def test_of_models_at_one_price_the_likeliest_to_be_right_answers() -> None:
    names = ("nano-s", "other", "nano-l")
    models = [{"name": name, "backend": f"{name}=nano-s", "cost": 2.0} for name in names]
    worth = {"on": "worth", "value": 0, "sentence": "the likelier"}
    calibration = {"other": {"kind": "platt", "slope": 1, "shift": 1}}
    chosen = router(
        models=models, threshold=worth, scorer=Letters(models=3), calibration=calibration
    )
    decision = chosen.choose(HARD)
    assert decision.model == "nano-l" and decision.reason == (
        "nano-l is the likeliest to be right, and every model costs the same"
    )
    raw = Letters(models=3).predict([HARD]).right[0]
    assert list(decision.probabilities) == list(names)
    assert decision.probabilities["nano-l"] == pytest.approx(raw[2])
    assert decision.probabilities["other"] > raw[1] and decision.score == pytest.approx(1 - raw[0])
    assert chosen.choose("").model == "nano-l"
    with pytest.raises(InvalidInput, match="fewer calls to nano-l save nothing"):
        chosen.choose(HARD, share=0.3)


def test_calibration_is_applied_to_the_score_and_not_to_the_ranking() -> None:
    platt = {"nano-s": {"kind": "platt", "slope": 1.0, "shift": 2.0}}
    plain, calibrated = router().choose(HARD), router(calibration=platt).choose(HARD)
    assert calibrated.score is not None and plain.score is not None
    assert calibrated.score < plain.score
    assert (calibrated.gain, calibrated.model) == (plain.gain, plain.model)


def test_an_unknown_kind_of_prompt_goes_to_the_default_and_says_so() -> None:
    decision = router().choose("да")
    assert decision.model == "nano-l" and decision.novel
    assert "unlike the prompts" in decision.reason and "nano-l, the default" in decision.reason
    assert router(novel="ignore").choose("да").model == "nano-s"


@pytest.mark.parametrize("prompt", ["", "  \n", [{"role": "user", "content": ""}]])
def test_an_empty_prompt_costs_as_little_as_can_be(prompt: Any) -> None:
    scorer = Letters()
    decision = router(scorer=scorer).choose(prompt)
    assert decision.model == "nano-s" and "empty" in decision.reason
    assert decision.score is None and scorer.asked == 0


@pytest.mark.parametrize("prompt", [None, 7, [], [{"role": "user"}], b"x", "\ud800"])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidInput, match="prompt"):
        router().choose(prompt)


def test_messages_are_chosen_for_as_texts_are() -> None:
    assert router().choose([{"role": "user", "content": HARD}]).model == "nano-l"


# --- contexts -------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_goes_to_the_next_model_and_says_so() -> None:
    models = content()["models"]
    models[0]["context"] = 40
    r = router(models=models, threshold={"value": 9.0, "sentence": "never"})
    decision = r.choose(HARD)
    assert decision.model == "nano-l" and decision.wanted == "nano-s" and decision.fell_over
    assert "nano-s does not take this prompt; nano-l stands in" in decision.reason
    assert r.choose(EASY).model == "nano-s"


def test_a_prompt_that_fits_nowhere_is_refused_with_the_sizes() -> None:
    with pytest.raises(InvalidInput, match="nano-s has 2,048.*nano-l has 2,048|nano-l.*nano-s"):
        router().choose("x" * 3000)


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_keeps_its_model_and_is_not_scored_again() -> None:
    scorer = Letters()
    r = router(scorer=scorer)
    assert r.choose(EASY, session="a").model == "nano-s"
    again = r.choose(HARD, session="a")
    assert again.model == "nano-s" and again.from_session and "session" in again.reason
    assert scorer.asked == 1
    assert r.choose(HARD, session="b").model == "nano-l"
    assert r.choose(EASY, session="b").model == "nano-l"


def test_a_session_may_move_up_and_never_down() -> None:
    r = router(sticky={"policy": "upgrade"})
    models = [r.choose(prompt, session="a").model for prompt in (EASY, EASY, HARD, EASY, HARD)]
    assert models == ["nano-s", "nano-s", "nano-l", "nano-l", "nano-l"]


class Specialists(Letters):
    """Each model is right on the prompts that name it, of three."""

    def predict(self, prompts: Any, groups: Any = None) -> Predictions:
        right = np.array([[0.9 if name in text else 0.3 for name in "abc"] for text in prompts])
        return Predictions(right, right - right[:, :1], np.zeros(len(prompts), dtype=np.bool_))


@pytest.mark.parametrize(("costs", "value"), [((1.0, 1.0, 1.0), 0.0), ((2.0, 1.0, 3.0), 0.1)])
def test_a_session_moves_to_the_likelier_model_whatever_its_place(
    costs: tuple[float, ...], value: float
) -> None:
    models = [
        {"name": name, "backend": f"{name}=nano-s", "cost": cost}
        for name, cost in zip("abc", costs, strict=True)
    ]
    threshold = {"on": "worth", "value": value, "sentence": "by worth"}
    changes = {"models": models, "threshold": threshold, "default": "c"}
    r = router(scorer=Specialists(), sticky={"policy": "upgrade"}, **changes)
    # "z" is of no specialist: the cheapest would be chosen, but no model is likelier right.
    chosen = [r.choose(prompt, session="s").model for prompt in ("c", "z", "a", "z", "b")]
    assert chosen == ["c", "c", "a", "a", "b"]


def test_sessions_can_be_off() -> None:
    r = router(sticky={"policy": "off"})
    assert [r.choose(p, session="a").model for p in (EASY, HARD, EASY)] == [
        "nano-s",
        "nano-l",
        "nano-s",
    ]


def test_a_session_is_forgotten_after_its_time_or_by_number() -> None:
    clock = Clock()
    r = router(sticky={"ttl": 10.0, "limit": 2}, clock=clock)
    r.choose(EASY, session="a")
    clock.now = 9.0
    assert r.choose(HARD, session="a").model == "nano-s"
    clock.now = 18.9
    assert r.choose(HARD, session="a").from_session, "used at 9, so it lives until 19"
    clock.now = 29.0
    assert r.choose(HARD, session="a").model == "nano-l"
    r.choose(EASY, session="b")
    r.choose(EASY, session="c")
    assert not r.choose(EASY, session="a").from_session, "the third session pushed the oldest out"


def test_many_threads_of_one_session_get_one_model() -> None:
    r = router()
    start = threading.Barrier(8)

    def choose(i: int) -> str:
        start.wait()
        return r.choose(EASY if i % 2 else HARD, session="one").model

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(choose, range(8)))) == 1


# --- falling over ---------------------------------------------------------------------------------


def test_a_dead_backend_falls_over_and_is_tried_again_after_the_cooldown() -> None:
    clock = Clock()
    with chat_server([500, 500]) as weak, chat_server() as strong:
        r = two_servers(weak, strong, clock=clock)
        first = r.ask(EASY)
        assert first.model == "strong" and first.text == "2+2"
        assert first.decision.wanted == "weak" and first.decision.fell_over
        assert "scripted 500" in first.decision.reason and "strong stands in" in (
            first.decision.reason
        )
        assert r.choose(EASY).model == "strong", "weak is down"
        assert "weak is down" in r.ask(EASY).decision.reason
        assert len(weak.bodies) == 1
        clock.now = 31.0
        assert r.ask(EASY).model == "strong", "the trial fails"
        assert len(weak.bodies) == 2
        clock.now = 50.0
        assert r.ask(EASY).model == "strong" and len(weak.bodies) == 2
        clock.now = 62.0
        assert r.ask(EASY).model == "weak", "the trial succeeds"
        assert r.choose(EASY).model == "weak"
        assert r.report()["fell_over"] == 5


def test_when_a_cooldown_ends_one_call_is_the_trial_and_the_others_stay_away() -> None:
    from pliant.routing.live.preference import Breakers

    clock = Clock()
    breakers = Breakers(30.0, clock)
    assert breakers.enter("m") and breakers.enter("m")
    breakers.failed("m")
    assert breakers.down("m") and not breakers.enter("m")
    clock.now = 30.0
    assert not breakers.down("m")
    assert [breakers.enter("m") for _ in range(3)] == [True, False, False]
    clock.now = 60.0
    assert breakers.enter("m"), "a trial that never ended counts as failed"
    breakers.succeeded("m")
    assert breakers.enter("m") and breakers.enter("m")


def test_a_prompt_that_a_model_refuses_does_not_bring_the_model_down() -> None:
    with chat_server([400]) as weak, chat_server() as strong:
        r = two_servers(weak, strong)
        assert r.ask(EASY).model == "strong"
        assert r.ask(EASY).model == "weak"


def test_when_all_fail_the_error_names_each_and_the_ledger_has_it() -> None:
    with chat_server([500] * 9) as weak, chat_server([503] * 9) as strong:
        r = two_servers(weak, strong)
        with pytest.raises(BackendError, match="weak.*500.*strong.*503"):
            r.ask(EASY)
        with pytest.raises(BackendError):
            r.ask(EASY)
        assert len(weak.bodies) == 2, "when nobody is up, those that are down are asked"
        report = r.report()
        assert report["failed"] == 2 and report["cost"] == report["saved"] == 0


def test_a_session_goes_back_to_its_model_when_that_is_well_again() -> None:
    clock = Clock()
    with chat_server([500]) as weak, chat_server() as strong:
        r = two_servers(weak, strong, clock=clock)
        assert r.ask(EASY, session="a").model == "strong"
        away = r.ask(EASY, session="a")
        assert away.model == "strong" and away.decision.wanted == "weak"
        assert "the session is with weak; weak is down; strong stands in" in away.decision.reason
        assert r.choose(EASY, session="a").model == "strong"
        clock.now = 100.0
        assert [r.ask(EASY, session=name).model for name in "aab"] == ["weak"] * 3


def test_a_session_stays_with_the_model_that_took_a_prompt_which_its_own_refused() -> None:
    with chat_server([400]) as weak, chat_server() as strong:
        r = two_servers(weak, strong)
        assert [r.ask(EASY, session="a").model for _ in range(2)] == ["strong"] * 2
        assert r.ask(EASY, session="b").model == "weak"


def opened_from_the_file(weak: str, strong: str, **of_weak: Any) -> Router:
    """A router that opens its models itself, as its file says."""
    models = far_models(weak=weak, strong=strong)
    models[0] |= of_weak
    return opened(Router(make(**content(models=models, default="strong")), Letters()))


def test_a_model_that_fails_is_tried_once_where_another_stands_in() -> None:
    with chat_server([500] * 9) as weak, chat_server() as strong:
        assert opened_from_the_file(weak.url, strong.url).ask(EASY).model == "strong"
        assert len(weak.bodies) == 1


def test_a_file_says_how_often_and_how_long_a_model_is_tried() -> None:
    with chat_server([500, None, "stall"]) as weak, chat_server() as strong:
        r = opened_from_the_file(weak.url, strong.url, tries=2, timeout=0.3)
        assert r.ask(EASY).model == "weak" and len(weak.bodies) == 2
        weak.script += ["stall"]
        reply = r.ask(EASY)
        assert reply.model == "strong" and "no answer in 0.3 s (after 2 tries)" in (
            reply.decision.reason
        )


def test_where_no_other_model_takes_the_prompt_the_one_that_does_is_tried_again() -> None:
    with chat_server() as weak, chat_server([429]) as strong:
        r = opened_from_the_file(weak.url, strong.url, context=8)
        assert r.ask(HARD).model == "strong" and len(strong.bodies) == 2 and not weak.bodies


def test_a_dead_address_is_fallen_over_from_at_once() -> None:
    with socket.socket() as nobody, chat_server() as strong:
        nobody.bind(("127.0.0.1", 0))  # taken, and not listened on
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        reply = opened_from_the_file(url, strong.url).ask(EASY)
        assert reply.model == "strong" and "cannot be reached" in reply.decision.reason
        assert "tries" not in reply.decision.reason


# --- asking ---------------------------------------------------------------------------------------


def test_the_nano_models_answer_through_a_router() -> None:
    from pliant import nano

    r = router()
    for question in nano.questions("test", 6, seed=2):
        reply = r.ask(question.prompt, max_new_tokens=24)
        model, tokenizer = nano.load(reply.model)
        assert [reply.text] == nano.ask(model, tokenizer, [question.prompt])
        assert reply.used.answer_tokens > 0 and not reply.continued
    assert r.report()["answered"] == 6


def test_cost_and_savings_follow_what_was_used() -> None:
    """Three prompt tokens and two of the answer cost 5; a call of the strong model costs five times
    as much on average, so it would have cost 25."""
    with chat_server() as weak, chat_server() as strong:
        r = two_servers(weak, strong, unit="tokens", scorer={"kind": "letters", "cost": 0.5})
        reply = r.ask("abc")
        assert (reply.used.prompt_tokens, reply.used.answer_tokens) == (3, 2)
        assert reply.cost == 5 + 0.5
        assert reply.saved == 25 - 5.5
        hard = r.ask(HARD)
        assert hard.model == "strong" and hard.saved == -0.5, "but for the scoring"
        report = r.report()
        assert report["cost"] == reply.cost + hard.cost
        assert report["saved"] == reply.saved + hard.saved


def test_labels_are_paid_back_out_of_the_savings() -> None:
    """In calls, too, each counts what its model's cost: 1 and 5."""
    labels = {"weak": {"calls": 2}, "strong": {"calls": 1}}
    with chat_server() as weak, chat_server() as strong:
        r = two_servers(weak, strong, unit="calls", label_cost=labels)
        for _ in range(3):
            r.ask(EASY)
        report = r.report()
        assert report["saved"] == 3 * 4 and report["label_cost"] == 7
        assert report["saved_after_labels"] == 5


def test_settings_follow_the_score_and_the_caller_has_the_last_word() -> None:
    bands = [
        {"up_to": 0.2, "max_new_tokens": 8},
        {"up_to": 1.0, "max_new_tokens": 99, "temperature": 0.7, "samples": 3},
    ]
    with chat_server() as weak, chat_server() as strong:
        r = two_servers(weak, strong, settings=bands)
        r.ask(EASY)
        assert (weak.bodies[0]["max_tokens"], weak.bodies[0]["temperature"]) == (8, 0.0)
        assert len(r.ask(HARD).texts) == 3
        assert (strong.bodies[0]["max_tokens"], strong.bodies[0]["temperature"]) == (99, 0.7)
        r.ask(HARD, max_new_tokens=5, temperature=0)
        assert strong.bodies[1]["max_tokens"] == 5
        assert strong.bodies[1]["temperature"] == 0 and "n" not in strong.bodies[1]
        r.ask("x", session="s")
        r.ask(HARD, session="s")
        assert weak.bodies[-1]["max_tokens"] == 8, "a session's settings are those of its score"


def test_the_answer_that_most_samples_agree_on_is_given() -> None:
    from pliant.routing.live.decision import most_frequent

    assert most_frequent(("a", " b", "b ", "a", "b")) == " b"
    assert most_frequent(("a", "b")) == "a"


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"max_tokens": 3}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"samples": 2}, "temperature"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInput, match=expected):
        router().ask(EASY, **wrong)


def test_many_threads_ask_at_once() -> None:
    with chat_server() as weak, chat_server() as strong:
        r = two_servers(weak, strong)
        prompts = [f"{i}" * (1 if i % 3 else 40) for i in range(10, 70)]

        def ask(i: int) -> Any:
            return r.ask(prompts[i], session=str(i % 7) if i % 2 else None)

        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(ask, range(len(prompts))))
        assert [reply.text for reply in replies] == prompts
        report = r.report()
        assert report["decisions"] == report["answered"] == 60
        assert sum(m["calls"] for m in report["models"].values()) == 60
        assert len(weak.bodies) + len(strong.bodies) == 60


def test_many_threads_ask_one_local_model() -> None:
    r = router()
    prompts = [f"{a}+{a}" for a in range(10, 34)]
    alone = [r.ask(prompt, max_new_tokens=8).text for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda p: r.ask(p, max_new_tokens=8).text, prompts))
    assert together == alone


# --- drift ----------------------------------------------------------------------------------------


def test_drift_is_warned_of_and_reported() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 2000)
    reference = drift.reference((lengths / 100).tolist(), window=100)
    r = router(drift=reference.model_dump())
    for length in rng.integers(1, 60, 100):
        r.choose("x" * int(length))
    assert [w["drifted"] for w in r.report()["windows"]] == [False]
    with pytest.warns(DriftWarning, match="label prompts of today"):
        for length in rng.integers(30, 90, 100):
            r.choose("x" * int(length))
    assert [w["drifted"] for w in r.report()["windows"]] == [False, True]


# --- folders --------------------------------------------------------------------------------------


def test_a_router_is_saved_and_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    before = router(settings=[{"up_to": 1.0, "max_new_tokens": 24}])
    before.save(folder)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 4_000
    after = opened(Router.load(folder, scorer=Letters.load(folder / "scorer")))
    assert after.file == before.file
    assert [after.choose(p) for p in (EASY, HARD)] == [before.choose(p) for p in (EASY, HARD)]
    assert (folder / "ledger.sqlite").is_file()
    again = opened(Router.load(folder, scorer=Letters()))
    assert again.report()["decisions"] == 2


def test_a_ledger_can_lie_elsewhere_or_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    router().save(folder)
    Router.load(folder, scorer=Letters(), ledger=None).choose(EASY)
    Router.load(folder, scorer=Letters(), ledger=tmp_path / "other.sqlite").choose(EASY)
    assert not (folder / "ledger.sqlite").exists() and (tmp_path / "other.sqlite").exists()


def test_a_scorer_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'length', not 'letters'"):
        Router(make(**content(scorer={"kind": "length"})), Letters())


def test_one_scorer_of_the_ladder_routes(tmp_path: Path) -> None:
    from pliant.routing import Outcomes, scorers

    prompts = tuple("x" * n for n in range(2, 62))
    right = [[float(len(p) < 30), 1.0] for p in prompts]
    cost = [[1.0, 5.0]] * len(prompts)
    fitted = scorers.make("length").fit(
        Outcomes(prompts, ("nano-s", "nano-l"), right, cost), None, 0
    )
    made_of = make(**content(scorer={"kind": "length"}))
    Router(made_of, fitted).save(tmp_path)
    loaded = Router.load(tmp_path)
    assert loaded.choose("x" * 3).model == "nano-s"
    assert loaded.choose("x" * 60).model == "nano-l"
