# SPDX-License-Identifier: Apache-2.0
"""Tiny random configurations of transformers' models, by the names of their sizes; a harness, not part of the package.

Lists with one entry for each layer keep enough of them to have every kind of layer once.
"""

from __future__ import annotations

from typing import Any

VOCAB, HIDDEN, HEADS, HEAD = 97, 32, 4, 8

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_dim", "attention_hidden_size"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "lru_width", "hidden_size_global", "num_mel_bins"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("swa_num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "d_kv", "dim_head", "attention_head_size", "kv_channels"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), HEAD),
    **dict.fromkeys(("global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "hc_lowrank", "gated_norm_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"), 2),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim"), HIDDEN),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dff", "d_ff", "d_inner", "dim_ff"), HIDDEN),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "expert_ffn_hidden_size"), HIDDEN),
    **dict.fromkeys(("feed_forward_size", "shared_experts_intermediate_size", "router_hidden_size"), HIDDEN),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "num_blocks"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "local_attention"), 8),
    **dict.fromkeys(("attention_chunk_size", "mamba_chunk_size", "chunk_size", "index_topk", "keep_window_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "embed_dim", "ple_embed_dim", "adapter_rank"), 8),
    **dict.fromkeys(("image_size", "patch_size"), 16),
    **dict.fromkeys(("conf_num_hidden_layers", "conf_num_attention_heads"), 2),
    "qk_head_dim": 2 * HEAD,
    "rotary_dim": 4,
    "vocab_size_per_layer_input": VOCAB,
    "query_pre_attn_scalar": HEAD,
    "mamba_d_ssm": 64,
    "o_groups": 2,
    "num_kv_shared_layers": 0,
}

# what the names above do not say
SPECIAL: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return cls(**shrunk(cls().to_dict(), SPECIAL.get(model_type, {})))


def shrunk(config: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its sizes replaced, at every depth."""
    layers, kept = kinds_of_layers(config)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = shrunk(value, special.get(name, {}))
        elif isinstance(value, list) and len(value) == layers:
            value = [value[i] for i in kept]
        elif name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            value = len(kept)
        elif name in SIZES and isinstance(value, int):
            value = SIZES[name]
        elif name.endswith("_token_id") and isinstance(value, int):
            value = value % VOCAB
        small[name] = value
    small |= {k: v for k, v in special.items() if not isinstance(small.get(k), dict)}
    for derived in ("transformers_version", "model_type", "architectures", "dtype"):
        small.pop(derived, None)
    return small


def kinds_of_layers(config: dict[str, Any]) -> tuple[int, list[int]]:
    """How many layers there are, and which ones have every kind among them."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    layers = next((config[n] for n in names if isinstance(config.get(n), int)), 0)
    kept: set[int] = set(range(min(2, layers)))
    for value in config.values():
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, str) for v in value):
            kept |= {value.index(kind) for kind in set(value)}
    return layers, sorted(kept)
