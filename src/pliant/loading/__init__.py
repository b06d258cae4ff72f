"""A name becomes a model: embedded, fetched, a folder, a GGUF file, or a name on the hub.

`names` says where a name leads, and `models` loads it. `catalogue` lists real models that `fetch`
brings to this machine when asked to.
"""

from pliant.loading.models import (
    check_dtype,
    collector_paused,
    is_encoder,
    load,
    load_config,
    load_encoder,
    load_model,
    load_tokenizer,
    read_json,
    slowdown_of,
    torch_device,
)
from pliant.loading.names import WEIGHTS, Source, embedded, public_name, resolve

__all__ = [
    "WEIGHTS",
    "Source",
    "check_dtype",
    "collector_paused",
    "embedded",
    "is_encoder",
    "load",
    "load_config",
    "load_encoder",
    "load_model",
    "load_tokenizer",
    "public_name",
    "read_json",
    "resolve",
    "slowdown_of",
    "torch_device",
]
