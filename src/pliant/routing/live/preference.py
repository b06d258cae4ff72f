"""Which models a prompt should go to, in order of preference, and which of them can take it now.

A model can take a prompt that fits its context, unless the model is down.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pliant.errors import InvalidInput, PliantError
from pliant.routing.backends import Backend
from pliant.routing.decision_rule import DecisionRule
from pliant.routing.metrics.calibration import from_json
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.router_file import ModelEntry, RouterFile
from pliant.routing.scorers import Predictions, Scorer
from pliant.routing.units import ONE, same_price
from pliant.stats import Floats

Predict = Callable[[], Predictions]


@dataclass(frozen=True)
class Call:
    """A prompt that is to be routed."""

    prompt: Prompt
    session: str | None = None
    group: str | None = None
    share: float | None = None
    """Of calls to the strongest model, instead of the router's threshold."""


@dataclass(frozen=True)
class Preference:
    """The models in order of preference, and why."""

    order: tuple[str, ...]
    reason: str
    score: float | None = None
    gain: float | None = None
    novel: bool = False
    from_session: bool = False
    probabilities: dict[str, float] | None = None
    gains: tuple[float, ...] | None = None
    """(m,) by which the order was decided; None where something else decided it."""


@dataclass(frozen=True)
class Session:
    """A conversation's model, and how hard its last scored prompt was."""

    model: str
    score: float | None


class Preferences:
    """Computes preferences from a router's file, its scorer and the session."""

    def __init__(self, file: RouterFile, scorer: Scorer) -> None:
        self._file, self._scorer, self._rule = file, scorer, file.rule
        self._is_one_price = file.threshold.on == "worth" and same_price(file.costs)
        fitted = file.calibration or {}
        self._calibrations = {name: from_json(content) for name, content in fitted.items()}

    def of(
        self,
        call: Call,
        session: Session | None,
        predict: Predict | None = None,
    ) -> Preference:
        """The session's model, or what the predictions say; `predict` supplies existing ones."""
        prompt, groups = call.prompt, None if call.group is None else [call.group]
        rule = self._rule
        if call.share is not None:
            if self._is_one_price:
                raise InvalidInput(
                    f"share={call.share:g}: every model of this router costs the same, so fewer "
                    f"calls to {self._file.names[-1]} save nothing: leave the share out, and the "
                    "model that is likeliest to be right answers"
                )
            if self._file.threshold.on == "worth" and self._file.costs[-1] <= min(self._file.costs):
                raise InvalidInput(
                    f"share={call.share:g}: {self._file.names[-1]} is the strongest model and the "
                    "cheapest, so fewer calls to it save nothing: leave the share out"
                )
            rule = replace(rule, value=self._file.value_for(call.share))
        return self.without_scorer(prompt, session) or self._with_scorer(
            predict or (lambda: self._scorer.predict([prompt], groups)), session, rule
        )

    def without_scorer(self, prompt: Prompt, session: Session | None) -> Preference | None:
        """A preference that needs no predictions, if there is one."""
        if session is not None and self._file.sticky.policy == "stay":
            order, reason = self._substitutes(session.model), f"the session is with {session.model}"
            return Preference(order, reason, from_session=True)
        if not text_of(prompt).strip():
            # Of equally expensive models the one that is right most often.
            cheapest = min(reversed(self._file.models), key=lambda entry: entry.cost).name
            order = self._substitutes(cheapest if session is None else session.model)
            return Preference(order, "the prompt is empty", from_session=session is not None)
        return None

    def _with_scorer(
        self, predict: Predict, session: Session | None, rule: DecisionRule
    ) -> Preference:
        """A session moves to a model that is likelier right, and to none because it costs less."""
        preference = self._scored(predict, rule)
        if session is None:
            return preference
        model = session.model
        if self._is_upgrade(preference, model, rule):
            reason = f"{preference.reason}; the session moves from {model}"
            return replace(preference, reason=reason)
        order = tuple(dict.fromkeys([model, *preference.order]))
        reason = f"the session is with {model}"
        return replace(preference, order=order, reason=reason, from_session=True)

    def _is_upgrade(self, preference: Preference, current: str, rule: DecisionRule) -> bool:
        """By the gains on this prompt; where they did not decide, by the order of strength."""
        chosen, now = (self._file.names.index(name) for name in (preference.order[0], current))
        if preference.gains is None:
            return chosen > now
        return rule.is_upgrade(preference.gains, chosen, now)

    def _scored(self, predict: Predict, rule: DecisionRule) -> Preference:
        default = self._file.default
        try:
            predictions = predict()
        except PliantError as error:
            order = self._substitutes(default)
            return Preference(order, f"not scored ({error}): {default}, the default")
        gain = float(predictions.gain[0, -1])
        likely = None if predictions.right is None else self._probabilities(predictions.right[0])
        score = None if likely is None else 1 - likely[self._file.names[0]]
        novel = bool(predictions.novel is not None and predictions.novel[0])
        indices = rule.preference(predictions.gain[0], novel)
        order = tuple(self._file.names[j] for j in indices)
        gains: tuple[float, ...] | None = None
        if novel and rule.novel_to is not None:
            reason = f"unlike the prompts that the router was fitted on: {default}, the default"
        else:
            gains = tuple(predictions.gain[0].tolist())
            reason = self._reason(order[0], gain, rule.value)
        return Preference(order, reason, score, gain, novel, probabilities=likely, gains=gains)

    def _probabilities(self, right: Floats) -> dict[str, float]:
        """P(right) of each model, calibrated where a calibration was fitted."""
        likely = dict(zip(self._file.names, right.tolist(), strict=True))
        for name, calibration in self._calibrations.items():
            likely[name] = float(calibration.apply([likely[name]])[0])
        return likely

    def _reason(self, chosen: str, gain: float, value: float) -> str:
        if self._is_one_price:
            return f"{chosen} is the likeliest to be right, and every model costs the same"
        if self._file.threshold.on == "worth":
            price = f"{value:g} per {ONE[self._file.unit]}"
            return f"{chosen} has the highest gain less {price} of its cost"
        above = "above" if chosen == self._file.names[-1] else "not above"
        places = 3 if f"{gain:+.3f}" != f"{value:+.3f}" else 6
        return f"expected gain {gain:+.{places}f}, {above} {value:+.{places}f}"

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


