"""The architecture of one model component, in one vocabulary for every model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from checks.catalog.configuration import ConfigError, normalise, parts

__all__ = [
    "FIELD_TYPES",
    "Architecture",
    "ConfigError",
    "applies",
    "attention_kind",
    "expert_layout",
    "from_config",
    "is_mixture",
    "is_multi_head_latent",
    "moe_layout",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the comparison tables: what fixes the shapes of the tensors, and the scalars beside them.

    Every field is optional. None means "unknown" or "does not apply"; `is_mixture` and
    `is_multi_head_latent` tell the two apart where it matters. Widths and counts are in units, thetas
    in positions. The names follow config.json of the transformers library.
    """

    model_type: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None  # None for latent attention: it has no separate key/value heads
    head_dim: int | None = None  # None for latent attention: see qk_nope_head_dim, qk_rope_head_dim, v_head_dim
    intermediate_size: int | None = None  # as the config states it, also where no layer uses it
    hidden_act: str | None = None
    vocab_size: int | None = None  # rows of the embedding table, not entries of the tokenizer
    max_position_embeddings: int | None = None
    rope_theta: float | None = None  # of the sliding layers where a model has two
    rope_theta_global: float | None = None  # of the global layers where it differs
    rope_scaling: str | None = None  # kind and factor, "yarn 2.0"; "none"
    partial_rotary_factor: float | None = None
    norm: str | None = None  # "RMSNorm" or "LayerNorm"
    norm_eps: float | None = None
    norm_bias: bool | None = None
    norm_zero_centred: bool | None = None  # the weight is stored minus one
    norms_per_layer: int | None = None  # norms of width hidden_size in one layer
    norms_per_moe_layer: int | None = None  # where mixture layers have another number
    qk_norm: bool | None = None
    qk_norm_shape: str | None = None  # "head": head_dim each; "all": all heads; "weightless": no parameters
    attention_bias: bool | None = None  # on the query, key and value projections
    attention_output_bias: bool | None = None
    attention_sinks: bool | None = None  # one learned logit per head
    attention_multiplier: float | None = None
    mlp_bias: bool | None = None
    mlp_gated: bool | None = None  # gate, up and down projections rather than up and down
    lm_head_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    attention: str | None = None  # as stated by a source; attention_kind() derives it from the row
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    moe_intermediate_size: int | None = None
    dense_intermediate_size: int | None = None  # width of dense layers where it is not intermediate_size
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    shared_expert_intermediate_size: int | None = None  # of all shared experts together; else n_shared * moe width
    shared_expert_gate: bool | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int | None = None
    moe_layer_frequency: int | None = None  # every n-th layer after the dense ones is a mixture
    router_bias: bool | None = None  # one value per routed expert, also as a correction of the score
    routed_scaling_factor: float | None = None
    scoring_func: str | None = None
    n_group: int | None = None
    topk_group: int | None = None
    sliding_window: int | None = None
    layer_pattern: str | None = None  # one period: L sliding or chunked, G global, X another kind; "G" = all global
    num_nextn_predict_layers: int | None = None
    nextn_dense: bool | None = None  # the next-token-prediction block has a dense MLP
    dtype: str | None = None
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    in_channels: int | None = None
    spatial_merge_size: int | None = None
    out_hidden_size: int | None = None
    window_size: int | None = None
    full_attention_layers: tuple[int, ...] | None = None


#: Field name -> "int", "float", "str", "bool" or "tuple[int, ...]", in the order of the dataclass.
FIELD_TYPES: dict[str, str] = {field.name: str(field.type).removesuffix(" | None") for field in fields(Architecture)}

#: Keys that only a mixture of experts has.
MIXTURE_KEYS = frozenset(
    {
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "shared_expert_intermediate_size",
        "shared_expert_gate",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "moe_layer_frequency",
        "norms_per_moe_layer",
        "router_bias",
        "routed_scaling_factor",
        "scoring_func",
        "n_group",
        "topk_group",
    }
)
#: Keys that only multi-head latent attention has, and keys that only the other kinds have.
LATENT_KEYS = frozenset({"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"})
HEAD_KEYS = frozenset({"num_key_value_heads", "head_dim"})


def from_config(config: Mapping[str, object]) -> dict[str, Architecture]:
    """Which architecture does a config.json describe?

    Returns {"model": ...} for a single part; {"text": ..., "vision": ..., "audio": ...} when the file has
    nested parts (`text_config`, `vision_config`, `audio_config`, or text keys beside a `vision_config`).
    Keys that config.json leaves out come from a small table of model types (configuration.MODEL_TYPES).

    Raises ConfigError, naming key, expected and found, for anything of the wrong type or size.
    Source: config.json as written by transformers 4 and 5.
    """
    return {name: Architecture(**normalise(part, name)) for name, part in parts(config).items()}  # type: ignore[arg-type]


def is_mixture(architecture: Architecture) -> bool | None:
    """Does the component route tokens to experts? None when the row is too empty to say."""
    if architecture.n_routed_experts:
        return True
    return False if architecture.intermediate_size is not None else None


def is_multi_head_latent(architecture: Architecture) -> bool | None:
    """Does the component use multi-head latent attention? None when the row is too empty to say."""
    if architecture.kv_lora_rank is not None:
        return True
    return False if architecture.num_key_value_heads is not None else None


def applies(architecture: Architecture, key: str) -> bool | None:
    """Can the component have this key at all? None when the row is too empty to say."""
    if key in MIXTURE_KEYS:
        return is_mixture(architecture)
    if key in LATENT_KEYS:
        return is_multi_head_latent(architecture)
    if key in HEAD_KEYS:
        latent = is_multi_head_latent(architecture)
        return None if latent is None else not latent
    return True


def attention_kind(architecture: Architecture) -> str | None:
    """Which kind of attention: "MLA", "MHA", "GQA", "MQA", or None when unknown?

    MLA whenever kv_lora_rank is set: its configs repeat the number of heads as num_key_value_heads, which a
    comparison of the two numbers takes for MHA (architecture-analysis.md, `analyze_attention`, corrected here).
    """
    if architecture.kv_lora_rank is not None:
        return "MLA"
    heads, shared = architecture.num_attention_heads, architecture.num_key_value_heads
    if heads is None or shared is None:
        return None
    if shared == heads:
        return "MHA"
    return "MQA" if shared == 1 else "GQA"


def expert_layout(architecture: Architecture) -> str | None:
    """How many routed and shared experts, as the seed tables write it: "128+1", "8"; None for a dense model."""
    if not architecture.n_routed_experts:
        return None
    shared = architecture.n_shared_experts
    return f"{architecture.n_routed_experts}+{shared}" if shared else str(architecture.n_routed_experts)


def moe_layout(architecture: Architecture) -> str | None:
    """The expert layout with the number of experts per token: "128+1 top-8"; None for a dense model."""
    layout = expert_layout(architecture)
    if layout is None or architecture.num_experts_per_tok is None:
        return layout
    return f"{layout} top-{architecture.num_experts_per_tok}"
