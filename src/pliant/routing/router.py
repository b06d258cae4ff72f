"""A router: it says which model should answer a prompt, asks that model, and keeps the books.

    router = Router.load("my-router")
    router.choose("What is 2 + 2?")             # Decision(model, score, gain, reason)
    router.ask("What is 2 + 2?", session="42")  # Reply(text, decision, cost, saved, ...)
    router.close()                              # or use it as a context manager

A router is a folder: router.json and its scorer's files. It may be used from many threads, and its
ledger from many processes.
"""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pliant.data import nearest
from pliant.errors import InvalidInput, PliantError
from pliant.routing import router_file
from pliant.routing.backends.protocol import Answers, Backend, BackendError, Settings
from pliant.routing.live.breaker import Breakers
from pliant.routing.live.context_fit import Rooms
from pliant.routing.live.costing import Costing
from pliant.routing.live.decision import Decision, Reply
from pliant.routing.live.ledger import Ledger, Totals
from pliant.routing.live.preference import Predict, Wish, Wishes
from pliant.routing.live.sessions import Kept, Sessions
from pliant.routing.live.shared_prefill import answer, backend_of
from pliant.routing.open import is_far, open_model, open_scorer
from pliant.routing.prompts import Prompt, messages
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Predictions, Prefilling, Scorer

COOLDOWN = 30.0  # seconds for which a model that failed is left alone
_LOCKS = 64
AS_THE_FILE_SAYS: Any = object()


class DriftWarning(UserWarning):
    """The scores of today are not those that the router was made for."""


