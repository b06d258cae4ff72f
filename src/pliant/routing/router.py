"""A router: it chooses the model that should answer a prompt, asks it, and records what it cost.

    router = Router.load("my-router")
    router.choose("What is 2 + 2?")             # Decision(model, score, gain, reason)
    router.ask("What is 2 + 2?", session="42")  # Reply(text, decision, cost, saved, ...)
    router.close()                              # or use it as a context manager

A router is a folder: router.json and its scorer's files. Many threads may use one router, and many
processes one ledger.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput, PliantError, did_you_mean
from pliant.routing import router_file
from pliant.routing.backends import Answers, Backend, Settings
from pliant.routing.backends.local import backend_with
from pliant.routing.live.asking import Asking
from pliant.routing.live.decision import Costing, Decision, Reply
from pliant.routing.live.exploring import Explorer, Verify
from pliant.routing.live.ledger import Ledger, Totals
from pliant.routing.live.preference import (
    Breakers,
    Call,
    ContextFit,
    Predict,
    Preference,
    Preferences,
    Session,
    Sessions,
)
from pliant.routing.prompts import Prompt, messages
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Prefilling, Scorer
from pliant.verify import Function

if TYPE_CHECKING:
    from pliant.complexity import Scores

COOLDOWN = 30.0  # seconds for which a model that failed is left alone
_LOCKS = 64
AS_THE_FILE_SAYS: Any = object()


class DriftWarning(UserWarning):
    """The scores of today are unlike those that the router was fitted for."""


class Router:
    """Chooses a model for each prompt and asks it."""

    def __init__(
        self,
        file: RouterFile,
        scorer: Scorer,
        *,
        ledger: Ledger | None = None,
        backends: Mapping[str, Backend] | None = None,
        device: str | None = None,
        cooldown: float = COOLDOWN,
        clock: Callable[[], float] = time.monotonic,
        grader: Verify | None = None,
    ) -> None:
        if scorer.kind != file.scorer.kind:
            raise InvalidInput(
                f"the router needs a scorer of kind {file.scorer.kind!r}, not {scorer.kind!r}"
            )
        self.file, self.scorer = file, scorer
        self.ledger = ledger or Ledger(None, prompts=file.ledger.prompts)
        self._preferences = Preferences(file, scorer)
        self._sessions = Sessions(file.sticky.limit, file.sticky.ttl, clock)
        self._breakers = Breakers(cooldown, clock)
        self._asking = Asking(file, backends or {}, self._breakers, device)
        self._session_locks = [threading.Lock() for _ in range(_LOCKS)]
        self._context_fit = ContextFit(file.models, self._asking.backends)
        self._costing = Costing(file)
        self._explorer = Explorer(file, self._asking, self._costing, self.ledger, grader)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        scorer: Scorer | None = None,
        ledger: str | Path | None = AS_THE_FILE_SAYS,
        **options: Any,
    ) -> Router:
        """A saved router. `ledger` is a path, or None for one in memory.

        Options: device for models that run here, cooldown in seconds, `grader`, a verifier or
        function that grades the answers to explored prompts, and, for those who bring their own,
        scorer, backends by model and clock.
        """
        folder = Path(folder).expanduser()
        if scorer is None:
            file, scorer = router_file.open_router(folder, options.get("device"))
        else:
            file = router_file.read(folder)
        place: str | Path | None = ledger
        if ledger is AS_THE_FILE_SAYS:
            place = None if file.ledger.path is None else folder / file.ledger.path
        return cls(
            file,
            scorer,
            ledger=Ledger(place, prompts=file.ledger.prompts),
            **options,
        )

    def save(self, folder: str | Path) -> Path:
        """Write router.json and the scorer; the ledger is not copied."""
        folder = Path(folder).expanduser()
        self.scorer.save(folder / self.file.scorer.folder)
        return self.file.write(folder)

    def choose(
        self,
        prompt: Prompt,
        session: str | None = None,
        *,
        group: str | None = None,
        share: float | None = None,
    ) -> Decision:
        """Choose a model without asking it; the ledger records its average cost.

        `share` replaces the router's threshold for this call: .3 sends the prompt to the strongest
        model if it is among the 30 % that gain the most by it.
        """
        plan = self._planned(Call(prompt, session, group, share), Settings.max_new_tokens)
        self._record(prompt, session, plan)
        return plan.decision

    def ask(
        self,
        prompt: Prompt,
        session: str | None = None,
        *,
        group: str | None = None,
        share: float | None = None,
        verify: Verify | None = None,
        reference: Any = None,
        **settings: Any,
    ) -> Reply:
        """Choose a model and ask it; if it fails, the next one. `share` as in `choose`.

        `settings` are max_new_tokens, temperature, samples and seed. Those left out come from the
        router's settings by score, then from the defaults of `Settings`.
        `verify` grades the answer for the ledger: a verifier, or a function of the answer (and its
        reference, and the prompt), from 0 to 1.
        """
        _refuse_unknown(settings)
        verifier = None if verify is None else Function(verify)  # refuses what cannot be called
        call = Call(prompt, session, group, share)
        plan, row, answers = self._begin(call, settings)
        try:
            how = self._asking.settings(plan.score, settings)
            if answers is None:
                reply, home = self._answered(prompt, plan, how)
            else:
                home = plan.home
                reply = self._costing.reply(plan.decision, answers, samples=1, continued=True)
        except PliantError as error:
            self.ledger.failed(row, str(error))
            raise
        if session is not None:
            self._remember(session, home, plan.score)
        self.ledger.answered(row, reply)
        reply = replace(reply, row=row)
        texts = {reply.model: reply.text}
        explored = self._explorer.is_due(plan.decision, prompt)
        if explored:
            others = [name for name in plan.fitting if name != reply.model]
            texts |= self._explorer.explore(row, call, reply, others, how)
        if explored or verifier is not None:
            self._explorer.grade(row, prompt, texts, verifier, reference)
        return replace(reply, explored=tuple(name for name in texts if name != reply.model))

    def grade(self, answer: Reply | int, right: float | bool, model: str | None = None) -> None:
        """Record how right an answer was, from 0 to 1: that of a reply, or of a row of the ledger.

        For a prompt that was explored, `model` names another model whose answer it was.
        """
        row = answer.row if isinstance(answer, Reply) else answer
        if row is None:
            raise InvalidInput("the reply is in no ledger: grade the reply that `ask` returned")
        self.ledger.grades.grade(row, right, model)

    def report(self) -> dict[str, Any]:
        """The ledger's totals, the cost of the labels, and what is saved after that."""
        totals: Totals = self.ledger.report()
        labels = self._costing.labels()
        return {
            "unit": self.file.unit,
            **totals.as_dict(),
            "label_cost": labels,
            "saved_after_labels": None if labels is None else totals.saved - labels,
            "threshold": self.file.threshold.sentence,
        }

    def close(self) -> None:
        self._asking.close()
        self.ledger.close()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- choosing --------------------------------------------------------------------------------

    def _planned(self, call: Call, answer_tokens: int, predict: Predict | None = None) -> _Plan:
        """Decide on a prompt; those of one session are decided on one after the other.

        `answer_tokens` is the length that an answer needs; `predict` supplies the predictions
        where they exist already.
        """
        prompt, name = call.prompt, call.session
        messages(prompt)  # refuses what is not a prompt, before anything else
        if name is None or self.file.sticky.policy == "off":
            preference = self._preferences.of(call, None, predict)
            return self._plan(prompt, preference, None, answer_tokens)
        with self._session_locks[hash(name) % _LOCKS]:
            session = self._sessions.get(name)
            preference = self._preferences.of(call, session, predict)
            plan = self._plan(prompt, preference, session, answer_tokens)
            self._remember(name, plan.home, plan.score)
        return plan

    def _plan(
        self, prompt: Prompt, preference: Preference, session: Session | None, answer_tokens: int
    ) -> _Plan:
        """The first model of the preference that fits the prompt and is up."""
        wanted = preference.order[0]
        fitting = self._context_fit.fitting(prompt, preference.order, answer_tokens)
        up = [name for name in fitting if not self._breakers.down(name)]
        chosen = (up or fitting)[0]
        reasons = [preference.reason]
        if wanted not in fitting:
            reasons.append(f"{wanted} does not take this prompt")
        elif chosen != wanted:
            reasons.append(f"{wanted} is down")
        if not up:
            reasons.append("every model is down")
        if chosen != wanted:
            reasons.append(f"{chosen} stands in")
        decision = Decision(
            model=chosen,
            score=preference.score,
            gain=preference.gain,
            reason="; ".join(reasons),
            wanted=wanted,
            novel=preference.novel,
            from_session=preference.from_session,
            probabilities=preference.probabilities,
        )
        score = preference.score
        if score is None and session is not None:
            score = session.score
        return _Plan(decision, fitting, score, wanted if wanted in fitting else chosen)

    # --- asking ----------------------------------------------------------------------------------

    def _begin(self, call: Call, options: Mapping[str, Any]) -> tuple[_Plan, int, Answers | None]:
        """The decision and its row, and the answer if the scorer's prefill continued to one."""
        answer_tokens = options.get("max_new_tokens", Settings.max_new_tokens)
        begun: list[tuple[_Plan, int]] = []

        def begin(predict: Predict | None = None) -> _Plan:
            plan = self._planned(call, answer_tokens, predict)
            begun.append((plan, self._record(call.prompt, call.session, plan)))
            return plan

        answers = self._continued(call.prompt, call.session, options, begin)
        if not begun:
            begin()
        return (*begun[0], answers)

    def _continued(
        self,
        prompt: Prompt,
        name: str | None,
        options: Mapping[str, Any],
        begin: Callable[[Predict], _Plan],
    ) -> Answers | None:
        """The answer of the model that the scorer reads, if that model is chosen."""
        session = None if name is None else self._sessions.get(name)
        offer = getattr(self.scorer, "while_answering", None)
        if offer is None or self._preferences.without_scorer(prompt, session) is not None:
            return None
        prefilling: Prefilling | None = offer(prompt)
        if prefilling is None:
            return None
        shared = backend_with(prefilling.reader.base, self._asking.backends)
        if shared is None:
            return None
        model, backend = shared

        def decide(scores: Scores) -> Settings | None:
            predictions = prefilling.predictions(scores)
            plan = begin(lambda: predictions)
            settings = self._asking.settings(plan.score, options)
            goes_on = plan.decision.model == model and settings.temperature == 0
            return settings if goes_on and self._breakers.enter(model) else None

        longest = options.get("max_new_tokens") or max(
            [Settings.max_new_tokens, *(band.max_new_tokens or 0 for band in self.file.settings)]
        )
        try:
            answers = backend.answer_after_scoring(prefilling.reader, prompt, longest, decide)
        except PliantError:  # asking step by step raises it again, and reports it
            return None
        if answers is not None:
            self._breakers.succeeded(model)
        return answers

    def _answered(self, prompt: Prompt, plan: _Plan, settings: Settings) -> tuple[Reply, str]:
        """The reply of the first model that answers, and the session's model from now on."""
        decision, start = plan.decision, plan.decision.model
        order = [start, *(name for name in plan.fitting if name != start)]
        first = self._asking.first_answer(prompt, order, settings, alone=len(plan.fitting) == 1)
        if first.failures:
            failures = "; ".join(first.failures)
            reason = f"{decision.reason}; {failures}; {first.model} stands in"
            decision = replace(decision, model=first.model, reason=reason)
        home = first.model if plan.home in first.refused else plan.home
        return self._costing.reply(decision, first.answers, settings.samples), home

    # --- the ledger and the sessions -------------------------------------------------------------

    def _record(self, prompt: Prompt, session: str | None, plan: _Plan) -> int:
        cost, saved = self._costing.expected(plan.decision)
        drift = self.file.drift
        row, window = self.ledger.record(prompt, session, plan.decision, cost, saved, drift)
        if window is not None and window.drifted:
            warnings.warn(
                f"the scores have drifted: those of the latest {window.size} prompts are "
                f"{window.distance:.2f} away from those that the router was fitted for (chance "
                f"stays below {window.bound:.2f}): label prompts of today and fit again",
                DriftWarning,
                stacklevel=3,
            )
        return row

    def _remember(self, session: str, model: str, score: float | None) -> None:
        if self.file.sticky.policy != "off":
            self._sessions.put(session, Session(model, score))


@dataclass(frozen=True)
class _Plan:
    decision: Decision
    fitting: list[str]
    score: float | None
    """The prompt's, else the session's: it selects the settings."""
    home: str
    """The session's model: one that is down is returned to, one with too small a context is not."""


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    known = list(Settings.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise InvalidInput(f"no setting {name!r}{did_you_mean(name, known)}")
