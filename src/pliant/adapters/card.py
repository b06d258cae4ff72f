"""The README.md beside an adapter's weights: what it is, how large, and how to load it."""

from __future__ import annotations

import json

from huggingface_hub import ModelCardData

from pliant.adapters.files import Index
from pliant.loading import embedded

OURS = "<!-- Pliant writes this card anew at each save, until this line is taken out. -->"

TEXT = """\
# {kind}

An adapter for {base}, of the part `{part}` of Pliant {version}: {numbers:,} trained numbers,
{size:,} bytes. It changes nothing in its base, and comes off without a trace.

```python
import pliant.{part}
from pliant.adapters import Adapter

adapter = Adapter.from_pretrained(model, "folder-or-hub-name")
```

Loading checks that `model` is the base this was trained on: {base_facts}.

```json
{config}
```
"""


def model_card(index: Index, numbers: int, size: int) -> str:
    hub_name = index.base.name if index.base.name not in embedded() else ""
    data = ModelCardData(
        library_name="pliant",
        base_model=hub_name or None,
        base_model_relation="adapter" if hub_name else None,
        tags=["pliant", "adapter", index.part],
    )
    text = TEXT.format(
        kind=index.kind,
        part=index.part,
        version=index.pliant,
        base=_base(index.base.name or index.base.model, hub_name),
        numbers=numbers,
        size=size,
        base_facts=_facts(index),
        config=json.dumps(index.config, indent=2),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n{OURS}\n"


def _base(name: str, hub_name: str) -> str:
    return f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else name


def _facts(index: Index) -> str:
    tensors = sum(index.base.shapes.values())
    known = f"{len(index.base.samples)} of them sampled" if index.base.samples else index.base.why
    return f"`{index.base.model}`, {tensors} tensors ({known})"
