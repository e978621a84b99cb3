"""How many parameters does a row of the catalogue make? An independent check of the whole row."""

from __future__ import annotations

from dataclasses import dataclass

from checks.catalog.architecture import Architecture, is_mixture


class UncountableError(ValueError):
    """The row lacks keys that the count needs."""

    def __init__(self, missing: tuple[str, ...], reason: str = "") -> None:
        text = f"cannot count the parameters: {', '.join(missing)} unknown" if missing else reason
        super().__init__(text)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of one component, in units.

    total: every tensor but the next-token-prediction (MTP) block.
    active: what one token uses: total without the routed experts that are not selected. The embedding table and the
        output head count once each in full, although a token reads one row of the former: the usual convention.
        Publishers differ, so `embedding` and `head` are given to be taken off.
    next_token_prediction: the MTP block, without its copies of embedding and head; 0 when there is none,
        None when the row does not say whether its MLP is dense.
    """

    total: int
    active: int
    embedding: int
    head: int
    next_token_prediction: int | None


def count(architecture: Architecture) -> ParameterCount:
    """How many parameters, in total and per token, does this architecture have?

    Sum over layers of attention (grouped-query or latent; biases, query and key norms, sinks), the dense MLP or
    the router with its routed and shared experts, and the norms; plus embedding, final norm and output head.
    A vision tower (it has a patch_size) is counted as Qwen2.5-VL's, patch merger included.

    Raises UncountableError naming the missing keys; nothing is guessed.
    Source: shapes in the modelling code of transformers 5.23.0 for each model type.
    """
    if architecture.patch_size is not None:
        return _vision(architecture)
    _need(
        architecture,
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "tie_word_embeddings",
        "norm",
        "norms_per_layer",
        "attention_bias",
        "mlp_bias",
        "mlp_gated",
    )
    if architecture.layer_pattern is not None and "X" in architecture.layer_pattern:
        raise UncountableError((), "cannot count the parameters: some layers are neither sliding nor full attention")
    hidden = architecture.hidden_size or 0
    layers = architecture.num_hidden_layers or 0
    norm = _norm(architecture)
    embedding = (architecture.vocab_size or 0) * hidden
    head = 0 if architecture.tie_word_embeddings else embedding
    head += (architecture.vocab_size or 0) if architecture.lm_head_bias else 0
    per_layer = _attention(architecture) + (architecture.norms_per_layer or 0) * norm
    shared_by_all = embedding + head + norm + layers * per_layer
    if not is_mixture(architecture):
        total = shared_by_all + layers * _dense(architecture)
        return ParameterCount(total, total, embedding, head, _next_token(architecture, per_layer, None, norm))

    mixtures, dense = _layers_by_kind(architecture)
    always, expert = _mixture(architecture)
    fixed = shared_by_all + mixtures * always
    fixed += dense * _dense(architecture) if dense else 0
    fixed += mixtures * _extra_norms(architecture) * norm
    total = fixed + mixtures * (architecture.n_routed_experts or 0) * expert
    active = fixed + mixtures * (architecture.num_experts_per_tok or 0) * expert
    whole = always + (architecture.n_routed_experts or 0) * expert
    return ParameterCount(total, active, embedding, head, _next_token(architecture, per_layer, whole, norm))


def _need(architecture: Architecture, *keys: str) -> None:
    missing = tuple(key for key in keys if getattr(architecture, key) is None)
    if missing:
        raise UncountableError(missing)


def _norm(architecture: Architecture) -> int:
    return (architecture.hidden_size or 0) * (2 if architecture.norm_bias else 1)


def _linear(inputs: int, outputs: int, bias: bool | None) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _attention(architecture: Architecture) -> int:
    hidden, heads = architecture.hidden_size or 0, architecture.num_attention_heads or 0
    sinks = heads if architecture.attention_sinks else 0
    if architecture.kv_lora_rank is not None:
        return _latent_attention(architecture) + sinks
    _need(architecture, "num_key_value_heads", "head_dim", "qk_norm", "attention_output_bias")
    size = architecture.head_dim or 0
    queries, keys = heads * size, (architecture.num_key_value_heads or 0) * size
    bias = architecture.attention_bias
    projections = _linear(hidden, queries, bias) + 2 * _linear(hidden, keys, bias)
    return projections + _linear(queries, hidden, architecture.attention_output_bias) + _qk_norms(architecture) + sinks


def _qk_norms(architecture: Architecture) -> int:
    if not architecture.qk_norm:
        return 0
    _need(architecture, "qk_norm_shape")
    size = architecture.head_dim or 0
    heads = (architecture.num_attention_heads or 0) + (architecture.num_key_value_heads or 0)
    return {"head": 2 * size, "all": heads * size}.get(architecture.qk_norm_shape or "", 0)


def _latent_attention(architecture: Architecture) -> int:
    _need(architecture, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_output_bias")
    hidden, heads = architecture.hidden_size or 0, architecture.num_attention_heads or 0
    without, rotary = architecture.qk_nope_head_dim or 0, architecture.qk_rope_head_dim or 0
    value, latent, bias = architecture.v_head_dim or 0, architecture.kv_lora_rank or 0, architecture.attention_bias
    query = heads * (without + rotary)
    if architecture.q_lora_rank is None:
        queries = hidden * query
    else:
        rank = architecture.q_lora_rank
        queries = _linear(hidden, rank, bias) + rank + rank * query  # down, norm, up
    keys = _linear(hidden, latent + rotary, bias) + latent + latent * heads * (without + value)
    return queries + keys + _linear(heads * value, hidden, architecture.attention_output_bias)


def _mlp(architecture: Architecture, width: int) -> int:
    hidden, bias = architecture.hidden_size or 0, architecture.mlp_bias
    return (2 if architecture.mlp_gated else 1) * _linear(hidden, width, bias) + _linear(width, hidden, bias)


def _dense(architecture: Architecture) -> int:
    width = architecture.dense_intermediate_size or architecture.intermediate_size
    if width is None:
        raise UncountableError(("intermediate_size",))
    return _mlp(architecture, width)


def _mixture(architecture: Architecture) -> tuple[int, int]:
    """Parameters of one mixture layer that every token uses, and of one routed expert."""
    _need(architecture, "moe_intermediate_size", "num_experts_per_tok", "n_shared_experts", "router_bias")
    hidden, routed = architecture.hidden_size or 0, architecture.n_routed_experts or 0
    width, shared = architecture.moe_intermediate_size or 0, architecture.n_shared_experts or 0
    always = _linear(hidden, routed, architecture.router_bias)
    if shared:
        always += _mlp(architecture, architecture.shared_expert_intermediate_size or shared * width)
        always += hidden if architecture.shared_expert_gate else 0
    return always, _mlp(architecture, width)


def _layers_by_kind(architecture: Architecture) -> tuple[int, int]:
    """How many mixture layers and how many dense layers."""
    _need(architecture, "first_k_dense_replace", "moe_layer_frequency")
    layers = architecture.num_hidden_layers or 0
    after = max(0, layers - (architecture.first_k_dense_replace or 0))
    mixtures = after // (architecture.moe_layer_frequency or 1)
    return mixtures, layers - mixtures


def _extra_norms(architecture: Architecture) -> int:
    if architecture.norms_per_moe_layer is None:
        return 0
    return architecture.norms_per_moe_layer - (architecture.norms_per_layer or 0)


def _next_token(architecture: Architecture, per_layer: int, mixture: int | None, norm: int) -> int | None:
    """The MTP block: one layer, a projection of two hidden states to one, and three norms."""
    blocks = architecture.num_nextn_predict_layers
    if not blocks:
        return 0
    if mixture is not None and architecture.nextn_dense is None:
        return None
    mlp = _dense(architecture) if mixture is None or architecture.nextn_dense else mixture
    hidden = architecture.hidden_size or 0
    return blocks * (per_layer + mlp + 2 * hidden * hidden + 3 * norm)


def _vision(architecture: Architecture) -> ParameterCount:
    """Qwen2.5-VL's vision tower: patch embedding, blocks with a fused qkv, patch merger."""
    if architecture.model_type not in ("qwen2_5_vl", "qwen2_5_vl_vision"):
        raise UncountableError((), f"no count for a vision tower of type {architecture.model_type!r}")
    _need(
        architecture,
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "in_channels",
        "temporal_patch_size",
        "spatial_merge_size",
        "out_hidden_size",
        "attention_bias",
        "attention_output_bias",
        "mlp_bias",
        "mlp_gated",
    )
    hidden, patch = architecture.hidden_size or 0, architecture.patch_size or 0
    pixels = (architecture.in_channels or 0) * (architecture.temporal_patch_size or 0) * patch * patch
    block = 2 * hidden + _linear(hidden, 3 * hidden, architecture.attention_bias)
    block += _linear(hidden, hidden, architecture.attention_output_bias)
    block += _mlp(architecture, architecture.intermediate_size or 0)
    merged = hidden * (architecture.spatial_merge_size or 0) ** 2
    merger = hidden + _linear(merged, merged, True) + _linear(merged, architecture.out_hidden_size or 0, True)
    total = pixels * hidden + (architecture.num_hidden_layers or 0) * block + merger
    return ParameterCount(total, total, pixels * hidden, 0, 0)
