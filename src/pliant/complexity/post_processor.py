"""A post-processor that appends [CPX] to a prompt and to all tokens that the base's own adds.

Two templates in a row do not work (the second treats the pieces of the first as a pair), so [CPX]
is added to the base's template, or to a new one if it has none.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models

MARK = "[CPX]"  # its name in the template, whatever its text


def cpx_post_processor(
    own: Any, cpx_token: str, cpx_token_id: int, add_special_tokens: bool = True
) -> Any:
    """A post-processor like `own` (which may be None) that adds [CPX] last.

    Without `add_special_tokens` it adds nothing else, but still trims offsets as `own` does.
    """
    steps = [step for part in _parts(own) for step in _templates(part)]
    if not add_special_tokens:
        steps = [step for step in steps if step["type"] != "TemplateProcessing"]
    if not any(step["type"] == "TemplateProcessing" for step in steps):
        steps.append(_template([]))
    last = max(i for i, step in enumerate(steps) if step["type"] == "TemplateProcessing")
    name = MARK
    while name in steps[last]["special_tokens"]:  # if the base has a token of that name
        name += "'"
    steps[last]["single"].append(_special(name))
    steps[last]["special_tokens"][name] = _entry(name, cpx_token, cpx_token_id)
    return _built({"type": "Sequence", "processors": steps})


def _parts(own: Any) -> list[dict[str, Any]]:
    if own is None:
        return []
    state = json.loads(own.__getstate__())
    return list(state["processors"]) if state["type"] == "Sequence" else [state]


def _templates(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The part; BERT's and RoBERTa's, which cannot be extended, as an equivalent template."""
    if part["type"] not in ("BertProcessing", "RobertaProcessing"):
        return [part]
    (cls, cls_id), (sep, sep_id) = part["cls"], part["sep"]
    template = _template([(cls, cls_id)], [(sep, sep_id)])
    if not part.get("trim_offsets"):
        return [template]
    prefix = part["add_prefix_space"]
    trims = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    return [{**trims, "use_regex": True}, template]


def _template(
    before: list[tuple[str, int]], after: list[tuple[str, int]] | None = None
) -> dict[str, Any]:
    tokens = [*before, *(after or [])]
    return {
        "type": "TemplateProcessing",
        "single": [
            *[_special(name) for name, _ in before],
            {"Sequence": {"id": "A", "type_id": 0}},
            *[_special(name) for name, _ in after or []],
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {name: _entry(name, name, number) for name, number in tokens},
    }


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _entry(name: str, text: str, number: int) -> dict[str, Any]:
    return {"id": name, "ids": [number], "tokens": [text]}


def _built(state: dict[str, Any]) -> Any:
    """The library reads a post-processor from JSON only as part of a tokenizer."""
    tokenizer = json.loads(Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).to_str())
    return Tokenizer.from_str(json.dumps({**tokenizer, "post_processor": state})).post_processor
