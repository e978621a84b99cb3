"""Reads a Hugging Face config.json into the normalised names of `architecture.Architecture`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from checks.catalog.model_types import EXPERTS_AS_WIDE_AS_INTERMEDIATE, MODEL_TYPES, OUTPUT_BIAS_AS_ATTENTION_BIAS

LARGEST_INTEGER = 10**12

#: Normalised name -> names in config.json, the first one present counts. Integers.
INTEGERS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "hidden_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "kv_n_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "ffn_embed_dim"),
    "dense_intermediate_size": ("intermediate_size_mlp",),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "max_sequence_length",
        "seq_length",
    ),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "n_routed_experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "n_shared_experts": ("n_shared_experts", "num_shared_experts"),
    "shared_expert_intermediate_size": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "num_experts_per_tok": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_top_k",
        "top_k_experts",
    ),
    "first_k_dense_replace": ("first_k_dense_replace", "first_last_k_dense_replace"),
    "n_group": ("n_group",),
    "topk_group": ("topk_group",),
    "sliding_window": ("sliding_window", "attention_chunk_size"),
    "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"),
    "temporal_patch_size": ("temporal_patch_size",),
    "patch_size": ("patch_size",),
    "in_channels": ("in_channels", "in_chans", "num_channels"),
    "spatial_merge_size": ("spatial_merge_size",),
    "out_hidden_size": ("out_hidden_size",),
    "window_size": ("window_size",),
}
MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}
ZERO_MEANS_NONE = {
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
    "shared_expert_intermediate_size",
    "n_group",
    "topk_group",
}
NUMBERS: dict[str, tuple[str, ...]] = {
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "attention_multiplier": ("attention_multiplier",),
}
FLAGS: dict[str, tuple[str, ...]] = {
    "tie_word_embeddings": ("tie_word_embeddings",),
    "attention_bias": ("attention_bias", "qkv_bias", "add_qkv_bias"),
    "mlp_bias": ("mlp_bias",),
    "lm_head_bias": ("lm_head_bias",),
    "qk_norm": ("use_qk_norm", "add_qk_norm", "qk_norm"),
}
TEXTS: dict[str, tuple[str, ...]] = {
    "model_type": ("model_type",),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function"),
    "scoring_func": ("scoring_func",),
    "dtype": ("dtype", "torch_dtype"),
}
LAYER_LETTERS = {"sliding_attention": "L", "chunked_attention": "L", "full_attention": "G"}
PARTS = {
    "text": ("text_config", "llm_config", "language_config"),
    "vision": ("vision_config",),
    "audio": ("audio_config",),
}


class ConfigError(ValueError):
    """A config.json holds something that no model of its kind can have."""

    def __init__(self, key: str, expected: str, found: object) -> None:
        super().__init__(f"{key}: expected {expected}, found {_shown(found)}")
        self.key = key
        self.expected = expected
        self.found = found


def _shown(found: object) -> str:
    if isinstance(found, str | float | bool | None):
        return repr(found)[:80]
    if isinstance(found, int):
        return str(found) if abs(found) < 10**30 else "a huge integer"
    return f"a {type(found).__name__}"


def parts(config: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """Which parts does a config have: {"model": config}, or its text, vision and audio parts?

    Raises ConfigError when the config or a nested part is not a mapping.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("config", "a mapping", config)
    found: dict[str, Mapping[str, object]] = {}
    for component, names in PARTS.items():
        for name in names:
            part = config.get(name)
            if isinstance(part, Mapping):
                found[component] = part
                break
            if part is not None:
                raise ConfigError(name, "a mapping", part)
    if not found:
        return {"model": config}
    if "text" not in found:
        return {"text": config, **found}  # the text keys stand beside the vision part
    if "tie_word_embeddings" in config and "tie_word_embeddings" not in found["text"]:
        found["text"] = {**found["text"], "tie_word_embeddings": config["tie_word_embeddings"]}
    return found


