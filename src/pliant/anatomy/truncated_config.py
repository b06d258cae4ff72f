"""The config of a model's first k layers alone: a smaller model of the same type."""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
          "num_decoder_layers")  # fmt: skip
_INDICES = re.compile(r".*(layers|idxs|indices|layer_ids)")
_NO_LAYERS = re.compile(r".*token.*|architectures|label.*|id2label")


def first_layers_config(config: PreTrainedConfig, depth: int, k: int) -> PreTrainedConfig:
    """A copy for the first `k` of `depth` layers: the count, lists with an entry for each layer,
    and lists of layers' indices. Whether the type makes of it what its first layers are is for the
    caller to prove."""
    config = copy.deepcopy(config)
    if k == depth:
        return config
    text: Any = config.get_text_config(decoder=True)
    for key, value in list(vars(text).items()):
        if key in DEPTHS and value == depth:
            setattr(text, key, k)
        elif isinstance(value, (list, tuple)) and not _NO_LAYERS.fullmatch(key):
            setattr(text, key, _cut(key, value, depth, k))
    return config


def _cut(key: str, value: Any, depth: int, k: int) -> Any:
    kind = type(value)
    if len(value) == depth:
        return kind(value[:k])
    if _INDICES.fullmatch(key) and all(isinstance(i, int) for i in value):
        return kind(i for i in value if i < k)
    return value
