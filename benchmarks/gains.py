"""The README's headline, table and picture of measured gains, drawn from the files in `results/`.

    python -m benchmarks.gains        # prints both, writes docs/images/gains.svg

Nothing is measured here. Each row names its benchmark, its control and where the gain ends, and
`tests/test_gains.py` compares the README with what this module makes of the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from pliant.reports.palette import Role, colour

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PICTURE = ROOT / "docs" / "images" / "gains.svg"
ROLES: tuple[Role, ...] = ("ours", "control", "bound", "rival")
OURS, CONTROL, BOUND, TEXT = map(colour, ROLES)
SPLIT = "unseen wording"
STEPS = "vocabulary 8192, 8 x 256 tokens"


@dataclass(frozen=True)
class Gain:
    """One row of the table."""

    claim: str
    figure: str
    control: str
    benchmark: str

    def __str__(self) -> str:
        command = f"`python -m benchmarks.{self.benchmark}`"
        return f"| {self.claim} | {self.figure} | {self.control} | {command} |"


def figures(benchmark: str) -> Any:
    return json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))["figures"]


def table() -> str:
    """The gains as Markdown."""
    head = [
        "| what you get | measured | the control, in the same run | command |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *map(str, gains())]) + "\n"


def gains() -> Iterator[Gain]:
    yield from _routing()
    yield from _scorer()
    yield from _gradients()
    yield from _experts()
    yield from _real_model()


def headline() -> str:
    """The figure at the top of the README: the router of the picture, beside its controls."""
    measured = figures("quality_cost")
    text, ours = measured["text"], measured
    small, large = measured["right"].values()
    cheap = measured["lines"]["random"][0][0]
    chance = small + (text["cost"] - cheap) / (1 - cheap) * (large - small)
    behind = {name: -100 * measured[AHEAD][name] for name in ("value", "low", "high")}
    points = f"{behind['value']:.1f} [{behind['high']:.1f}, {behind['low']:.1f}] points"
    return (
        f'**Measured:** asked for "{measured["goal"]}", a router between the two tiny models '
        f"that come with the package keeps {_share(text)} of it at {text['cost']:.0%} of the cost, "
        f"where chance keeps {chance / large:.0%}. It reads the text alone. One that reads each "
        f"prompt with the small model keeps {_share(ours)} at {ours['cost']:.0%}, scoring "
        f"included: at equal cost it is right {points} less often (`python -m "
        "benchmarks.quality_cost`)."
    )


AHEAD = "ahead_of_text_at_equal_cost"


def _share(routed: Mapping[str, Any]) -> str:
    share = routed["of_large"]
    return f"{share['value']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def _experts() -> Iterator[Gain]:
    own = figures("expert_speed")
    switch, rows, step = own["switch"], own["rows"], own["step"]
    yield Gain(
        "Switching to another expert (GPT-2's geometry)",
        f"{switch['expert, ms']:.1f} ms, {switch['an expert, MB']:.2f} MB an expert",
        f"rebuilding the weights from U, S and V {switch['rebuild / expert']:,.0f}x the time, "
        f"merging a LoRA {switch['merged LoRA / expert']:,.0f}x",
        "expert_speed",
    )
    yield Gain(
        "Decoding a batch of eight, each row with its own expert",
        f"of rank 64 {rows['eight experts of rank 64']['median']:.2f}x the base's time, of full "
        f"rank {rows['eight experts']['median']:.2f}x",
        f"eight LoRAs of rank 16 {rows['eight LoRAs of rank 16']['median']:.2f}x",
        "expert_speed",
    )
    ways = [(shape, step[shape]) for shape in ("4:1", "square")]
    quarter, full, lora, rebuilt = (
        " and ".join(f"{each[way]['median']:.2f}x" for _, each in ways)
        for way in (
            "folded, a quarter of the rank",
            "folded",
            "LoRA of rank 16",
            "rebuilt from U S V",
        )
    )
    yield Gain(
        "A training step of an expert's projection (4:1, square)",
        f"a quarter of the rank {quarter} the frozen projection's time, full rank {full}",
        f"LoRA of rank 16 {lora}; rebuilt from U, S and V {rebuilt}",
        "expert_speed",
    )

    yield from _learned("expert_domains", "plus", '"58 plus 28", words that nano-l never saw', "")
    yield _mixed(figures("expert_domains")["unseen"])


def _learned(benchmark: str, family: str, what: str, model: str) -> Iterator[Gain]:
    ways = figures(benchmark)["trained"][family]
    examples = ways.get("base, examples in the prompt")
    shots = f"; three examples in the prompt {examples['right']:.2f}" if examples else ""
    yield Gain(
        f"{model}An expert trained by reward alone ({what})",
        f"{_seeds(ways, 'expert, seed')}; the base {ways['base']['right']:.2f}",
        f"LoRA of rank 16, the same answers: {_seeds(ways, 'lora')}{shots}",
        benchmark.removesuffix(f"_{REAL}") + " --work FOLDER" + (" --others ROWS" if model else ""),
    )


def _seeds(ways: dict[str, Any], name: str) -> str:
    """What the seeds of a way have in common: right, elsewhere, and how many parameters."""
    runs = [own for way, own in ways.items() if way.startswith(name)]
    right = _ends([own["right"] for own in runs], ".2f")
    elsewhere = _ends([100 * own["elsewhere"]["gain"][0] for own in runs], "+.1f")
    return f"{right} right, {elsewhere} points elsewhere, {runs[0]['numbers']:,} parameters"


def _ends(values: Sequence[float], form: str) -> str:
    ends = list(dict.fromkeys(format(end(values), form) for end in (min, max)))
    return " to ".join(ends)


def _mixed(unseen: dict[str, Any]) -> Gain:
    def right(way: str) -> str:
        return _ends([seed["greatest"][way]["right"] for seed in unseen.values()], ".2f")

    return Gain(
        'A mixture of four experts from ten examples ("greatest: 12 57", which none has seen)',
        f"{right('few-shot mixture')} right; the base {right('base')}",
        f"the best expert alone {right('biggest')}, their average {right('average')}, picked by "
        f"prompt {right('by prompt')}, by classifier {right('by classifier')}",
        "expert_domains --work FOLDER",
    )


REAL = "smollm2-135m"


def _real_model() -> Iterator[Gain]:
    """The same on SmolLM2, with real text and real labels, as far as it has been measured."""
    rows = {
        f"score_generate_{REAL}": _scored_while_answering,
        f"cpx_training_{REAL}": _trained_on_prefixes,
        f"gradient_step_{REAL}": _real_step,
        "routing_real": _real_routing,
        f"expert_facts_{REAL}": _real_facts,
        f"structure_prune_{REAL}": _real_pruning,
        f"structure_prune_layers_{REAL}": _real_layers,
    }
    for benchmark, row in rows.items():
        if (RESULTS / f"{benchmark}.json").is_file():
            yield from row(benchmark, f"{REAL}: ", f" --model {REAL}")


def _real_facts(benchmark: str, model: str, option: str) -> Iterator[Gain]:
    yield from _learned(benchmark, "city", '"Where does Oscar live?" after three sentences', model)


def _real_step(benchmark: str, model: str, option: str) -> Iterator[Gain]:
    settings, fewer = list(figures(benchmark).values()), "a quarter of the sequences"
    yield Gain(
        f"{model}A training step on a quarter of the tokens (4 x 512, 2 x 1,024)",
        f"{_range(settings, 'sparse .25', 'speed')}, {_range(settings, 'sparse .25', 'memory')}",
        f"training every token 1x; {fewer} {_range(settings, fewer, 'speed')}, "
        f"{_range(settings, fewer, 'memory')}; cggr's CGGRModel "
        f"{_range(settings, 'CGGRModel', 'speed')}, {_range(settings, 'CGGRModel', 'memory')}",
        f"gradient_step{option}",
    )


def _real_routing(benchmark: str, model: str, option: str) -> Iterator[Gain]:
    """Where text is as good, the row says so."""
    routing = figures(benchmark)
    for name in (name for name in ("gsm8k", "mmlu") if name in routing):
        above = routing[name]["more than the best text scorer"]
        text, band = above["control"], above["cpx, best layer"]
        verdict = "better than text" if band["low"] > 0 else "**no better than text**"
        yield Gain(
            f"{model}Routing {name.upper()} between Mixtral-8x7B and GPT-4 (APGR)",
            f"{_apgr(routing, name, 'cpx, best layer'):.2f}, {verdict} ({_signed(band)})",
            f"best text scorer {_apgr(routing, name, text):.2f}, "
            f"MiniLM {_apgr(routing, name, 'minilm ridge'):.2f}, "
            f"last-token probe {_apgr(routing, name, 'probe'):.2f}, "
            f"length {_apgr(routing, name, 'length'):.2f}",
            f"{benchmark} --data FOLDER",
        )


def _real_pruning(benchmark: str, model: str, option: str) -> Iterator[Gain]:
    yield from _pruning(benchmark, model, option, "the MLP's channels", "activation times weight")


def _real_layers(benchmark: str, model: str, option: str) -> Iterator[Gain]:
    option = f" --part layers{option}"
    yield from _pruning(benchmark, model, option, "the layers", "Block Influence")


def _pruning(benchmark: str, model: str, option: str, what: str, activation: str) -> Iterator[Gain]:
    for share, ways in figures(benchmark)["shares"].items():
        ratio = {way: _text_ratios(result) for way, result in ways.items()}
        others = ratio.get("torch-pruning, taylor")
        yield Gain(
            f"{model}Perplexity after removing {float(share):.0%} of {what}, untrained "
            "(GSM8K, WikiText-2)",
            f"{ratio['error, compensated']} of the whole model's",
            f"{activation} {ratio['activation']}, with our new weights "
            f"{ratio['activation, compensated']}; "
            + (f"Torch-Pruning (Taylor) {others}; " if others else "")
            + f"random ones {ratio['random']}",
            f"structure_prune --data FOLDER{option}",
        )


def _text_ratios(result: Mapping[str, Any]) -> str:
    return " and ".join(
        f"{value:.2f}x" if value < 100 else f"{value:,.0f}x" for value in result["ratio"].values()
    )


def _apgr(routing: Any, name: str, kind: str) -> float:
    return float(routing[name]["scorers"][kind]["apgr"])


def _signed(band: Mapping[str, float]) -> str:
    return f"{band['value']:+.3f} [{band['low']:+.3f}, {band['high']:+.3f}]"


def _routing() -> Iterator[Gain]:
    routing = figures("routing_nano")
    apgr = routing[SPLIT]["apgr"]
    yield Gain(
        "Routing: share of the large model's advantage that the router recovers (APGR)",
        _interval(apgr["cpx"]),
        ", ".join(
            f"{name} {apgr[kind]['value']:.2f}" for name, kind in ROUTERS.items() if kind != "cpx"
        )
        + f", perfect routing {routing[SPLIT]['oracle']:.2f}",
        "routing_nano",
    )
    proved = routing["threshold"]["proved"][SPLIT]
    yield Gain(
        'Routing to a goal, "95 % of the large model\'s quality, with 95 % confidence"',
        f"{proved['of strong']['value']:.1%} of its quality, {proved['share']:.0%} of the calls",
        "the large model on every prompt",
        "routing_nano",
    )


def _scorer() -> Iterator[Gain]:
    yield from _scored_while_answering("score_generate")
    yield from _trained_on_prefixes("cpx_training")


def _scored_while_answering(benchmark: str, model: str = "", option: str = "") -> Iterator[Gain]:
    generate = figures(benchmark)["one row"]
    ratio = generate["ratio"]
    assert generate["tokens identical"]
    yield Gain(
        f"{model}Scoring a prompt while the model answers it (1,000 tokens in, 64 out)",
        f"{ratio['score + generate']['median']:.2f}x the time, the same tokens",
        f"generating alone 1.00x, scoring first {ratio['score, then generate']['median']:.2f}x",
        f"score_generate{option}",
    )


def _trained_on_prefixes(benchmark: str, model: str = "", option: str = "") -> Iterator[Gain]:
    training = figures(benchmark)
    epoch = [training[length]["epoch_times_as_fast"]["median"] for length in ("256", "1024")]
    twenty = [training[length]["twenty_epochs_times_as_fast"] for length in ("256", "1024")]
    yield Gain(
        f"{model}Training a scorer on prompts of 256 and 1,024 tokens",
        f"an epoch {_times(epoch)} as fast; twenty epochs, prefill included, {_times(twenty)}",
        "the loop of the method's reference code",
        f"cpx_training{option}",
    )


def _gradients() -> Iterator[Gain]:
    step = figures("gradient_step")
    settings = [rows for name, rows in step.items() if name.startswith("vocabulary")]
    yield Gain(
        "A training step on a quarter of the tokens (four settings)",
        f"{_range(settings, 'sparse .25', 'speed')}, {_range(settings, 'sparse .25', 'memory')}",
        f"training every token 1x; cggr's CGGRModel {_range(settings, 'CGGRModel', 'speed')}, "
        f"{_range(settings, 'CGGRModel', 'memory')}",
        "gradient_step",
    )
    records, text = (figures(f"gradient_race_{name}")["ways"] for name in ("records", "continued"))
    yield Gain(
        "Time to standard training's final loss with that step",
        f"records of a fixed schema {_interval(records[DEFAULT][AS_FAST])}x as fast; **plain text "
        f"{_interval(text[DEFAULT][AS_FAST])}x: it does not pay there**",
        "standard training 1x; a smaller batch of equal cost "
        f"{_smaller_batch(records):.2f}x and {_smaller_batch(text):.2f}x",
        "gradient_race",
    )


DEFAULT = "sampled .25, sparse"
AS_FAST = "times as fast as standard"


def _smaller_batch(ways: Mapping[str, Any]) -> float:
    name = next(name for name in ways if name.startswith("random sequences"))
    return float(ways[name][AS_FAST]["value"])


def _interval(band: Mapping[str, float]) -> str:
    return f"{band['value']:.2f} [{band['low']:.2f}, {band['high']:.2f}]"


def _times(ratios: Iterable[float]) -> str:
    return " and ".join(f"{ratio:.0f}x" for ratio in ratios)


def _range(settings: Iterable[Mapping[str, Any]], way: str, what: str) -> str:
    values = [rows[way][what] for rows in settings]
    if what == "speed":
        speeds = [f"{value['median']:.1f}" for value in values]
        return f"{_span(speeds)}x as fast"
    shares = [f"{value:.0%}" for value in values]
    return f"{_span(shares)} of the memory"


def _span(values: Sequence[str]) -> str:
    low, high = min(values, key=_number), max(values, key=_number)
    return low if low == high else f"{low} to {high}"


def _number(text: str) -> float:
    return float(text.rstrip("%"))


# --- the picture ---------------------------------------------------------------------------------


def draw(path: Path = PICTURE) -> Path:
    """Two panels: what a router gets for its cost, and what a training step costs."""
    settings = {"svg.hashsalt": "pliant", "font.size": 9, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
        _draw_routing(left)
        _draw_steps(right)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return path


ROUTERS = {
    "random": "random",
    "prompt length": "length",
    "nearest neighbours": "knn",
    "TF-IDF": "tfidf",
    "best text scorer": "text",
    "linear probe": "probe",
    "Pliant's [CPX] scorer": "cpx",
}
LINES = {
    "perfect": ("perfect routing", BOUND, "--"),
    "[CPX] router": ("Pliant's [CPX] scorer", OURS, "-"),
    "text": ("a scorer of the text alone", TEXT, "-"),
    "random": ("chance", CONTROL, ":"),
}


def _draw_routing(axes: Axes) -> None:
    """Quality against cost, scoring counted, from the small model alone to the large one."""
    measured = figures("quality_cost")
    for name, (label, shade, style) in LINES.items():
        cost, quality = zip(*measured["lines"][name], strict=True)
        axes.plot(cost, quality, style, color=shade, label=label, linewidth=1.8)
    axes.plot(measured["cost"], measured["accuracy"], "o", color=OURS)
    for model, at in zip(measured["right"], (0, -1), strict=True):
        end = measured["lines"]["random"][at]
        axes.plot(*end, "o", color="black", markersize=4)
        axes.annotate(model, end, (4, -13), textcoords="offset points", ha="center")
    axes.legend(loc="lower right", frameon=False)
    axes.set(xlim=(0, 1.25), ylim=(0, 1), title="Which model answers: two tiny models")
    axes.set(xlabel="cost, scoring included (1 = always nano-l)", ylabel="share of right answers")


STEP_LABELS = {
    "standard": ("every token", (-6, -12), "right"),
    "a quarter of the sequences": ("a quarter of\nthe sequences", (0, 7), "center"),
    "CGGRModel": ("cggr's CGGRModel", (7, 4), "left"),
    "CGGRLoss": ("cggr's CGGRLoss", (-6, 6), "right"),
    "sparse .25": ("Pliant, a quarter of the tokens", (8, -3), "left"),
    "sparse .10": ("Pliant, a tenth of the tokens", (8, -3), "left"),
}


def _draw_steps(axes: Axes) -> None:
    measured = figures("gradient_step")[STEPS]
    for way, (label, offset, side) in STEP_LABELS.items():
        time, memory = 1 / measured[way]["speed"]["median"], measured[way]["memory"]
        colour = OURS if label.startswith("Pliant") else CONTROL
        axes.plot(time, memory, "o", color=colour)
        axes.annotate(
            label, (time, memory), offset, textcoords="offset points", ha=side, color=colour
        )
    axes.set(xlim=(0, 1.15), ylim=(0, 1.25), title="Which tokens train: one step, 8 x 256 tokens")
    axes.set(xlabel="time of a standard step", ylabel="its peak memory")


if __name__ == "__main__":
    print(f"{headline()}\n\n{table()}")
    print(f"wrote {draw().relative_to(ROOT)}")
