# SPDX-License-Identifier: Apache-2.0
"""Tiny random configurations of transformers' models, by the names of their sizes; a harness, not part of the package.

Lists with one entry for each layer keep enough of them to have every kind of layer once.
"""

from __future__ import annotations

from typing import Any

VOCAB, HIDDEN, HEADS, HEAD = 97, 32, 4, 8

# each number, and the sizes that take it
NAMES: dict[int, str] = {
    VOCAB: "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input",
    HIDDEN: """hidden_size d_model n_embd emb_dim dim embedding_dim attention_hidden_size word_embed_proj_dim lru_width
        embedding_size hidden_size_global num_mel_bins input_embedding_size output_embedding_size backbone_hidden_size
        intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim
        ffn_hidden_size dff d_ff d_inner dim_ff intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size
        feed_forward_size shared_experts_intermediate_size router_hidden_size moe_shared_expert_intermediate_size
        shared_intermediate_size""",
    HEADS: """num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads
        decoder_attention_heads encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim""",
    HEAD: """head_dim swa_head_dim d_head d_kv dim_head attention_head_size kv_channels qk_nope_head_dim
        qk_rope_head_dim v_head_dim index_head_dim global_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim kv_lora_rank q_lora_rank o_lora_rank laurel_rank hc_lowrank gated_norm_rank
        query_pre_attn_scalar sliding_window attention_window_size sliding_window_size local_attention
        attention_chunk_size chunk_size mamba_chunk_size index_topk keep_window_size mamba_d_state state_size
        time_step_rank mamba_dt_rank mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_head_dim
        mamba_headdim ssm_state_size hidden_size_per_layer_input embed_dim ple_embed_dim adapter_rank""",
    2: """num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads o_groups
        linear_num_value_heads linear_num_heads index_n_heads decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers depth num_blocks conf_num_hidden_layers conf_num_attention_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_top_k moe_k""",
    1: """n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group mamba_n_groups
        n_groups mamba_ngroups first_k_dense_replace num_dense_layers moe_layer_start_index""",
    0: "num_kv_shared_layers",
    2 * HEAD: "qk_head_dim image_size patch_size",
    64: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions model_max_length mamba_d_ssm""",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DERIVED = ("transformers_version", "model_type", "architectures", "dtype", "id2label", "label2id", "per_layer_config")

# numbers other than their defaults, which would leave the tail of the model the identity
TAILS = {
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 2.5),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"), 0.7),
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}

# what the names above do not say
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "feed_forward_size": 32,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
        "num_key_value_heads": HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
        "num_key_value_heads": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    config = cls(**shrunk(cls().to_dict(), SPECIAL.get(model_type, {})))
    config.use_cache = False
    return config


def shrunk(config: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its sizes replaced, at every depth."""
    layers, kept = kinds_of_layers(config)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = shrunk(value, special.get(name, {}))
        elif isinstance(value, list) and len(value) == layers:
            value = [value[i] for i in kept]
        elif name in LAYERS:
            value = len(kept)
        elif name in TAILS and not isinstance(value, str):
            value = TAILS[name]
        elif name == "output_router_logits":
            value = True
        elif name in SIZES and isinstance(value, int):
            value = SIZES[name]
        elif str(name).endswith("_token_id") and isinstance(value, int):
            value = value % VOCAB
        elif name == "head_dim" and value is None:
            value = HEAD
        elif name == "num_key_value_heads" and value is None:
            value = 2
        small[name] = value
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # latent attention has no groups
        small["num_key_value_heads"] = HEADS
    small |= {k: v for k, v in special.items() if k not in config or not isinstance(config[k], dict) or not config[k]}
    return {k: v for k, v in small.items() if k not in DERIVED}


def kinds_of_layers(config: dict[str, Any]) -> tuple[int, list[int]]:
    """How many layers there are, and which ones have every kind among them."""
    layers = next((config[n] for n in LAYERS if isinstance(config.get(n), int)), 0)
    kept: set[int] = set(range(min(2, layers)))
    for value in config.values():
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, str) for v in value):
            kept |= {value.index(kind) for kind in set(value)}
    return layers, sorted(kept)
