"""A name becomes a model: embedded, fetched, a folder, a GGUF file, or a name on the hub.

`names` says where a name leads, and `models` loads it. `catalogue` lists real models that `fetch`
brings to this machine when asked to.
"""

from pliant.loading.dtypes import Dtype, check_dtype, not_computed_here, slowdown_of
from pliant.loading.models import (
    collector_paused,
    is_encoder,
    load,
    load_config,
    load_encoder,
    load_model,
    load_tokenizer,
    read_json,
    torch_device,
)
from pliant.loading.names import WEIGHTS, Source, embedded, public_name, resolve

__all__ = [
    "WEIGHTS",
    "Dtype",
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
    "not_computed_here",
    "public_name",
    "read_json",
    "resolve",
    "slowdown_of",
    "torch_device",
]
