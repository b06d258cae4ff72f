"""Tiny random models of every causal-LM type: the same structure, a hundred thousand parameters.

A tiny config keeps every choice of the original (layer types, ratios of heads, which layers have
experts) and shrinks every size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Json = dict[str, Any]

OVERRIDES: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (resources.files(__package__) / "tiny_overrides.json").read_text()
)


def causal_lm_types() -> list[str]:
    """Every model type that transformers maps to a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def variants() -> list[str]:
    """Names of other structures that model types can have: `gemma4_text+shared_keys`, ..."""
    types = causal_lm_types()
    return [name for name in OVERRIDES["variants"] if name.partition("+")[0] in types]


def tiny_config(config: PreTrainedConfig | str) -> PreTrainedConfig:
    """A config of the same structure with tiny sizes; a type's name means its default config."""
    changes: dict[str, Any] = {}
    if isinstance(config, str):
        changes = OVERRIDES["variants"].get(config, {})
        config = default_config(config.partition("+")[0])
    sizes = config.to_dict()
    sizes.pop("quantization_config", None)
    tiny = merged(shrink(sizes), OVERRIDES["sizes"].get(config.model_type, {}))
    return type(config).from_dict(merged(tiny, changes))


def default_config(model_type: str) -> PreTrainedConfig:
    """The type's default config, changed if it would not make a causal LM."""
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](
        **OVERRIDES["arguments"].get(model_type, {})
    )
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True  # BERT's family has bidirectional attention otherwise
    return config


def tiny_model(
    config: PreTrainedConfig | str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A tiny random causal LM of the config's structure, in eval mode, the same for one seed."""
    tiny = tiny_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny, dtype=dtype)
        _perturb(model)
    return model.eval()


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with these changes, section by section."""
    result = dict(config)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def _perturb(model: PreTrainedModel) -> None:
    """Move every parameter from its initial constant: with biases at zero, tests would prove less
    than they seem to."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.02 * torch.randn_like(parameter)


# --- sizes ---------------------------------------------------------------------------------------

HIDDEN, LAYERS, HEADS, WIDTH, VOCAB, POSITIONS = 64, 4, 4, 128, 256, 128
HEAD_DIM, ROPE_DIM = 16, 8

_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "num_decoder_layers", "num_blocks", "depth")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
          "attention_heads")  # fmt: skip

# The largest size for each kind of key; smaller sizes stay.
_CAPS = (
    (LAYERS, _LAYERS),
    (WIDTH, (r"(.*_)?intermediate_size(_mlp)?", r"(.*_)?ffn_(hidden_size|dim)", "d_?ff", "dim_ff",
             "d_inner", "mlp_dim", "feed_forward_size")),
    (VOCAB, (r"(.*_)?vocab_size(_.*)?", "codebook_size", r".*_vocab")),
    (POSITIONS, (r"max_.*positions?(_embeddings)?", "max_seq_len", "n_positions", "n_ctx",
                 "context_length", "prompt_length")),
    (32, ("kv_lora_rank", "q_lora_rank", "image_size")),
    (16, ("hidden_size_per_layer_input", "index_topk", "router_hidden_size", "o_lora_rank",
          "ple_embed_dim")),
    (8, ("sliding_window", "sliding_window_size", "attention_window_size", "window_size",
         "local_attention", "local_attention_window_len", "attention_chunk_size",
         r".*chunk_length", "chunk_size", "mamba_chunk_size", "state_size", "ssm_state_size",
         "mamba_d_state", r"(?!.*lora).*_rank", "hc_lowrank", "qk_rope_head_dim", "rotary_dim",
         "mamba_n_heads", "mamba_num_heads")),
    (4, (r"(moe_)?(num|n)_(local_|routed_)?experts",)),
    (2, ("attn_layer_period",)),
    (2, (r"num_experts_per_tok(en)?", r"moe_top_?k", "moe_k", "top_k_experts", "n_groups",
         "o_groups", r"mamba_n_?groups", "zero_expert_num")),
    (1, (r"(moe_)?(num|n)_shared_experts", "n_group", "topk_group", "num_expert_group",
         "first_k_dense_replace", "num_dense_layers", "attn_layer_offset")),
)  # fmt: skip
_CAP_OF = [(re.compile(f"({'|'.join(keys)})"), cap) for cap, keys in _CAPS]
_HEAD_COUNT = re.compile(
    f"({'|'.join(_HEADS)}|.*_attention_heads(_per_layer)?|index_n_heads|linear_num_heads)"
)
_KV_HEADS = re.compile(
    r"(.*_)?num_(key_value|kv)_heads|kv_n_heads|num_query_groups|indexer_kv_heads"
)
_HEAD_DIM = re.compile(r"(.*_)?(head_?dim|head_size|dim_head|d_head)|d_kv|kv_channels")
_WIDE = re.compile(r"(.*_)?(hidden_size|embedding_size|proj_dim|width)(_global)?|lru_width")
_BRIDGE = re.compile(
    r".*(in|out|input|output)_dim|adapter_input_size|out_hidden_size|backbone_hidden_size"
)
_TOKEN = re.compile(r"(.*_)?token_(id|index)|.*_tokens|mask_index")
_INDICES = re.compile(r".*(layers|idxs|indices|layer_ids)")