def normalise(config: Mapping[str, object], component: str = "model") -> dict[str, object]:
    """One part of a config.json as normalised name -> value; absent and unknown names are left out.

    Raises ConfigError for a value of the wrong type or size.
    """
    flat = _flatten(config)
    row: dict[str, object] = {}
    for name, aliases in TEXTS.items():
        _set(row, name, _text(flat, aliases))
    for name, aliases in FLAGS.items():
        _set(row, name, _flag(flat, aliases))
    for name, aliases in NUMBERS.items():
        _set(row, name, _number(flat, aliases))
    for name, aliases in INTEGERS.items():
        _set(row, name, _integer(flat, aliases, name))
    if component == "vision":
        _vision(flat, row)
    else:
        _rope(flat, row)
        _experts(flat, row)
        _layer_pattern(flat, row)
    _defaults(flat, row, component)
    return row


def _set(row: dict[str, object], name: str, value: object) -> None:
    if value is not None:
        row[name] = value


def _flatten(config: Mapping[str, object]) -> dict[str, object]:
    flat = dict(config)
    for name in ("attn_config", "ffn_config"):  # DBRX keeps half of its row in these
        nested = config.get(name)
        if isinstance(nested, Mapping):
            flat.update({str(key): value for key, value in nested.items() if key != "model_type"})
    return flat


def _first(config: Mapping[str, object], names: tuple[str, ...]) -> tuple[str, object]:
    for name in names:
        if config.get(name) is not None:
            return name, config[name]
    return names[0], None


def _text(config: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    key, value = _first(config, names)
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(key, "a string", value)


def _flag(config: Mapping[str, object], names: tuple[str, ...]) -> bool | None:
    key, value = _first(config, names)
    if value is None or isinstance(value, bool):
        return value
    raise ConfigError(key, "true or false", value)


def _number(config: Mapping[str, object], names: tuple[str, ...]) -> float | None:
    key, value = _first(config, names)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(key, "a number", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, "a finite number", value)
    if not 0 <= value <= LARGEST_INTEGER:
        raise ConfigError(key, f"a number from 0 to {LARGEST_INTEGER:.0e}", value)
    return float(value)


def _integer(config: Mapping[str, object], names: tuple[str, ...], normalised: str) -> int | None:
    key, value = _first(config, names)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(key, "an integer", value)
    if value == 0 and normalised in ZERO_MEANS_NONE:
        return None
    lowest = 0 if normalised in MAY_BE_ZERO else 1
    if not lowest <= value <= LARGEST_INTEGER:
        raise ConfigError(key, f"an integer from {lowest} to {LARGEST_INTEGER:.0e}", value)
    return value


def _rope(config: Mapping[str, object], row: dict[str, object]) -> None:
    """rope_theta and rope_scaling, from the old keys or from rope_parameters (transformers 5)."""
    key, scaling = _first(config, ("rope_parameters", "rope_scaling"))
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ConfigError(key, "a mapping", scaling)
    parameters: dict[str, object] = dict(scaling) if isinstance(scaling, Mapping) else {}
    full, sliding = parameters.get("full_attention"), parameters.get("sliding_attention")
    if isinstance(full, Mapping) and isinstance(sliding, Mapping):
        _set(row, "rope_theta_global", _number(full, ("rope_theta",)))
        parameters = dict(sliding)
    local = _number(config, ("rope_local_base_freq",))  # Gemma 3
    stated = _number({**parameters, **config}, ("rope_theta",))
    theta = _number(parameters, ("rope_theta",)) if stated is None else stated
    if local is not None:
        _set(row, "rope_theta_global", theta)
    _set(row, "rope_theta", theta if local is None else local)
    _set(row, "partial_rotary_factor", _number(parameters, ("partial_rotary_factor",)))
    kind = _text(parameters, ("rope_type", "type"))
    if kind not in (None, "default"):
        factor = _number(parameters, ("factor",))
        row["rope_scaling"] = str(kind) if factor is None else f"{kind} {factor}"
    elif "rope_theta" in row:
        row["rope_scaling"] = "none"


def _experts(config: Mapping[str, object], row: dict[str, object]) -> None:
    """Where the mixture layers are, how wide the experts are, how many are shared."""
    if "n_routed_experts" not in row:
        for name in ("n_shared_experts", "num_experts_per_tok", "first_k_dense_replace", "moe_intermediate_size"):
            row.pop(name, None)
        return
    if row.get("model_type") in EXPERTS_AS_WIDE_AS_INTERMEDIATE and "intermediate_size" in row:
        row.setdefault("moe_intermediate_size", row["intermediate_size"])
    if "n_shared_experts" not in row and row.get("model_type") != "llama4_text":
        row["n_shared_experts"] = 1 if "shared_expert_intermediate_size" in row else 0
    key, step = _first(config, ("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step"))
    only_dense = config.get("mlp_only_layers")
    kinds = config.get("mlp_layer_types")
    layers = row.get("num_hidden_layers")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str):
        _schedule([kind == "sparse" for kind in kinds], row)
    elif isinstance(step, Sequence) and not isinstance(step, str):
        _schedule([bool(mixture) for mixture in step], row)
    elif isinstance(only_dense, Sequence) and not isinstance(only_dense, str) and only_dense:
        dense = {layer for layer in only_dense if isinstance(layer, int)}
        if isinstance(layers, int) and layers < 10_000 and step in (None, 1):
            _schedule([layer not in dense for layer in range(layers)], row)
    else:
        frequency = _integer(config, (key,), "moe_layer_frequency")
        row["moe_layer_frequency"] = 1 if frequency is None else frequency
        row.setdefault("first_k_dense_replace", 0)


