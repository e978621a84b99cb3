"""What config.json leaves out and the parameter count needs, by model type.

Source: transformers 5.23.0, the class defaults and modelling code of models/<model type>; for axk1 also the
published name AXK1, for vaetki the plugin of github.com/wbl-ncai/VAETKI, for kimi_k2 deepseek_v3, which it runs.
A model type that is not listed here has no defaults, so its parameters cannot be counted from the config alone.
"""

from __future__ import annotations

_LLAMA: dict[str, object] = {
    "hidden_act": "silu",
    "norm": "RMSNorm",
    "norm_bias": False,
    "norms_per_layer": 2,
    "qk_norm": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "mlp_gated": True,
    "tie_word_embeddings": False,
    "router_bias": False,
}
_QWEN2 = {**_LLAMA, "attention_bias": True}
_HEAD_NORM = {**_LLAMA, "qk_norm": True, "qk_norm_shape": "head"}
_CORRECTED_ROUTER = {**_LLAMA, "router_bias": True, "qk_norm_shape": "head"}
_LATENT = {**_LLAMA, "router_bias": True}
_AXK1 = {**_LATENT, "norms_per_moe_layer": 3}
_QWEN2_5_VISION: dict[str, object] = {
    "norm": "RMSNorm",
    "norms_per_layer": 2,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "mlp_gated": True,
    "temporal_patch_size": 2,
    "in_channels": 3,
}

MODEL_TYPES: dict[str, dict[str, object]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "internlm3": _LLAMA,
    "exaone": _LLAMA,
    "qwen2": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_moe": {**_QWEN2, "shared_expert_gate": True},
    "qwen3": _HEAD_NORM,
    "qwen3_moe": _HEAD_NORM,
    "exaone4": _HEAD_NORM,
    "exaone_moe": {**_HEAD_NORM, "router_bias": True, "nextn_dense": True},
    "glm4_moe": _CORRECTED_ROUTER,
    "solar_open": _CORRECTED_ROUTER,
    "deepseek_v2": {**_LLAMA, "router_bias": False},
    "deepseek_v3": {**_LATENT, "nextn_dense": False},
    "kimi_k2": _LATENT,
    "axk1": _AXK1,
    "AXK1": _AXK1,
    "vaetki": {**_LATENT, "norms_per_layer": 4, "norm_zero_centred": True},
    "hyperclovax": {**_LLAMA, "norms_per_layer": 4},
    "phimoe": {**_LLAMA, "norm": "LayerNorm", "norm_bias": True},
    "dbrx": {**_LLAMA, "norm": "LayerNorm"},
    "minimax_m2": {**_LLAMA, "qk_norm": True, "qk_norm_shape": "all", "router_bias": True},
    "gpt_oss": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "router_bias": True, "attention_sinks": True},
    "llama4_text": {
        **_LLAMA,
        "qk_norm": True,
        "qk_norm_shape": "weightless",
        "n_shared_experts": 1,
        "layer_pattern": "LLLG",
    },
    "qwen2_5_vl vision": _QWEN2_5_VISION,
    "qwen2_5_vl_vision vision": _QWEN2_5_VISION,
}
#: In these the experts are as wide as intermediate_size says.
EXPERTS_AS_WIDE_AS_INTERMEDIATE = {"mixtral", "phimoe", "dbrx", "minimax_m2", "gpt_oss", "llama4_text"}
#: In these the output projection has a bias when the query, key and value projections have one.
OUTPUT_BIAS_AS_ATTENTION_BIAS = {
    "llama",
    "phimoe",
    "gpt_oss",
    "llama4_text",
    "hyperclovax",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
}