def shrink(config: Json) -> Json:
    """Shrink the sizes in a config's dictionary, and in its sub-configs."""
    return _shrunk(config, _Sizes.of(config), {})


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one config that its other sizes depend on."""

    hidden: int | None
    heads: int
    head_dim: int | None
    rope_dim: int
    nope_dim: int
    """The two pieces of a latent-attention head (DeepSeek), with and without positions."""
    order: list[int]
    """For each layer of the tiny model, the layer of the original that it copies."""
    layers: int | None

    @classmethod
    def of(cls, config: Json) -> _Sizes:
        layers = _first(config, _LAYERS)
        heads = _first(config, _HEADS) or 1
        return cls(
            hidden=_first(config, _HIDDEN),
            heads=heads,
            head_dim=_first(config, ("head_dim", "d_kv")),
            rope_dim=_first(config, ("qk_rope_head_dim",)) or 0,
            nope_dim=_first(config, ("qk_nope_head_dim",)) or 0,
            order=_order(config, layers) if layers else [],
            layers=layers,
        )

    def of_layer(self, layer: Json) -> _Sizes:
        """These sizes, with the heads of one layer."""
        return replace(
            self,
            heads=_first(layer, _HEADS) or self.heads,
            rope_dim=_first(layer, ("qk_rope_head_dim",)) or self.rope_dim,
            nope_dim=_first(layer, ("qk_nope_head_dim",)) or self.nope_dim,
        )


def _shrunk(config: Json, sizes: _Sizes, tokens: dict[int, int]) -> Json:
    return {key: _value(key, value, sizes, tokens) for key, value in config.items()}


def _value(key: str, value: Any, sizes: _Sizes, tokens: dict[int, int]) -> Any:
    if isinstance(value, dict):
        return _section(key, value, sizes, tokens)
    if isinstance(value, (list, tuple)):
        return _list(key, list(value), sizes, tokens)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _TOKEN.fullmatch(key):
        return _token(value, tokens)
    return _size(key, value, sizes)


def _size(key: str, value: int, sizes: _Sizes) -> int:
    if key in ("encoder_layers", "num_encoder_layers") or value == sizes.layers and key in _LAYERS:
        return len(sizes.order)  # old encoder-decoders count layers by their encoder's
    if key == "num_kv_shared_layers" and sizes.layers:
        return round(value * len(sizes.order) / sizes.layers)
    if _KV_HEADS.fullmatch(key):
        # The original ratio of query heads to key heads, or the nearest that four heads allow.
        return HEADS // min(HEADS, 1 << (max(1, sizes.heads // max(1, value)).bit_length() - 1))
    if key != "qk_rope_head_dim" and _HEAD_DIM.fullmatch(key):
        return _head_dim(key, value, sizes)
    if _HEAD_COUNT.fullmatch(key):
        return HEADS if value > 2 else value  # three would not divide the hidden size
    for pattern, cap in _CAP_OF:
        if pattern.fullmatch(key):
            return min(value, cap)
    if _BRIDGE.fullmatch(key):  # another section's hidden size
        return min(value, HIDDEN)
    if _WIDE.fullmatch(key) or key in _HIDDEN:
        ratio = value / sizes.hidden if sizes.hidden else 1.0
        return max(8, min(2 * HIDDEN, round(HIDDEN * ratio / 8) * 8))
    return value


def _head_dim(key: str, value: int, sizes: _Sizes) -> int:
    """As in the original, a head as wide as hidden_size / heads, or wider, or narrower."""
    if key == "qk_head_dim" or (sizes.rope_dim and value == sizes.rope_dim + sizes.nope_dim):
        return HEAD_DIM + ROPE_DIM
    if sizes.rope_dim == value and key == "head_dim":
        return ROPE_DIM
    if key in ("head_dim", "d_kv", "global_head_dim") and sizes.hidden and not sizes.rope_dim:
        share = sizes.hidden // sizes.heads
        return HEAD_DIM if value == share else 2 * HEAD_DIM if value > share else HEAD_DIM // 2
    return HEAD_DIM


def _list(key: str, values: list[Any], sizes: _Sizes, tokens: dict[int, int]) -> list[Any]:
    if _TOKEN.fullmatch(key):
        return [_token(v, tokens) if isinstance(v, int) else v for v in values]
    if sizes.layers and _is_index_list(key, values, sizes.layers):
        return [new for new, old in enumerate(sizes.order) if old in values]
    if sizes.layers and len(values) == sizes.layers:
        return [_value(key, values[old], sizes, tokens) for old in sizes.order]
    return values


def _section(key: str, section: Json, sizes: _Sizes, tokens: dict[int, int]) -> Json:
    if key == "per_layer_config":
        by_layer = {int(index): layer for index, layer in section.items()}
        return {
            str(new): _shrunk(by_layer[old], sizes.of_layer(by_layer[old]), tokens)
            for new, old in enumerate(sizes.order)
            if old in by_layer
        }
    if key == "rope_parameters" or "rope" in key:
        return _rope(section, sizes)
    own = _Sizes.of(section)
    return _shrunk(section, own if own.layers or own.hidden else sizes, tokens)


def _rope(rope: Json, sizes: _Sizes) -> Json:
    """RoPE's parameters, with lists of frequencies truncated to the width of a head."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _rope(v, sizes) if isinstance(v, dict) else v for k, v in rope.items()}
    dim = _head_dim("head_dim", sizes.head_dim or 0, sizes) if sizes.head_dim else HEAD_DIM
    half = int(dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
    tiny = dict(rope)
    for key, value in rope.items():
        if key == "mrope_section":
            tiny[key] = _share_out(value, half)
        elif isinstance(value, list):
            tiny[key] = value[:half]
    return tiny


def _share_out(sections: list[int], total: int) -> list[int]:
    """Divide `total` in the same proportions; the first section gets the remainder."""
    shares = [s * total // sum(sections) for s in sections]
    return [shares[0] + total - sum(shares), *shares[1:]]


def _order(config: Json, layers: int) -> list[int]:
    """One layer of each kind in turn: four layers, or more if there are more kinds."""
    columns = [
        value
        for key, value in config.items()
        if isinstance(value, (list, tuple))
        and len(value) == layers
        and not _TOKEN.fullmatch(key)
        and not _is_index_list(key, value, layers)
    ]
    members = [
        [index in value for index in range(layers)]
        for key, value in config.items()
        if isinstance(value, list) and _is_index_list(key, value, layers)
    ]
    kinds: dict[str, int] = {}
    for index in range(layers):
        kind = repr([column[index] for column in [*columns, *members]])
        kinds.setdefault(kind, index)
    chosen = list(kinds.values())[: 2 * LAYERS]
    count = max(len(chosen), min(LAYERS, layers))
    return [chosen[n % len(chosen)] for n in range(count)]


def _is_index_list(key: str, values: Iterable[Any], layers: int) -> bool:
    indices = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return (
        _INDICES.fullmatch(key) is not None
        and 0 < len(indices) == len(list(values))
        and indices == sorted(set(indices))
        and indices[-1] < layers
    )


def _token(value: int, tokens: dict[int, int]) -> int:
    """A special token's id in the tiny vocabulary: assigned once, from the top down."""
    if value < VOCAB // 2:
        return value
    return tokens.setdefault(value, VOCAB - 1 - len(tokens))


def _first(config: Json, keys: Iterable[str]) -> int | None:
    values = (config[key] for key in keys if isinstance(config.get(key), int))
    return next((value for value in values if value > 0), None)
