"""Routing on real labels by a real model's [CPX]: does its prefill know more than the text does?

    python -m benchmarks.routing_real --data FOLDER

Labels: Mixtral-8x7B or GPT-4 on GSM8K and on a sample of MMLU (benchmarks/routing_labels.py says
where from). The model that reads the prompts runs over each of them once: keys and values are
stored for [CPX], every layer's state of the last token for the probe. Each of five splits divides a
set into halves; all choices are made within the training half. The controls are text scorers, a
text encoder (nearest neighbors and ridge on its embeddings), the probe and the prompt's length.
Fixed beforehand: [CPX] trains as `pliant route fit` does, except that its learning rate is the best
of three on the first training half of GSM8K; its "best layer" is the probe's, chosen on a fifth of
each training half. Every split is saved when it is done; started again, the rest is measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from benchmarks.harness import CACHE, keep
from benchmarks.routing_labels import Floats, Rows, halves, more, read, summary
from pliant.complexity import CPXConfig, attach, fit
from pliant.complexity.prefix_cache import disk
from pliant.complexity.prefix_cache.store import Chunk, PrefixStore
from pliant.complexity.training.dataset import encode, ids_of
from pliant.linear import logistic, ridge
from pliant.loading import load
from pliant.prefill.prefilled import EMPTY
from pliant.reports.tables import Table
from pliant.routing.metrics.ranking import oracle_apgr
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import messages
from pliant.routing.scorers import make
from pliant.routing.scorers.linear import best, gain_error
from pliant.routing.scorers.protocol import gains

SETS = ("gsm8k", "mmlu")
TEXT = {
    "gsm8k": ("random", "length", "tfidf", "knn", "text"),
    "mmlu": ("random", "length", "tfidf", "knn", "text", "group", "text+group"),
}
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
ALPHAS = (0.1, 1.0, 10.0, 100.0)
NEIGHBORS = (10, 30, 100)
RATES = (1e-2, 3e-3, 1e-3)
TRAINING = {"num_epochs": 6, "batch_size": 32, "weight_decay": 0.1}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the two label sets.")],
    model: Annotated[str, typer.Option(help="The language model that reads.")] = "smollm2-135m",
    encoder: Annotated[str, typer.Option(help="The text encoder beside it.")] = "minilm",
    dtype: Annotated[str, typer.Option(help="The language model's dtype.")] = "bfloat16",
    seeds: Annotated[int, typer.Option(help="Splits of each set.", min=1)] = 5,
    mmlu: Annotated[int, typer.Option(help="The prompts of MMLU's sample.", min=20)] = 3_000,
    only: Annotated[str | None, typer.Option(help="One set alone: gsm8k or mmlu.")] = None,
    limit: Annotated[int | None, typer.Option(help="Fewer prompts, to try it out.")] = None,
) -> None:
    """Print the table of each set and write the result."""
    if only is not None and only not in SETS:
        raise typer.BadParameter(f"--only {only}: give one of {', '.join(SETS)}")
    torch.set_num_threads(1)
    console = Console(highlight=False)
    figures: dict[str, Any] = {"model": Path(model).name, "encoder": Path(encoder).name}
    figures |= {"dtype": dtype, "training": TRAINING}
    for name in SETS if only is None else (only,):
        outcomes = sampled(read(data, name), limit or (mmlu if name == "mmlu" else None))
        parts = (name, str(len(outcomes)), Path(model).name, dtype, Path(encoder).name)
        place = CACHE / "-".join(("routing_real", *parts))
        reader = cache(partial(Reader.of, outcomes, model, encoder, dtype, place, console))
        if "learning rate" not in figures:  # chosen on the first set and used for both
            figures["learning rate"] = learning_rate(outcomes, reader, place)
        rate = figures["learning rate"]
        figures[name] = measure(outcomes, reader, rate, TEXT[name], seeds, place, console)
        draw(figures[name], name).draw(console)
    if limit is None:
        options = f"--only {only}" if only else f"--mmlu {mmlu}"
        command = f"python -m benchmarks.routing_real --data FOLDER {options}"
        keep("routing_real", figures, command)


def sampled(outcomes: Outcomes, size: int | None) -> Outcomes:
    """A fixed sample of this size, or all."""
    if size is None or size >= len(outcomes):
        return outcomes
    return outcomes.select(np.sort(np.random.default_rng(0).permutation(len(outcomes))[:size]))


# --- what is computed once -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reader:
    """The language model, and what it and the encoder computed of every prompt."""

    model: Any
    tokenizer: Any
    prompts: list[Any]
    prefixes: PrefixStore
    states: Floats
    """(prompts, layers, D): the last token's state after each layer."""
    embeddings: Floats

    @classmethod
    def of(
        cls,
        outcomes: Outcomes,
        model: str,
        encoder: str,
        dtype: str,
        place: Path,
        console: Console,
    ) -> Reader:
        loaded, tokenizer = load(model, dtype=dtype)
        loaded.requires_grad_(False)
        prompts = [messages(prompt) for prompt in outcomes.asked]
        prefixes, states = prefilled(loaded, tokenizer, prompts, place)
        embeddings = embedded(encoder, outcomes.prompts)
        size = prefixes.bytes / 1e9
        console.print(f"{len(prompts):,} prompts read once: {size:.1f} GB of keys and values")
        return cls(loaded, tokenizer, prompts, prefixes, states, embeddings)

    @property
    def depth(self) -> int:
        return self.states.shape[1]


