"""router.json: everything about a router but its scorer's weights, in one strict file.

It names the folder beside it that its fit wrote, with the scorer and what the scorer was fitted on.
So a router changes at the moment at which router.json is replaced, and at no other.

Unknown keys are errors that name the nearest valid one. The file holds no secrets: an API key is
named by the environment variable that holds it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from pliant import __version__
from pliant.errors import CorruptFile, InvalidInput, did_you_mean
from pliant.files import write_file
from pliant.routing.backends import (
    Backend,
    ModelSpec,
    PromptFormat,
    Retry,
    check_names,
    open_backend,
)
from pliant.routing.decision_rule import DecisionRule
from pliant.routing.live_settings import Drift, Explore, LedgerEntry, SettingsBand, Sticky
from pliant.routing.metrics.calibration import from_json
from pliant.routing.strict import Amount, Count, Finite, Part, fault

if TYPE_CHECKING:
    from pliant.routing.scorers import Scorer

VERSION = 1
NAME = "router.json"
STEPS = 20
"""Of the shares of calls whose thresholds a file holds."""
AT_ONCE = 64  # calls of one URL at a time


class PromptFormatEntry(Part):
    """How a model's prompts were put to it for the labels, as it was said then."""

    template: str | None = None
    system: str | None = None
    stop: list[str] = []


class ModelEntry(Part):
    """A model that may be chosen."""

    name: Annotated[str, Field(min_length=1)]
    """Its name in the labels."""
    backend: str
    """nano-s, a folder, a hub name, or openai:MODEL@URL."""
    cost: Amount
    """The mean cost of a call in the labels, in the router's unit."""
    context: Count | None = None
    """How many tokens prompt and answer may have together; by default from the model's config."""
    price: tuple[Amount, Amount] | None = None
    """Dollars per million tokens of prompt and of answer."""
    key_env: str | None = None
    """The environment variable with the API key of a URL."""
    tries: Count | None = None
    """Calls of a URL for one prompt; by default 1, or 6 if no other model takes the prompt."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds for a call of a URL; by default 120, of which 5 to connect."""
    prompt_format: PromptFormatEntry | None = None
    """By default each prompt is a chat, or its bare text if the model has no chat template."""

    @property
    def is_remote(self) -> bool:
        """Whether the model is behind a URL."""
        return ModelSpec.parse(self.backend).url is not None

    def open(self, device: str | None = None, *, patient: bool = False) -> Backend:
        """The model's backend.

        A call of a URL is tried once unless the entry says otherwise, because another model can
        stand in. A `patient` one, for prompts that no other model takes, is tried as often as in
        labelling.
        """
        spec = ModelSpec.parse(self.backend)
        options: dict[str, Any] = {"device": device}
        if spec.url is not None:
            tries = self.tries or (None if patient else 1)
            options = {
                "context_tokens": self.context,
                "concurrency": AT_ONCE,
                "key_env": self.key_env,
                "timeout": self.timeout,
                "retry": None if tries is None else Retry(tries=tries),
            }
            options = {name: value for name, value in options.items() if value is not None}
        if (own := self.prompt_format) is not None:
            options["prompt_format"] = PromptFormat(own.template, own.system, tuple(own.stop))
        return open_backend(ModelSpec(self.name, spec.model, spec.url), **options)


class ScorerEntry(Part):
    """The scorer that predicts how hard a prompt is."""

    kind: str
    folder: str = "scorer"
    """Beside router.json, or in the folder of the fit: fit-1a2b3c4d/scorer."""
    cost: Amount = 0.0
    """Of scoring one prompt, in the router's unit, where it was measured."""
    ms: Amount | None = None
    """The time that it takes, on the machine of the fit."""
    continued_by: str | None = None
    """The model whose answers continue from the scorer's prefill, and so pay nothing for it."""


def _as_text(value: Any) -> Any:
    infinite = isinstance(value, float) and math.isinf(value)
    return str(value) if infinite else value


Value = Annotated[Finite | Literal["inf", "-inf"], BeforeValidator(_as_text)]
"""Of a threshold. JSON has no infinity, so it is a text: "inf" sends every prompt to the first
model, or by worth to the cheapest."""


class ThresholdEntry(Part):
    """Which predicted gain is worth the more expensive model."""

    on: Literal["gain", "worth"] = "gain"
    """gain: the last of two models answers if gain > value. worth: the model with the highest
    gain - value * cost answers, of two or more."""
    value: Value
    sentence: str
    """What it promises, and on which split it was chosen."""

    @property
    def limit(self) -> float:
        """The value as a number."""
        return float(self.value)