class ContextFit:
    """Compares prompts with the contexts of a router's models, each of which is looked up once."""

    def __init__(self, entries: Sequence[ModelEntry], backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._contexts: dict[str, int | None] = {
            entry.name: entry.context for entry in entries if entry.context is not None
        }

    def fitting(self, prompt: Prompt, order: Sequence[str], answer_tokens: int) -> list[str]:
        """The models whose context fits the prompt and an answer, in this order.

        A long answer does not rule a model out: a quarter of its context is enough for one.
        """
        fitting, refusals = [], []
        for name in order:
            try:
                context = self._context(name)
                if context is None:
                    fitting.append(name)
                    continue
                size = self._backends[name].count(prompt) + min(answer_tokens, context // 4)
            except InvalidInput as error:  # its chat template refuses the messages, say
                refusals.append(str(error))
                continue
            except PliantError:  # it cannot be loaded: asking it will raise the same error
                fitting.append(name)
                continue
            if size <= context:
                fitting.append(name)
            else:
                refusals.append(f"about {size:,} tokens with an answer, and {name} has {context:,}")
        if not fitting:
            raise InvalidInput(f"no model takes this prompt: {'; '.join(refusals)}")
        return fitting

    def _context(self, name: str) -> int | None:
        if name not in self._contexts:
            self._contexts[name] = self._backends[name].context()
        return self._contexts[name]


class Breakers:
    """After a failure a model is down for `cooldown` seconds; the next call after that is a trial.

    During a trial other calls avoid the model: if the trial succeeds the model is up again, if it
    fails the model is down for another cool-down. A trial that never ends counts as failed after
    one more cool-down.
    """

    def __init__(self, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cooldown, self._clock = cooldown, clock
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def down(self, model: str) -> bool:
        """Whether to avoid a model now; changes nothing."""
        with self._lock:
            return self._clock() < self._until.get(model, 0.0)

    def enter(self, model: str) -> bool:
        """Whether a call may begin now; one call may when a model's cool-down is over."""
        with self._lock:
            if model not in self._until:
                return True
            if self._clock() < self._until[model]:
                return False
            self._until[model] = self._clock() + self._cooldown
            return True

    def failed(self, model: str) -> None:
        with self._lock:
            self._until[model] = self._clock() + self._cooldown

    def succeeded(self, model: str) -> None:
        with self._lock:
            self._until.pop(model, None)