def prefilled(
    model: Any, tokenizer: Any, prompts: list[Any], place: Path
) -> tuple[PrefixStore, Floats]:
    """Keys and values, in files that the next start finds, and the last tokens' states."""
    scorer = attach(model, CPXConfig(), tokenizer)
    ids = ids_of(encode(scorer, tokenizer, prompts))
    states = place / "states.npy"
    if not states.is_file():
        shutil.rmtree(place / "prefixes", ignore_errors=True)
        with last_states(model) as batches:
            disk.write_files(place / "prefixes", scorer.prefilled, ids)
        np.save(states, torch.cat(batches).numpy())
    prefixes = disk.open_files(place / "prefixes", ids)
    scorer.detach()
    return prefixes, np.load(states)[prefixes.position].astype(np.float64)


@contextmanager
def last_states(model: Any) -> Iterator[list[Tensor]]:
    """Collects (B, layers, D) of every batch that runs: the last token's state after each layer."""
    batches: list[Tensor] = []
    layers: list[Tensor] = []

    def collect(module: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        layers.append(hidden[:, -1].float())
        if len(layers) == len(model.model.layers):
            batches.append(torch.stack(layers, dim=1))
            layers.clear()

    handles = [layer.register_forward_hook(collect) for layer in model.model.layers]
    try:
        yield batches
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def embedded(encoder: str, texts: Sequence[str], size: int = 32) -> Floats:
    """(n, D): the mean of the encoder's last states, of unit length."""
    from transformers import AutoModel, AutoTokenizer

    from pliant.loading import resolve

    folder = resolve(encoder).location
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows = []
    for i in range(0, len(texts), size):
        batch = tokenizer(
            list(texts[i : i + size]),
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        )
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        rows.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(rows).double().numpy()


# --- one split -------------------------------------------------------------------------------


def measure(
    outcomes: Outcomes,
    reader: Callable[[], Reader],
    rate: float,
    kinds: tuple[str, ...],
    seeds: int,
    place: Path,
    console: Console,
) -> dict[str, Any]:
    """Every scorer on every split, from the file of a split where that is there."""
    predictions: dict[str, list[Floats]] = {}
    tests: list[Rows] = []
    layers = []
    for seed in range(seeds):
        tests.append(halves(outcomes, seed)[1])

        def compute(seed: int = seed) -> Any:
            return Split.of(outcomes, reader(), seed, rate).all(kinds)

        layer, gain = saved(place / f"{seed}.json", compute)
        layers.append(layer)
        for kind, values in gain.items():
            predictions.setdefault(kind, []).append(np.asarray(values))
        console.print(f"split {seed + 1} of {seeds} done", style="dim")
    return {
        "prompts": len(outcomes),
        "right": dict(zip(("Mixtral-8x7B", "GPT-4"), outcomes.right.mean(axis=0), strict=True)),
        "best layers": layers,
        "oracle": oracle_apgr(outcomes),
        "scorers": {kind: summary(p, tests, outcomes) for kind, p in predictions.items()},
        "more than the best text scorer": above(
            predictions, best_of(predictions, kinds, tests, outcomes), tests, outcomes
        ),
        "more than length": above(predictions, "length", tests, outcomes),
    }


def saved(path: Path, compute: Callable[[], Any]) -> Any:
    """What the file holds; computed and written first if it is missing."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(compute()), encoding="utf-8")
        draft.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def learning_rate(outcomes: Outcomes, reader: Callable[[], Reader], place: Path) -> float:
    """The best of a few on the first split's training half, at three quarters of the depth."""

    def choose() -> float:
        layer = round(0.75 * reader().depth)

        def error(rate: float) -> float:
            split = Split.of(outcomes, reader(), 0, rate)
            return gain_error(
                gains(split.cpx(split.fitted, split.choice, {"layer": layer})), split.held
            )

        return best(RATES, error)[0]

    rate: float = saved(place / "rate.json", choose)
    return rate


@dataclass(frozen=True, eq=False)
class Split:
    """A training half, in two parts, and a test half."""

    outcomes: Outcomes
    reader: Reader
    seed: int
    rate: float
    fitted: Rows
    choice: Rows
    test: Rows

    @classmethod
    def of(cls, outcomes: Outcomes, reader: Reader, seed: int, rate: float) -> Split:
        train, test = halves(outcomes, seed)
        order = np.random.default_rng(seed).permutation(train)
        cut = round(0.8 * len(order))
        return cls(outcomes, reader, seed, rate, order[:cut], order[cut:], test)

    @property
    def train(self) -> Rows:
        return np.concatenate([self.fitted, self.choice])

    @property
    def held(self) -> Outcomes:
        """The part on which choices are made."""
        return self.outcomes.select(self.choice)

    def all(self, kinds: tuple[str, ...]) -> tuple[int, dict[str, list[float]]]:
        """The layer that the probe reads, and the test half's gains by every scorer."""
        gain = {kind: self.text(kind) for kind in kinds}
        layer, gain["probe"] = self.probe()
        gain["minilm ridge"], gain["minilm knn"] = self.minilm_ridge(), self.minilm_neighbors()
        ways: dict[str, dict[str, Any]] = {
            "cpx": {},
            "cpx, best layer": {"layer": layer},
            "cpx, best layer, LoRA": {"layer": layer, "lora_rank": 8},
            "cpx, best layer, 4 rows, LoRA": {
                "layer": layer,
                "lora_rank": 8,
                "rows": 4,
                "aggregation": "mean",
            },
        }
        for name, config in ways.items():
            gain[name] = gains(self.cpx(self.train, self.test, config))
        gain["cpx beside minilm"] = (gain["cpx, best layer, LoRA"] + gain["minilm ridge"]) / 2
        gain["probe beside minilm"] = (gain["probe"] + gain["minilm ridge"]) / 2
        return layer, {
            name: (value if value.ndim == 1 else value[:, -1]).tolist()
            for name, value in gain.items()
        }

    def text(self, kind: str) -> Floats:
        scorer = make(kind).fit(self.outcomes.select(self.fitted), self.held, self.seed)
        test = self.outcomes.select(self.test)
        return scorer.predict(test.prompts, test.groups).last_gain

    def probe(self) -> tuple[int, Floats]:
        """A logistic regression on the last token's state, at the best layer."""
        right = self.outcomes.right

        def predict(layer: int, strength: float, train: Rows, rows: Rows) -> Floats:
            states = self.reader.states[:, layer - 1]
            mean, std = states[train].mean(axis=0), states[train].std(axis=0) + 1e-6
            x = (states - mean) / std
            return gains(logistic(x[train], right[train], strength)(x[rows]))

        layers = range(2, self.reader.depth + 1, 2)
        candidates = [(layer, strength) for layer in layers for strength in STRENGTHS]
        (layer, strength), _ = best(
            candidates, lambda c: gain_error(predict(*c, self.fitted, self.choice), self.held)
        )
        return layer, predict(layer, strength, self.train, self.test)

    def minilm_ridge(self) -> Floats:
        x, y = self.reader.embeddings, self.gain

        def predict(alpha: float, train: Rows, rows: Rows) -> Floats:
            return ridge(x[train], y[train], alpha)(x[rows])

        alpha, _ = best(
            ALPHAS, lambda a: gain_error(predict(a, self.fitted, self.choice), self.held)
        )
        return predict(alpha, self.train, self.test)

    def minilm_neighbors(self) -> Floats:
        x, y = self.reader.embeddings, self.gain

        def predict(count: int, train: Rows, rows: Rows) -> Floats:
            near = np.argsort(-x[rows] @ x[train].T, axis=1)[:, :count]
            return y[train][near].mean(axis=1)

        count, _ = best(
            NEIGHBORS, lambda k: gain_error(predict(k, self.fitted, self.choice), self.held)
        )
        return predict(count, self.train, self.test)

    @property
    def gain(self) -> Floats:
        return gains(self.outcomes.right)

    def cpx(self, train: Rows, rows: Rows, config: dict[str, Any]) -> Floats:
        """Each model's P(right) of `rows`, by a [CPX] that was trained on `train`."""
        reader = self.reader
        settings = CPXConfig(outputs=("right:weak", "right:strong"), **config)
        if settings.layer == reader.depth:
            settings = replace(settings, layer=None)
        prefixes = up_to(reader.prefixes, settings.layer)
        torch.manual_seed(self.seed)
        scorer = attach(reader.model, settings, reader.tokenizer)
        fit(
            scorer,
            [reader.prompts[i] for i in train],
            self.outcomes.right[train],
            prefixes=prefixes.select(train),
            seed=self.seed,
            learning_rate=self.rate,
            **TRAINING,
        )
        right = scores_of(scorer, prefixes.select(rows))
        scorer.detach()
        return right


def up_to(prefixes: PrefixStore, layers: int | None) -> PrefixStore:
    """The keys and values of the first layers alone."""
    if layers is None:
        return prefixes
    kinds = prefixes.layout.kinds
    kinds = kinds[:layers] + (EMPTY,) * (len(kinds) - layers)
    layout = replace(prefixes.layout, kinds=kinds, shapes=prefixes.layout.shapes[: 2 * layers])
    chunks = tuple(Chunk(c.lengths, c.rows[: 2 * layers]) for c in prefixes.chunks)
    return replace(prefixes, layout=layout, chunks=chunks)


@torch.inference_mode()
def scores_of(scorer: Any, prefixes: PrefixStore, size: int = 64) -> NDArray[np.float64]:
    """Probabilities from stored prefixes, in the prompts' order."""
    prefixes = prefixes.with_capacity(scorer.config.rows)
    order = np.argsort(prefixes.position.numpy(), kind="stable")  # neighbors are of one length
    logits = np.zeros((len(order), len(scorer.config.outputs)))
    for i in range(0, len(order), size):
        rows = order[i : i + size]
        prefilled = prefixes.batch(rows.tolist()).to_prefilled(scorer)
        logits[rows] = scorer.logits_of(prefilled).double().numpy()
    return 1 / (1 + np.exp(-logits))


# --- the table -------------------------------------------------------------------------------


def best_of(
    predictions: dict[str, list[Floats]],
    kinds: tuple[str, ...],
    tests: list[Rows],
    outcomes: Outcomes,
) -> str:
    """The text scorer with the highest mean APGR on the test halves: chosen in its favor."""
    return max(kinds, key=lambda kind: summary(predictions[kind], tests, outcomes)["apgr"])


def above(
    predictions: dict[str, list[Floats]], control: str, tests: list[Rows], outcomes: Outcomes
) -> dict[str, Any]:
    differences = {
        kind: more(own, predictions[control], tests, outcomes).as_dict()
        for kind, own in predictions.items()
        if kind not in (control, "random")
    }
    return {"control": control, **differences}


def draw(figures: dict[str, Any], name: str) -> Table:
    """One line for each scorer, in the order of APGR, with the upper limit."""
    over, rows = figures["more than the best text scorer"], []
    for kind, result in sorted(figures["scorers"].items(), key=lambda item: -item[1]["apgr"]):
        band = over.get(kind)
        text = f"{band['value']:+.3f} [{band['low']:+.3f}, {band['high']:+.3f}]" if band else "-"
        rows.append([kind, f"{result['apgr']:.3f}", f"{np.std(result['by half']):.3f}", text])
    rows.append(["oracle", f"{figures['oracle']:.3f}", "-", "-"])
    head = ["scorer", "APGR", "spread", f"more than {over['control']} (95 %)"]
    title = f"{name}: {figures['prompts']:,} prompts, best layers {figures['best layers']}"
    return Table(title, head, rows, right=frozenset(head[1:]))


if __name__ == "__main__":
    typer.run(main)
