"""Writes a small Llama and a byte-level tokenizer as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pliant.loading import load_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def tiny_llama() -> PreTrainedModel:
    """Random weights; its vocabulary is that of the embedded models, a merge and
    the token that transformers adds to every tokenizer of this kind."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=262,
        tie_word_embeddings=True,
        eos_token_id=257,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def write(path: Path, model: PreTrainedModel, kind: str = "F32") -> Path:
    """`kind` is the type of the matrices: F32, Q8_0 or Q4_0."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            _add_tensor(writer, name, tensor, config, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = load_tokenizer("nano-s")
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab", "<|endoftext|>"]
    special = {*tokenizer.all_special_ids, len(tokens) - 1}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(256)
    writer.add_chat_template(tokenizer.chat_template)


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor, config: Any, kind: Any) -> None:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    values = tensor.float().numpy()
    if (part := name.split(".")[-2]) in heads:  # llama.cpp rotates neighboring features
        rows, columns = values.shape
        halves = values.reshape(heads[part], 2, rows // heads[part] // 2, columns)
        values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
    if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
