"""A config made tiny with its structure kept: what is a size shrinks, what is a choice stays."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

Json = dict[str, Any]

HIDDEN, LAYERS, HEADS, WIDTH, VOCAB, POSITIONS = 64, 4, 4, 128, 256, 128
HEAD_DIM, ROPE_DIM = 16, 8

_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "num_decoder_layers", "num_blocks", "depth")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
          "attention_heads")  # fmt: skip

# Sizes by what their keys mean. They shrink to these values, and stay where they are smaller.
_CAPS = (
    (LAYERS, _LAYERS),
    (HEADS, (*_HEADS, r".*_attention_heads(_per_layer)?", "index_n_heads", "linear_num_heads")),
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
    """The tiny config of a config's dictionary, sub-configs and all."""
    return _shrunk(config, _Sizes.of(config), {})


@dataclass(frozen=True)
class _Sizes:
    """What the sizes of one config relate to."""

    hidden: int | None
    heads: int
    head_dim: int | None
    rope_dim: int
    nope_dim: int
    """The two pieces of a latent-attention head (DeepSeek), with and without positions."""
    order: list[int]
    """Which layers of the original the tiny model's layers are like."""
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
        """These sizes, where a layer has heads of its own."""
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
        # As many query heads to a key head as there were, or the nearest that four heads allow.
        return HEADS // min(HEADS, 1 << (max(1, sizes.heads // max(1, value)).bit_length() - 1))
    if key != "qk_rope_head_dim" and _HEAD_DIM.fullmatch(key):
        return _head_dim(key, value, sizes)
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
    """A head as wide as its share of the hidden state, or wider, or narrower, as it was."""
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
    """Per-frequency lists follow the head's width."""
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
    """`total` in the same proportions; what rounding leaves over goes to the first."""
    shares = [s * total // sum(sections) for s in sections]
    return [shares[0] + total - sum(shares), *shares[1:]]


def _order(config: Json, layers: int) -> list[int]:
    """One layer of each kind in turn, four in all, or as many as there are kinds."""
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
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return (
        _INDICES.fullmatch(key) is not None
        and 0 < len(whole) == len(list(values))
        and whole == sorted(set(whole))
        and whole[-1] < layers
    )


def _token(value: int, tokens: dict[int, int]) -> int:
    """A special token inside the tiny vocabulary: the same one each time, from its top down."""
    if value < VOCAB // 2:
        return value
    return tokens.setdefault(value, VOCAB - 1 - len(tokens))


def _first(config: Json, keys: Iterable[str]) -> int | None:
    found = (config[key] for key in keys if isinstance(config.get(key), int))
    return next((value for value in found if value > 0), None)
