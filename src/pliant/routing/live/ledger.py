"""What was decided, what it cost and what it saved, in one sqlite file for threads and processes.

    with Ledger("ledger.sqlite") as ledger:
        ledger.report()

A prompt is stored as a salted hash, and as text only if the router's file says so. The salt lies in
the ledger: it prevents look-ups in tables of hashes, but whoever holds the ledger can test a guess.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.routing.live.decision import Decision, Reply
from pliant.routing.live.drift import Window, compare
from pliant.routing.live.grades import Grades
from pliant.routing.live.ledger_file import LedgerFile
from pliant.routing.live_settings import Drift
from pliant.routing.prompts import Prompt, digest, text_of

_DRAWN = 12  # hex digits of a prompt's hash


@dataclass(frozen=True)
class Totals:
    """The sums of a ledger."""

    decisions: int
    answered: int
    """Decisions that led to an answer; the others only chose, or failed."""
    failed: int
    models: dict[str, dict[str, float]]
    """By model: calls, share, cost, saved, tokens."""
    cost: float
    """Of the answers, and of exploring."""
    saved: float
    """By the answers, less the cost of exploring."""
    fell_over: int
    """Decisions for which another model stood in."""
    novel: int
    """Prompts unlike those that the router was fitted on."""
    from_session: int
    """Decisions that followed their session."""
    windows: tuple[Window, ...]
    """Of scores, each compared with the reference."""
    exploration: dict[str, float]
    """Prompts that every model was asked: prompts, answers, failures, cost of the other models'
    answers, and how many prompts are graded for each model that answered."""
    graded: int
    """Answers with a grade."""

    @property
    def drifted(self) -> tuple[Window, ...]:
        return tuple(window for window in self.windows if window.drifted)

    def as_dict(self) -> dict[str, Any]:
        windows = [{**vars(window), "drifted": window.drifted} for window in self.windows]
        return {**vars(self), "windows": windows}


class Ledger:
    """The decisions in one sqlite file; `None` keeps them in memory."""

    def __init__(
        self,
        path: str | Path | None,
        *,
        prompts: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._prompts, self._now = prompts, now
        self._file = LedgerFile(None if path is None else Path(path))
        self.grades = Grades(self._file)

    @property
    def path(self) -> Path | None:
        return self._file.path

    def draw(self, prompt: Prompt) -> float:
        """A number from 0 to 1 that is random over prompts, and always the same for one."""
        return int(digest(prompt, self._file.salt)[:_DRAWN], 16) / 16**_DRAWN

    def record(
        self,
        prompt: Prompt,
        session: str | None,
        decision: Decision,
        cost: float,
        saved: float,
        drift: Drift | None = None,
    ) -> tuple[int, Window | None]:
        """Write a decision; returns its row, and the window of scores that it completed."""
        scored = decision.score is not None
        values = {
            "at": self._now(),
            "session": None if session is None else digest(session, self._file.salt),
            "hash": digest(prompt, self._file.salt),
            "prompt": text_of(prompt) if self._prompts else None,
            "model": decision.model,
            "wanted": decision.wanted,
            "score": decision.score,
            "gain": decision.gain,
            "far": decision.novel,
            "kept": decision.from_session,
            "reason": decision.reason,
            "cost": cost,
            "saved": saved,
            "outcome": "chosen",
        }
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        with self._file.transaction() as base:
            cursor = base.execute(
                f"INSERT INTO decisions ({names}) VALUES ({marks})", tuple(values.values())
            )
            row = int(cursor.lastrowid or 0)
            window = self._window(base, drift) if scored and drift is not None else None
        return row, window

    def answered(self, row: int, reply: Reply) -> None:
        """Add the answer to a decision."""
        decision, used = reply.decision, reply.used
        values = {
            "model": decision.model,
            "reason": decision.reason,
            "cost": reply.cost,
            "saved": reply.saved,
            "outcome": "answered",
            "prompt_tokens": used.prompt_tokens,
            "answer_tokens": used.answer_tokens,
            "ms": used.ms,
        }
        self._file.update(row, values)

    def failed(self, row: int, why: str) -> None:
        """Mark a decision that no model answered: it cost nothing and saved nothing."""
        self._file.update(row, {"outcome": "failed", "cost": 0.0, "saved": 0.0, "reason": why})

    def report(self) -> Totals:
        """Calls, shares, costs, savings, fall-overs and drift over all decisions.

        Decisions without an answer count with the average cost of their model.
        """
        with self._file.reading() as base:
            by_model = base.execute(
                "SELECT model, COUNT(*), SUM(cost), SUM(saved), SUM(prompt_tokens), "
                "SUM(answer_tokens) FROM decisions WHERE outcome != 'failed' GROUP BY model"
            ).fetchall()
            (decisions, answered, failed, fell, novel, sticky) = base.execute(
                "SELECT COUNT(*), SUM(outcome = 'answered'), SUM(outcome = 'failed'), "
                "SUM(model != wanted AND outcome != 'failed'), SUM(far), SUM(kept) FROM decisions"
            ).fetchone()
            windows = base.execute(
                "SELECT number, distance, bound, mean, size FROM windows ORDER BY number"
            ).fetchall()
        explored = self.grades.exploration()
        served = sum(row[1] for row in by_model)
        models = {
            name: {
                "calls": calls,
                "share": calls / served,
                "cost": cost,
                "saved": saved,
                "prompt_tokens": prompt_tokens or 0,
                "answer_tokens": answer_tokens or 0,
            }
            for name, calls, cost, saved, prompt_tokens, answer_tokens in by_model
        }
        return Totals(
            decisions,
            answered or 0,
            failed or 0,
            models,
            float(sum(m["cost"] for m in models.values())) + explored["cost"],
            float(sum(m["saved"] for m in models.values())) - explored["cost"],
            fell or 0,
            novel or 0,
            sticky or 0,
            tuple(Window(*row) for row in windows),
            explored,
            self.grades.count(),
        )

    def rows(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The decisions, the latest first."""
        with self._file.reading() as base:
            cursor = base.execute(
                "SELECT * FROM decisions ORDER BY id DESC LIMIT ?",
                (-1 if limit is None else limit,),
            )
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- drift -----------------------------------------------------------------------------------

    def _window(self, base: sqlite3.Connection, drift: Drift) -> Window | None:
        """Compare a window with the reference as soon as its last score is written."""
        base.execute("UPDATE about SET value = value + 1 WHERE name = 'scored'")
        (scored,) = base.execute("SELECT value FROM about WHERE name = 'scored'").fetchone()
        if scored < drift.window:
            return None
        scores = base.execute(
            "SELECT score FROM decisions WHERE score IS NOT NULL ORDER BY id DESC LIMIT ?",
            (drift.window,),
        ).fetchall()
        (before,) = base.execute("SELECT COUNT(*) FROM windows").fetchone()
        window = compare(drift, [row[0] for row in scores], before + 1)
        base.execute("UPDATE about SET value = 0 WHERE name = 'scored'")
        base.execute(
            "INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?)",
            (window.number, self._now(), window.distance, window.bound, window.mean, window.size),
        )
        return window