class Router:
    """Chooses and asks; see the file's first lines."""

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
    ) -> None:
        if scorer.kind != file.scorer.kind:
            raise InvalidInput(
                f"the router wants a scorer of kind {file.scorer.kind!r}, not {scorer.kind!r}"
            )
        self.file, self.scorer = file, scorer
        self.ledger = ledger or Ledger(None, prompts=file.ledger.prompts)
        self._backends = {
            entry.name: (backends or {}).get(entry.name) or open_model(entry, device)
            for entry in file.models
        }
        # For a prompt that no other model takes: nothing is opened before it is asked.
        self._patient = {
            entry.name: open_model(entry, patient=True)
            for entry in file.models
            if entry.name not in (backends or {}) and is_far(entry)
        }
        self._wishes = Wishes(file, scorer)
        self._sessions = Sessions(file.sticky.limit, file.sticky.ttl, clock)
        self._breakers = Breakers(cooldown, clock)
        self._session_locks = [threading.Lock() for _ in range(_LOCKS)]
        self._rooms = Rooms(file.models, self._backends)
        self._costing = Costing(file)

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

        Options: device for models that run here, cooldown in seconds, and, for those who bring
        their own, scorer, backends by model and clock.
        """
        folder = Path(folder).expanduser()
        file = router_file.read(folder)
        place: str | Path | None = ledger
        if ledger is AS_THE_FILE_SAYS:
            place = None if file.ledger.path is None else folder / file.ledger.path
        return cls(
            file,
            scorer or open_scorer(folder, file, options.get("device")),
            ledger=Ledger(place, prompts=file.ledger.prompts),
            **options,
        )

    def save(self, folder: str | Path) -> Path:
        """Write router.json and the scorer; the ledger stays where it is."""
        folder = Path(folder).expanduser()
        self.scorer.save(folder / self.file.scorer.folder)
        return self.file.write(folder)

    def choose(
        self, prompt: Prompt, session: str | None = None, *, group: str | None = None
    ) -> Decision:
        """Which model should answer; it goes into the ledger with its average cost."""
        plan = self._planned(prompt, session, group, Settings.max_new_tokens)
        self._record(prompt, session, plan)
        return plan.decision

    def ask(
        self,
        prompt: Prompt,
        session: str | None = None,
        *,
        group: str | None = None,
        **settings: Any,
    ) -> Reply:
        """Choose a model and ask it; if it fails, the next one.

        `settings` are max_new_tokens, temperature, samples and seed. What is not among them is as
        the router's settings by score say, and else as in `Settings`.
        """
        _refuse_unknown(settings)
        plan, row, answers = self._begun(prompt, session, group, settings)
        try:
            if answers is None:
                reply, home = self._answered(prompt, plan, settings)
            else:
                home = plan.home
                reply = self._costing.reply(plan.decision, answers, samples=1, continued=True)
        except PliantError as error:
            self.ledger.failed(row, str(error))
            raise
        if session is not None:
            self._keep(session, home, plan.score)
        self.ledger.answered(row, reply)
        return reply

    def report(self) -> dict[str, Any]:
        """The ledger's totals, what the labels cost, and what is saved after that."""
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
        for backend in (*self._backends.values(), *self._patient.values()):
            backend.close()
        self.ledger.close()

    def __enter__(self) -> Router:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- choosing --------------------------------------------------------------------------------

    def _planned(
        self,
        prompt: Prompt,
        session: str | None,
        group: str | None,
        answer: int,
        predict: Predict | None = None,
    ) -> _Plan:
        """A session's prompts are decided on one after the other, others at the same time.

        `answer` is the room that an answer needs, `predict` what has the predictions already.
        """
        messages(prompt)  # what is no prompt is said before anything else
        if session is None or self.file.sticky.policy == "off":
            return self._plan(prompt, self._wishes.of(prompt, None, group, predict), None, answer)
        with self._session_locks[hash(session) % _LOCKS]:
            kept = self._sessions.get(session)
            plan = self._plan(prompt, self._wishes.of(prompt, kept, group, predict), kept, answer)
            self._keep(session, plan.home, plan.score)
        return plan

    def _plan(self, prompt: Prompt, wish: Wish, kept: Kept | None, answer: int) -> _Plan:
        """What is wanted, held against which models are up and take the prompt."""
        fitting = self._rooms.fitting(prompt, wish.order, answer)
        up = [name for name in fitting if not self._breakers.down(name)]
        chosen = (up or fitting)[0]
        reasons = [wish.reason]
        if wish.order[0] not in fitting:
            reasons.append(f"{wish.order[0]} does not take this prompt")
        elif chosen != wish.order[0]:
            reasons.append(f"{wish.order[0]} is down")
        if not up:
            reasons.append("every model is down")
        if chosen != wish.order[0]:
            reasons.append(f"{chosen} stands in")
        decision = Decision(
            model=chosen,
            score=wish.score,
            gain=wish.gain,
            reason="; ".join(reasons),
            wanted=wish.order[0],
            novel=wish.novel,
            from_session=wish.from_session,
        )
        score = wish.score if wish.score is not None or kept is None else kept.score
        home = wish.order[0] if wish.order[0] in fitting else chosen
        return _Plan(decision, fitting, score, home)

    # --- asking ----------------------------------------------------------------------------------

    def _begun(
        self, prompt: Prompt, session: str | None, group: str | None, asked: Mapping[str, Any]
    ) -> tuple[_Plan, int, Answers | None]:
        """The decision and its row; and the answer, if the scorer's own prefill went on to it."""
        room = asked.get("max_new_tokens", Settings.max_new_tokens)
        begun: list[tuple[_Plan, int]] = []

        def begin(predict: Predict | None = None) -> _Plan:
            plan = self._planned(prompt, session, group, room, predict)
            begun.append((plan, self._record(prompt, session, plan)))
            return plan

        answers = self._continued(prompt, session, asked, begin)
        if not begun:
            begin()
        return (*begun[0], answers)

    def _continued(
        self,
        prompt: Prompt,
        session: str | None,
        asked: Mapping[str, Any],
        begin: Callable[[Predict], _Plan],
    ) -> Answers | None:
        """The answer of the model that the scorer reads, if that one is chosen."""
        kept = None if session is None else self._sessions.get(session)
        offer = getattr(self.scorer, "while_answering", None)
        if offer is None or self._wishes.without_scorer(prompt, kept) is not None:
            return None
        prefilling: Prefilling | None = offer(prompt)
        found = None if prefilling is None else backend_of(prefilling, self._backends)
        if prefilling is None or found is None:
            return None
        name, backend = found

        def decide(predictions: Predictions) -> Settings | None:
            plan = begin(lambda: predictions)
            settings = self._settings(plan.score, asked)
            mine = plan.decision.model == name and settings.temperature == 0
            return settings if mine and self._breakers.enter(name) else None

        longest = asked.get("max_new_tokens") or max(
            [Settings.max_new_tokens, *(band.max_new_tokens or 0 for band in self.file.settings)]
        )
        try:
            answers = answer(prefilling, backend, prompt, longest, decide)
        except PliantError:  # what it was is found out, and said, by whoever does it step by step
            return None
        if answers is not None:
            self._breakers.succeeded(name)
        return answers

    def _answered(self, prompt: Prompt, plan: _Plan, asked: Mapping[str, Any]) -> tuple[Reply, str]:
        """From the first model that answers, of those that the prompt fits; and the session's."""
        settings = self._settings(plan.score, asked)
        start = plan.decision.model
        order = [start, *(name for name in plan.fitting if name != start)]
        failures: list[str] = []
        home: str | None = plan.home
        # Those that are down come last: if nobody else answers, they may.
        for last_resort in (False, True):
            for name in list(order):
                if not last_resort and not self._breakers.enter(name):
                    continue
                order.remove(name)
                try:
                    answers = self._ask(name, prompt, settings, alone=len(plan.fitting) == 1)
                except PliantError as error:
                    failures.append(str(error))
                    if name == home and getattr(error, "prompts_fault", False):
                        home = None  # it is well, and would refuse what follows as well
                    continue
                decision = self._after(plan.decision, name, failures)
                return self._costing.reply(decision, answers, settings.samples), home or name
        raise BackendError(f"no model answered: {'; '.join(failures)}", "unreachable")

    def _ask(self, name: str, prompt: Prompt, settings: Settings, alone: bool) -> Answers:
        backend = (self._patient if alone else self._backends).get(name, self._backends[name])
        try:
            ((_, found),) = backend.ask([prompt], settings)
            if not isinstance(found, Answers):
                raise found
        except BackendError as error:
            if error.prompts_fault:  # the model is well
                self._breakers.succeeded(name)
            else:
                self._breakers.failed(name)
            raise
        except PliantError:  # it cannot even be loaded
            self._breakers.failed(name)
            raise
        self._breakers.succeeded(name)
        return found

    def _settings(self, score: float | None, asked: Mapping[str, Any]) -> Settings:
        settings = Settings(seed=secrets.randbelow(2**31))
        band = next((b for b in self.file.settings if score is not None and score <= b.up_to), None)
        if band is not None:
            settings = band.over(settings)
        if asked.get("temperature") == 0 and "samples" not in asked:
            settings = replace(settings, samples=1)
        return replace(settings, **asked)

    def _after(self, decision: Decision, name: str, failures: Sequence[str]) -> Decision:
        if not failures:
            return decision
        reason = f"{decision.reason}; {'; '.join(failures)}; {name} stands in"
        return replace(decision, model=name, reason=reason)

    # --- the books -------------------------------------------------------------------------------

    def _record(self, prompt: Prompt, session: str | None, plan: _Plan) -> int:
        cost, saved = self._costing.expected(plan.decision)
        drift = self.file.drift
        row, window = self.ledger.record(prompt, session, plan.decision, cost, saved, drift)
        if window is not None and window.drifted:
            warnings.warn(
                f"the scores have drifted: those of the latest {window.size} prompts lie "
                f"{window.distance:.2f} from those that the router was made for (chance stays "
                f"below {window.bound:.2f}): label prompts of today and fit again",
                DriftWarning,
                stacklevel=3,
            )
        return row

    def _keep(self, session: str, model: str, score: float | None) -> None:
        if self.file.sticky.policy != "off":
            self._sessions.put(session, Kept(model, score))


@dataclass(frozen=True)
class _Plan:
    decision: Decision
    fitting: list[str]
    score: float | None
    """The prompt's, or else the session's: what settings go by."""
    home: str
    """What a session keeps: a model that is down is gone back to, one that has no room is not."""


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    known = list(Settings.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise InvalidInput(f"no setting {name!r}{nearest(name, known)}")
