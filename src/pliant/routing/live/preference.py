"""Which models a prompt should go to, in which order, before anybody asks which of them are up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pliant.errors import PliantError
from pliant.routing.live.sessions import Kept
from pliant.routing.metrics.calibration import from_json
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Predictions, Scorer

Predict = Callable[[], Predictions]


@dataclass(frozen=True)
class Wish:
    """The models in the order in which they are wanted, and why."""

    order: tuple[str, ...]
    reason: str
    score: float | None = None
    gain: float | None = None
    novel: bool = False
    from_session: bool = False


class Wishes:
    """What a router's file and its scorer say of a prompt."""

    def __init__(self, file: RouterFile, scorer: Scorer) -> None:
        self._file, self._scorer = file, scorer
        self._calibrations = {
            name: from_json(content) for name, content in (file.calibration or {}).items()
        }

    def of(
        self,
        prompt: Prompt,
        kept: Kept | None,
        group: str | None,
        predict: Predict | None = None,
    ) -> Wish:
        """The session's model, or what the prompt's predictions say; `predict` may have them."""
        groups = None if group is None else [group]
        return self.without_scorer(prompt, kept) or self.by(
            predict or (lambda: self._scorer.predict([prompt], groups)), kept
        )

    def without_scorer(self, prompt: Prompt, kept: Kept | None) -> Wish | None:
        """What is clear before anything is computed."""
        if kept is not None and self._file.sticky.policy == "stay":
            return Wish(
                self._safely(kept.model), f"the session is with {kept.model}", from_session=True
            )
        if not text_of(prompt).strip():
            order = self._file.names if kept is None else self._safely(kept.model)
            return Wish(order, "the prompt is empty", from_session=kept is not None)
        return None

    def by(self, predict: Predict, kept: Kept | None) -> Wish:
        """What the predictions say, and what they leave of the session's model."""
        wish = self._scored(predict)
        if kept is None:
            return wish
        names = self._file.names
        if names.index(wish.order[0]) > names.index(kept.model):
            return replace(wish, reason=f"{wish.reason}; the session moves up from {kept.model}")
        order = (kept.model, *(name for name in wish.order if name != kept.model))
        return replace(
            wish, order=order, reason=f"the session is with {kept.model}", from_session=True
        )

    def _scored(self, predict: Predict) -> Wish:
        default = self._file.default
        try:
            found = predict()
        except PliantError as error:
            return Wish(self._safely(default), f"not scored ({error}): {default}, the default")
        gain = float(found.gain[0, -1])
        score = None if found.right is None else self._score(float(found.right[0, 0]))
        novel, rule = bool(found.novel is not None and found.novel[0]), self._file.rule
        order = tuple(self._file.names[j] for j in rule.preference(found.gain[0], novel))
        if novel and rule.novel_to is not None:
            reason = f"unlike the prompts that the router was made on: {default}, the default"
        else:
            reason = self._reason(order[0], gain)
        return Wish(order, reason, score, gain, novel)

    def _score(self, right: float) -> float:
        """1 - P(the cheapest model is right), calibrated where that was fitted."""
        calibration = self._calibrations.get(self._file.names[0])
        return 1 - (right if calibration is None else float(calibration.apply([right])[0]))

    def _reason(self, chosen: str, gain: float) -> str:
        threshold = self._file.threshold
        if threshold.on == "worth":
            return f"{chosen} is worth the most, at {threshold.limit:g} for a unit of cost"
        above = "above" if chosen == self._file.names[-1] else "not above"
        return f"expected gain {gain:+.3f}, {above} {threshold.limit:+.3f}"

    def _safely(self, first: str) -> tuple[str, ...]:
        """A model, then the default, then the others, the strongest first."""
        return tuple(dict.fromkeys([first, self._file.default, *reversed(self._file.names)]))
