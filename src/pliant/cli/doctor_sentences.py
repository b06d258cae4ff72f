"""What Pliant can do with a model, in five sentences.

A figure in a sentence names what it was measured on, and its benchmark stands beside it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pliant.reports.tables import size

if TYPE_CHECKING:
    from pliant.survey import Examination, Finding

NEEDED = (
    "layers",
    "scores",
    "score + generate",
    "chosen rows",
    "sparse",
    "fewer heads",
    "fewer channels",
    "fewer experts",
    "fewer layers",
    "projections",
    "prefixes",
)
"""The questions whose answers make the sentences. Those that train an expert take too long: without
them, the sentence on experts says what is likely from the structure alone."""


@dataclass(frozen=True)
class Statement:
    """Whether one thing can be done, and what is known of it."""

    subject: str
    answer: Literal["yes", "likely", "partly", "no"]
    sentence: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.answer}. {self.sentence}"


def summary(examination: Examination, model: str = "MODEL") -> tuple[Statement, ...]:
    """Five statements; `model` is its name in the commands that they give."""
    findings = {finding.name: finding for finding in examination.findings}
    if not findings["layers"].ok:
        why = f"Pliant cannot read this architecture: {findings['layers'].reason}"
        return tuple(Statement(subject, "no", _ended(why)) for subject in SUBJECTS)
    return (
        _routing(findings),
        _training(findings, model),
        _smaller(findings, model, examination),
        _experts(findings, model, examination),
        _prefixes(findings, examination),
    )


EXPERTS = ("projections", "singular values", "z gradients")
SUBJECTS = (
    "Routing",
    "Selective training",
    "Making it smaller",
    "Experts",
    "Prefix cache",
)
TEXT_SCORER = "A scorer that reads the text alone routes to it all the same (--scorer text)."


def _routing(findings: Mapping[str, Finding]) -> Statement:
    if not findings["scores"].ok:
        why = f"A scorer cannot read it: {findings['scores'].reason}"
        return Statement(SUBJECTS[0], "no", f"{_ended(why)} {TEXT_SCORER}")
    both = findings["score + generate"]
    if not both.ok or both.reason:
        why = f"It scores prompts, but not in the prefill of their answers: {both.reason}"
        return Statement(SUBJECTS[0], "partly", f"{_ended(why)} {TEXT_SCORER}")
    return Statement(
        SUBJECTS[0],
        "yes",
        # benchmarks/score_generate.py: 1.02 of a Llama, and of smollm2-135m
        "It scores a prompt while it answers it; on SmolLM2-135M that took 1.02 times as long as "
        "answering alone. What a router saves depends on your prompts: `pliant route label`, then "
        "`fit`.",
    )


def _training(findings: Mapping[str, Finding], model: str) -> Statement:
    audit = f"`pliant gradients audit --model {model} --data FILE` measures that on your data."
    if findings["sparse"].ok:
        return Statement(
            SUBJECTS[1],
            "yes",
            # benchmarks/gradient_step.py: 1.8 to 2.2 of a small Llama, 1.8 of smollm2-135m
            "A step on a quarter of the tokens was about twice as fast on Llamas (1.8 to 2.2 "
            f"times). Whether fewer tokens teach as much is another question: {audit}",
        )
    if findings["chosen rows"].ok:
        why = f"Training cannot run backward through some tokens alone: {findings['sparse'].reason}"
        return Statement(
            SUBJECTS[1],
            "partly",
            f"{_ended(why)} The output layer can (--engine exact); {audit}",
        )
    return Statement(SUBJECTS[1], "no", _ended(findings["chosen rows"].reason))


def _smaller(findings: Mapping[str, Finding], model: str, about: Examination) -> Statement:
    parts = ("heads", "channels", "experts", "layers")
    names = [part for part in parts if findings[f"fewer {part}"].ok]
    if not names:
        reasons = dict.fromkeys(findings[f"fewer {part}"].reason for part in parts)
        return Statement(SUBJECTS[2], "no", _ended("; ".join(reasons)))
    measured = ""
    if "channels" in names:
        # benchmarks/structure_prune.py: 1.11 (GSM8K) and 1.39 (WikiText-2), untrained
        measured = (
            "SmolLM2-135M without a quarter of its channels had 1.11 to 1.39 times its perplexity, "
            "before any training. "
        )
    return Statement(
        SUBJECTS[2],
        "yes",
        f"{_listed(names).capitalize()} can be removed, and a stock {about.architecture} is left. "
        f"{measured}`pliant prune {model} --data FILE --budget 0.2` shows what yours loses.",
    )


def _experts(findings: Mapping[str, Finding], model: str, about: Examination) -> Statement:
    asked = [findings[name] for name in EXPERTS if name in findings]
    for finding in asked:
        if not finding.ok:
            return Statement(SUBJECTS[3], "no", _ended(finding.reason))
    octets = next(e.bytes for e in about.estimates if e.what == "one expert on every projection")
    rows = findings.get("expert rows")
    if rows is None:
        tried = "Its projections can be tuned: --all tries it on a tiny copy."
    elif rows.ok:
        tried = "Each prompt of a batch can have its own."
    else:
        tried = f"All prompts of a batch have the same: {_ended(rows.reason)}"
    return Statement(
        SUBJECTS[3],
        "likely" if rows is None else "yes" if rows.ok else "partly",
        f"{tried} An expert's parameters take {size(octets)} at most; `pliant expert train --base "
        f"{model} --task FILE` trains one by reward, and shows what it gained.",
    )


def _prefixes(findings: Mapping[str, Finding], about: Examination) -> Statement:
    if not findings["prefixes"].ok:
        why = f"Its prompts cannot be stored and batched again: {findings['prefixes'].reason}"
        again = "A scorer's training runs its prompts again in each epoch."
        return Statement(SUBJECTS[4], "no", f"{_ended(why)} {again}")
    octets = about.sizes.cache_bytes_per_token if about.sizes is not None else 0
    each = f", {size(octets)} a token," if octets else ""
    return Statement(
        SUBJECTS[4],
        "yes",
        f"A prompt's keys and values{each} are stored and batched again in any order, so a "
        "scorer's training runs each prompt once.",
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _ended(text: str) -> str:
    return text if text.endswith((".", "?", "!", ")")) else f"{text}."