class RouterFile(Part):
    """The content of router.json."""

    version: Literal[1] = 1
    pliant: str = __version__
    """The version of Pliant that wrote it."""
    unit: Literal["tokens", "usd", "ms", "flops", "calls"]
    """Of every cost in this file."""
    models: Annotated[list[ModelEntry], Field(min_length=2)]
    """In the order of the scorer's columns: the strongest last."""
    scorer: ScorerEntry
    calibration: dict[str, dict[str, Any]] | None = None
    """By model: from the scorer's P(right) to a probability (`metrics.calibration`)."""
    threshold: ThresholdEntry
    default: str
    """The safe model: it answers novel prompts, unlike those that the router was fitted on."""
    novel: Annotated[
        Literal["default", "ignore"], Field(validation_alias=AliasChoices("novel", "far"))
    ] = "default"
    """default: novel prompts go to the default; ignore: they are routed as all others."""
    sticky: Sticky = Sticky()
    drift: Drift | None = None
    shares: list[Value] = []
    """The threshold that sends 0, 5, 10, ... 100 % of calls to the strongest model, for calls that
    state a share of their own."""
    settings: list[SettingsBand] = []
    """How to answer, by score; empty: always by the caller's settings."""
    ledger: LedgerEntry = LedgerEntry()
    explore: Explore = Explore()
    label_cost: dict[str, dict[str, float]] = {}
    """What the labels cost, by model and for the judge: calls, tokens, ms, flops, usd."""

    @model_validator(mode="after")
    def _fits(self) -> RouterFile:
        names = [model.name for model in self.models]
        specs = [ModelSpec.parse(model.backend) for model in self.models]
        check_names([ModelSpec(n, s.model, s.url) for n, s in zip(names, specs, strict=True)])
        if self.default not in names:
            raise ValueError(
                f"default: no model {self.default!r}{did_you_mean(self.default, names)}"
            )
        for name, content in (self.calibration or {}).items():
            if name not in names:
                raise ValueError(f"calibration: no model {name!r}{did_you_mean(name, names)}")
            try:
                from_json(content)
            except InvalidInput as error:
                raise ValueError(f"calibration of {name}: {error}") from None
        if self.threshold.on == "gain" and len(names) != 2:
            raise ValueError(f'threshold on "gain" is for two models, not {len(names)}: "worth"')
        ends = [band.up_to for band in self.settings]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ValueError(f"settings: up_to must ascend to 1, and is {ends}")
        if len(self.shares) not in (0, STEPS + 1):
            raise ValueError(f"shares: {len(self.shares)} thresholds; 0 to 100 % has {STEPS + 1}")
        if self.explore.share and not self.ledger.prompts:
            raise ValueError(
                "explore: nothing can be learned from prompts that are not stored: set prompts to "
                "true under ledger, or the share to 0"
            )
        folder = Path(self.scorer.folder)
        if folder.is_absolute() or ".." in folder.parts:
            raise ValueError(f"scorer: {self.scorer.folder!r} must be a folder beside {NAME}")
        return self

    def check_unit(self, unit: str) -> None:
        if unit != self.unit:
            raise InvalidInput(f"the labels' costs are in {unit}, the router's in {self.unit}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    @property
    def costs(self) -> tuple[float, ...]:
        """Of a call of each model, on the average of the labels."""
        return tuple(model.cost for model in self.models)

    @property
    def scoring(self) -> tuple[float, ...]:
        """The cost of scoring a prompt, by the model that answers it."""
        entry = self.scorer
        return tuple(0.0 if name == entry.continued_by else entry.cost for name in self.names)

    @property
    def novel_to(self) -> int | None:
        """The index of the model that answers novel prompts; None: routed as all others."""
        return self.names.index(self.default) if self.novel == "default" else None

    @property
    def rule(self) -> DecisionRule:
        """Which model answers a prompt."""
        prices = self.costs if self.threshold.on == "worth" else None
        return DecisionRule(self.threshold.limit, len(self.models), prices, self.novel_to)

    def value_for(self, share: float) -> float:
        """The threshold for this share of calls to the strongest model; between two that were
        computed, in proportion."""
        if not 0 <= share <= 1:
            raise InvalidInput(f"share={share}: a share of calls lies between 0 and 1")
        if not self.shares:
            raise InvalidInput(
                "share: this router has no thresholds by share: fit it, or calibrate it, again"
            )
        at, between = divmod(round(share * STEPS, 9), 1)
        below = float(self.shares[int(at)])
        above = float(self.shares[min(int(at) + 1, STEPS)])
        if between == 0 or not (math.isfinite(below) and math.isfinite(above)):
            return below
        return below + between * (above - below)

    def fit_folder(self, folder: Path) -> Path:
        """The folder of what the fit wrote, for the folder of this file."""
        return (folder / self.scorer.folder).parent

    def open_scorer(self, folder: Path, device: str | None = None) -> Scorer:
        """The scorer beside this file; one that reads a model reads it on the given device."""
        from pliant.routing import scorers  # which need torch; a ledger does not

        place = folder / self.scorer.folder
        kind = scorers.read_index(place)["kind"]
        if kind != self.scorer.kind:
            raise InvalidInput(
                f"{place}: holds a scorer of kind {kind!r}, and router.json says "
                f"{self.scorer.kind!r}: fit the router again, or put back the scorer that belongs "
                "to it"
            )
        return scorers.load(place, device)

    def write(self, folder: Path) -> Path:
        """Write router.json, in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        content = self.model_dump(mode="json", exclude_defaults=False)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_file(folder / NAME, text.encode())
        return folder / NAME


def make(**content: Any) -> RouterFile:
    """A RouterFile from code; errors are InvalidInput, as for a file."""
    try:
        return RouterFile.model_validate(content, strict=False)
    except ValidationError as error:
        raise InvalidInput(f"router: {fault(error, RouterFile)}") from None


def read(folder: Path) -> RouterFile:
    """Read and validate the router.json of a folder."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InvalidInput(f"{folder}: holds no {NAME}, so it is no router") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not JSON ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise CorruptFile(f"{path}: has no version, so Pliant did not write it")
    if version > VERSION:
        raise CorruptFile(
            f"{path}: of version {version}; this Pliant reads {VERSION}: pip install -U pliant"
        )
    try:
        return RouterFile.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise InvalidInput(f"{path}: {fault(error, RouterFile)}") from None


def open_router(folder: Path, device: str | None = None) -> tuple[RouterFile, Scorer]:
    """The router.json of a folder and its scorer; both anew if another process has just replaced
    them."""
    file = read(folder)
    while True:
        try:
            return file, file.open_scorer(folder, device)
        except CorruptFile:
            now = read(folder)
            if now == file:
                raise
            file = now