def _schedule(mixture: list[bool], row: dict[str, object]) -> None:
    """Dense layers first, mixtures after them; any other order stays unknown."""
    dense = mixture.index(True) if True in mixture else len(mixture)
    if all(mixture[dense:]):
        row["first_k_dense_replace"] = dense
        row["moe_layer_frequency"] = 1
    else:
        row.pop("first_k_dense_replace", None)


def _layer_pattern(config: Mapping[str, object], row: dict[str, object]) -> None:
    """One period of sliding (L) and global (G) layers, as EXAONE writes it."""
    if _flag(config, ("use_sliding_window",)) is False:
        row.pop("sliding_window", None)
    kinds, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str) and kinds:
        letters = "".join(LAYER_LETTERS.get(kind, "X") if isinstance(kind, str) else "X" for kind in kinds)
        row["layer_pattern"] = _period(letters)
    elif isinstance(pattern, str) and pattern:
        row["layer_pattern"] = _period(pattern.upper())
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and 1 < pattern < 1000:
        row["layer_pattern"] = "L" * (pattern - 1) + "G"
    elif "sliding_window" in row and row.get("model_type") in ("mistral", "mixtral"):
        row["layer_pattern"] = "L"
    elif "sliding_window" not in row and row.get("model_type") in MODEL_TYPES:
        row["layer_pattern"] = "G"


def _period(letters: str) -> str:
    for length in range(1, len(letters)):
        if all(letter == letters[place % length] for place, letter in enumerate(letters)):
            return letters[:length]
    return letters


def _vision(config: Mapping[str, object], row: dict[str, object]) -> None:
    blocks = config.get("fullatt_block_indexes")
    if blocks is not None:
        if not isinstance(blocks, Sequence) or not all(type(block) is int for block in blocks):
            raise ConfigError("fullatt_block_indexes", "a list of integers", blocks)
        row["full_attention_layers"] = tuple(blocks)
    width = _integer(config, ("embed_dim",), "hidden_size")
    if width is not None:  # Qwen2-VL calls its output width hidden_size
        _set(row, "out_hidden_size", row.get("hidden_size"))
        row["hidden_size"] = width


def _defaults(config: Mapping[str, object], row: dict[str, object], component: str) -> None:
    """What config.json leaves out: by model type, then by the conventions of the library."""
    name = str(row.get("model_type"))
    for key, value in MODEL_TYPES.get(name if component != "vision" else f"{name} vision", {}).items():
        row.setdefault(key, value)
    if "n_routed_experts" not in row:
        for key in ("router_bias", "shared_expert_gate", "n_shared_experts", "norms_per_moe_layer"):
            row.pop(key, None)
    if name in OUTPUT_BIAS_AS_ATTENTION_BIAS and "attention_bias" in row:
        row["attention_output_bias"] = row["attention_bias"]
    if row.get("qk_norm") is False:
        row.pop("qk_norm_shape", None)
    heads, width = row.get("num_attention_heads"), row.get("hidden_size")
    if "kv_lora_rank" in row:
        row.pop("num_key_value_heads", None)
        row.pop("head_dim", None)
    elif isinstance(heads, int) and isinstance(width, int):
        row.setdefault("num_key_value_heads", 1 if _flag(config, ("multi_query",)) else heads)
        if width % heads == 0:
            row.setdefault("head_dim", width // heads)
