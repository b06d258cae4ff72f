"""The page of `pliant prune --report`: what went, what it cost, and what it saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pliant.errors import PliantError, UnsupportedModel
from pliant.reports import page, plots
from pliant.reports.tables import Table, count

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.structure import ExportResult, Plan, Pruned

SMALL_LOSS = 1.05
"""A perplexity times this needs no recovery to be worth a look."""
PROMPT, ANSWER = 24, 48  # tokens of the texts that are shown


class Page:
    """Made before the model is pruned, for what is to be seen of the whole model."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, batch: Mapping[str, Tensor], plan: Plan
    ) -> None:
        self.name, self.model, self.tokenizer, self.batch = name, model, tokenizer, batch
        self.plan = plan
        self.text = self._answer(model)
        self.importance = self._importance()
        self.agency = self._agency()

    def write(self, path: Path, pruned: Pruned, result: ExportResult | None) -> None:
        """Write the page; the model is whole again after it, so that its speed is the whole's."""
        sections = [self._quality(), self._units(pruned), self._texts()]
        pruned.detach()
        if result is not None:
            sections.insert(1, self._sizes(result))
        page.write(path, f"{self.name}, pruned", sections, self._top(result))

    def _top(self, result: ExportResult | None) -> page.Top:
        """What is saved and what it costs, beside random units at the same size."""
        best, whole = self.plan.best, self.plan.whole
        ratio = best.perplexity / whole
        random = [point for point in self.plan.points if point.config.score == "random"]
        near = min(random, key=lambda point: abs(point.saved - best.saved), default=None)
        chance = None if near is None else near.perplexity / whole
        figures = [
            page.KeyFigure(f"{self.plan.costs.of} saved", f"{best.saved:.1%}"),
            page.KeyFigure("perplexity", f"{ratio:.3f}x", "of the whole model's, held-out text"),
        ]
        if near is not None:
            note = f"at {near.saved:.1%} saved: the control"
            figures.append(page.KeyFigure("random units", f"{chance:.3g}x", note))
        if result is not None:
            before = f"{count(result.parameters_before)} before"
            figures.append(page.KeyFigure("parameters", count(result.parameters), before))
        worse = chance is not None and ratio >= chance
        kind: Literal["good", "mixed", "bad"] = "bad" if worse else "mixed"
        action = "No better than random units: give other parts or more calibration text."
        if not worse:
            kind = "good" if ratio <= SMALL_LOSS else "mixed"
            action = "Check it on your own task" + (
                "." if kind == "good" else ", and train it back: pliant recover."
            )
        return page.Top(page.Verdict(kind, str(self.plan), action), figures)

    # --- sections ------------------------------------------------------------------------------

    def _quality(self) -> page.Section:
        ours = "compensated" if self.plan.config.compensate else self.plan.config.score
        ways: dict[str, list[tuple[float, float]]] = {"random": [], ours: []}
        for point in self.plan.points:
            how = point.config.score if not point.config.compensate else "compensated"
            parts = " and ".join(point.config.parts)
            name = how if point.config.parts == self.plan.config.parts else f"{parts} alone"
            at = point.saved, point.perplexity / self.plan.whole
            ways.setdefault(name, []).append(at)
        most = 3 * max(1.0, self.plan.best.perplexity / self.plan.whole)
        drawn = {
            name: [(0.0, 1.0), *sorted(at for at in line if at[1] <= most)]
            for name, line in ways.items()
        }
        lines = {
            name: plots.Line.through(line, "ours" if name == ours else "control")
            for name, line in drawn.items()
            if len(line) > 1
        }
        of = self.plan.costs.of
        picture = plots.lines(lines, f"{of} saved", "perplexity, of the whole model's")
        caption = (
            f"Ways that multiply the perplexity by more than {most:.2g} end beyond the picture."
        )
        return page.Section(
            "Quality against what is saved",
            [str(self.plan)],
            [curve_table(self.name, self.plan)],
            [(picture, caption)],
        )

    def _sizes(self, result: ExportResult) -> page.Section:
        """Sizes and speeds of the whole model and of the one that was written."""
        from pliant.loading import load
        from pliant.structure.pruning import costs

        smaller, _ = load(result.folder, dtype=str(self.model.dtype).removeprefix("torch."))
        smaller.to(self.model.device)
        rows = [_row("parameters", result.parameters_before, result.parameters)]
        for name, of in (("operations of a prompt", "flops"), ("bytes of its cache", "kv")):
            try:
                rows.append(_row(name, *(costs.cost(m, of) for m in (self.model, smaller))))  # type: ignore[arg-type]
            except UnsupportedModel:  # a model without keys and values
                continue
        ratio = costs.latency_ratio(smaller, self.model)
        rows.append(["time for a prompt and an answer", "1", f"{ratio:.2f}", f"{1 / ratio:.2f}x"])
        head = ["what", "before", "after", "gain"]
        title = f"{costs.PROMPT} tokens of prompt, {costs.ANSWER} of answer"
        return page.Section(
            "Sizes and speeds",
            [str(result)],
            [Table(title, head, rows, right=frozenset(head[1:]))],
        )

    def _units(self, pruned: Pruned) -> page.Section:
        """Heat maps: how much each unit mattered, which went, and the heads' utilisation."""
        pictures = []
        if self.importance is not None:
            maps = {
                str(kind): {key: values.tolist() for key, values in sites.items()}
                for kind, sites in self.importance.units.items()
            }
            caption = f"Importance by {self.importance.score}, before anything was removed."
            pictures.append((plots.heat_maps(maps, "layer", self.importance.score), caption))
        gates = plots.heat_maps(gates_of(pruned), "layer", "gate")
        pictures.append((gates, "Gates: at 0 the unit is removed."))
        sentences = [str(pruned)]
        if self.agency is not None:
            heads: dict[str, list[float]] = {}
            for head in self.agency.heads:
                heads.setdefault(str(head.layer), []).append(head.utilisation)
            caption = "Utilisation of the heads: 1 - H(attention) / log T, before the removal."
            pictures.append((plots.heat_maps({"heads": heads}, "layer", "utilisation"), caption))
            sentences.append(str(self.agency))
        return page.Section("What was removed", sentences, pictures=pictures)

    def _texts(self) -> page.Section:
        prompt = self.tokenizer.decode(self._prompt()[0])
        head = ["model", "how it goes on"]
        rows = [["the whole model", self.text], ["pruned", self._answer(self.model)]]
        return page.Section("Two texts", [prompt], [Table("Greedy decoding", head, rows)])

    # --- the whole model -----------------------------------------------------------------------

    def _prompt(self) -> Tensor:
        """The start of the first held-out text."""
        row: Tensor = self.batch["input_ids"][0]
        mask = self.batch.get("attention_mask")
        row = row if mask is None else row[mask[0].bool()]
        return row[None, : min(PROMPT, max(1, len(row) // 2))].to(self.model.device)

    def _answer(self, model: Any) -> str:
        ids = self._prompt()
        out = model.generate(ids, max_new_tokens=ANSWER, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def _importance(self) -> Any:
        """By one forward pass."""
        from pliant.structure import ImportanceConfig, importance
        from pliant.structure.ranking.measures import RANKS

        kinds = tuple(part for part in self.plan.config.parts if part in RANKS["activation"])
        if kinds:
            return importance(self.model, [self.batch], ImportanceConfig(kinds, "activation"))
        return importance(
            self.model, [self.batch], ImportanceConfig(("layers",), "block_influence")
        )

    def _agency(self) -> Any:
        """After one observation; None if the model shows no attention probabilities."""
        from pliant.structure import attach, attach_agency

        gates = agency = None
        try:
            gates = attach(self.model, name="report")
            agency = attach_agency(gates, name="report_agency")
            agency.observe(self.batch)
            return agency.get_agency_report()
        except PliantError:
            return None
        finally:
            for adapter in (agency, gates):
                if adapter is not None:
                    adapter.detach()


def gates_of(pruned: Pruned) -> dict[str, dict[str, list[float]]]:
    """By kind and site; experts are closed in the router's choice, and their gates stay at 1."""
    gates: dict[str, dict[str, list[float]]] = {}
    for site in pruned.gates.sites:
        own = pruned.gates[site.kind, site.layer, site.block].tolist()
        if site.kind == "experts":
            for unit in pruned.removed["experts"][site.key]:
                own[unit] = 0.0
        gates.setdefault(str(site.kind), {})[site.key] = own
    return gates


def curve_table(model: str, plan: Plan) -> Table:
    """The ways that were measured, by what they save."""
    rows = [["nothing", "0.0%", f"{plan.whole:.4g}", "1.000"]]
    for point in sorted(plan.points, key=lambda point: (point.saved, point.perplexity)):
        ratio = f"{point.perplexity / plan.whole:.3f}"
        rows.append([str(point), f"{point.saved:.1%}", f"{point.perplexity:.4g}", ratio])
    head = ["removed", f"{plan.costs.of} saved", "perplexity", "of the whole"]
    return Table(f"{model}, on held-out text", head, rows, right=frozenset(head[1:]))


def _row(name: str, before: float, after: float) -> list[str]:
    gain = f"{before / after:.2f}x" if after else ""
    return [name, count(before), count(after), gain]
