"""Which models a prompt should go to, in order of preference, whether or not they are up."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from pliant.errors import PliantError
from pliant.routing.metrics.calibration import from_json
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Predictions, Scorer

Predict = Callable[[], Predictions]


@dataclass(frozen=True)
class Preference:
    """The models in order of preference, and why."""

    order: tuple[str, ...]
    reason: str
    score: float | None = None
    gain: float | None = None
    novel: bool = False
    from_session: bool = False


@dataclass(frozen=True)
class Session:
    """A conversation's model, and how hard its last scored prompt was."""

    model: str
    score: float | None


class Preferences:
    """Computes preferences from a router's file, its scorer and the session."""

    def __init__(self, file: RouterFile, scorer: Scorer) -> None:
        self._file, self._scorer, self._rule = file, scorer, file.rule
        content = (file.calibration or {}).get(file.names[0])
        self._calibration = None if content is None else from_json(content)

    def of(
        self,
        prompt: Prompt,
        session: Session | None,
        group: str | None,
        predict: Predict | None = None,
    ) -> Preference:
        """The session's model, or what the predictions say; `predict` supplies existing ones."""
        groups = None if group is None else [group]
        return self.without_scorer(prompt, session) or self._with_scorer(
            predict or (lambda: self._scorer.predict([prompt], groups)), session
        )

    def without_scorer(self, prompt: Prompt, session: Session | None) -> Preference | None:
        """A preference that needs no predictions, if there is one."""
        if session is not None and self._file.sticky.policy == "stay":
            order, reason = self._substitutes(session.model), f"the session is with {session.model}"
            return Preference(order, reason, from_session=True)
        if not text_of(prompt).strip():
            order = self._file.names if session is None else self._substitutes(session.model)
            return Preference(order, "the prompt is empty", from_session=session is not None)
        return None

    def _with_scorer(self, predict: Predict, session: Session | None) -> Preference:
        """A session moves up to a stronger model, and never down."""
        preference = self._scored(predict)
        if session is None:
            return preference
        names, model = self._file.names, session.model
        if names.index(preference.order[0]) > names.index(model):
            reason = f"{preference.reason}; the session moves up from {model}"
            return replace(preference, reason=reason)
        order = tuple(dict.fromkeys([model, *preference.order]))
        reason = f"the session is with {model}"
        return replace(preference, order=order, reason=reason, from_session=True)

    def _scored(self, predict: Predict) -> Preference:
        default = self._file.default
        try:
            predictions = predict()
        except PliantError as error:
            order = self._substitutes(default)
            return Preference(order, f"not scored ({error}): {default}, the default")
        gain = float(predictions.gain[0, -1])
        score = None if predictions.right is None else self._score(float(predictions.right[0, 0]))
        novel = bool(predictions.novel is not None and predictions.novel[0])
        indices = self._rule.preference(predictions.gain[0], novel)
        order = tuple(self._file.names[j] for j in indices)
        if novel and self._rule.novel_to is not None:
            reason = f"unlike the prompts that the router was fitted on: {default}, the default"
        else:
            reason = self._reason(order[0], gain)
        return Preference(order, reason, score, gain, novel)

    def _score(self, right: float) -> float:
        """1 - P(the cheapest model is right), calibrated where a calibration was fitted."""
        calibration = self._calibration
        return 1 - (right if calibration is None else float(calibration.apply([right])[0]))

    def _reason(self, chosen: str, gain: float) -> str:
        threshold = self._file.threshold
        if threshold.on == "worth":
            return f"{chosen} is worth the most, at {threshold.limit:g} for a unit of cost"
        above = "above" if chosen == self._file.names[-1] else "not above"
        return f"expected gain {gain:+.3f}, {above} {threshold.limit:+.3f}"

    def _substitutes(self, first: str) -> tuple[str, ...]:
        """A model, then the default, then the others, the strongest first."""
        return tuple(dict.fromkeys([first, self._file.default, *reversed(self._file.names)]))


class Sessions:
    """At most `limit` sessions, each for `ttl` seconds after it was last used; thread-safe."""

    def __init__(self, limit: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._ttl, self._clock = limit, ttl, clock
        self._sessions: OrderedDict[str, tuple[float, Session]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Session | None:
        with self._lock:
            self._forget()
            entry = self._sessions.pop(name, None)
            if entry is None:
                return None
            self._sessions[name] = (self._clock(), entry[1])
            return entry[1]

    def put(self, name: str, session: Session) -> None:
        with self._lock:
            self._sessions.pop(name, None)
            self._sessions[name] = (self._clock(), session)
            self._forget()

    def _forget(self) -> None:
        """The session that was unused for the longest time is the first in the dictionary."""
        oldest = self._clock() - self._ttl
        while self._sessions:
            used, _ = next(iter(self._sessions.values()))
            if used > oldest and len(self._sessions) <= self._limit:
                break
            self._sessions.popitem(last=False)
