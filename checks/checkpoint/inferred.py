"""Roles of tensors whose model type no template knows: by the conventions of names, and by shapes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from checks.checkpoint.roles import Layout, TensorRole, role_of

Shapes = Mapping[str, Sequence[int]]
Words = Mapping[str, Any]  # common.json
_MLP = frozenset({"gate", "up", "down", "gate_up"})
_FUSED = {"gate_up": ("gate", "up")}  # the gate comes first wherever both are stored together


def infer_roles(
    tensors: Shapes, common: Words, config: Mapping[str, Any], layers: int, problems: dict[str, str]
) -> dict[str, TensorRole]:
    """The role of every tensor whose name or shape says something.

    `common` holds the words of common.json, `layers` how many layers config.json states; a name beyond them gets an
    entry in `problems` and no role. What reads through which norm is only said of the plain arrangement: one norm
    before attention, one before the MLP, and no other on the residual stream.
    """
    roles: dict[str, TensorRole] = {}
    for name, shape in tensors.items():
        role = _infer(name, shape, common, config)
        if (role.layer or 0) >= layers and role.component != "mtp":
            problems[name] = f"layer {role.layer}; there are {layers}"
        elif role.category != "other" or role.companion_of:
            roles[name] = role
    return _with_norms(roles, common["parts"])


def largest_stack(roles: Iterable[TensorRole]) -> tuple[str, str]:
    """Component and name of the stack of layers with the most tensors; one of the text decoder goes first."""
    sizes = Counter((role.component, role.stack) for role in roles if role.layer is not None)
    return max(sizes, key=lambda one: (one[0] == "text", sizes[one]), default=("text", ""))


def _infer(name: str, shape: Sequence[int], common: Words, config: Mapping[str, Any]) -> TensorRole:
    stem, _, leaf = name.rpartition(".")
    packed, companion_of = (
        leaf if leaf in common["packed"] else None,
        "weight" if leaf in common["companions"] else None,
    )
    beside = packed or companion_of
    guess = dict(vars(role_of(f"{stem}.weight" if beside else name)))
    steps = name.split(".")
    component = next((known for step in steps if (known := common["inferred_components"].get(step))), "text")
    part = _part(steps, guess, shape, common)
    experts = next((one for one in ("routed", "shared") if guess["category"] == f"{one} expert"), None)
    layout = Layout(experts if part in _MLP else None, fused=_FUSED.get(str(part), ()))
    if len(shape) == 3 and experts == "routed" and not beside:
        rows, columns = shape[1:] if part != "down" else shape[:0:-1]
        transposed = rows == config.get("hidden_size") != columns
        layout, guess["kind"] = replace(layout, stacked="axis", transposed=transposed), None
    elif guess["category"] == "other" and len(shape) == 2 and shape[0] == config.get("vocab_size"):
        guess["category"] = "embedding"
    if beside:
        guess["kind"] = None
    if companion_of:
        guess["category"] = "other"
    return TensorRole(**guess, part=part, component=component, layout=layout, packed=packed, companion_of=companion_of)


def _part(steps: Sequence[str], guess: Mapping[str, Any], shape: Sequence[int], common: Words) -> str | None:
    """The part that a name's words stand for. Which norm it is, is told by the module that it belongs to."""
    category, is_bias = guess["category"], steps[-1] == "bias"
    if category == "norm":
        owner = steps[-2] if len(steps) > 1 and steps[-1] in ("weight", "bias") else steps[-1]
        part = common["inferred_norms"].get(owner)
        part = None if (part == "final_norm") != (guess["layer"] is None) else part
    elif category in ("embedding", "output", "router"):
        table = len(shape) == 2 and (category == "router") == (guess["layer"] is not None)
        part = {"embedding": "embedding", "output": "head", "router": "router"}[category] if table else None
        part = None if any("position" in step or step == "wpe" for step in steps) else part
    else:
        known = common["inferred_parts"]
        part = next((known[step] for step in reversed(steps) if step in known), guess["kind"])
    return f"{part}_bias" if part and is_bias else part


def _with_norms(roles: Mapping[str, TensorRole], parts: Mapping[str, Any]) -> dict[str, TensorRole]:
    """The same roles with what reads and writes the residual stream, where the norms are those of every Llama."""
    place = largest_stack(roles.values())
    main = {
        name: role for name, role in roles.items() if role.layer is not None and (role.component, role.stack) == place
    }
    norms: dict[int, set[str | None]] = defaultdict(set)
    for role in main.values():
        norms[role.layer or 0] |= {role.part} if role.category == "norm" else set()
    on_residual = [{one for one in layer if one is None or not one.endswith("_bias")} for layer in norms.values()]
    inside = {"q_norm", "k_norm", "q_a_norm", "kv_a_norm"}
    plain = bool(on_residual) and all(layer - inside == {"attention_norm", "mlp_norm"} for layer in on_residual)
    function = "layer" if any("attention_norm_bias" in layer for layer in norms.values()) else "rms"
    through = {"attention": "attention_norm", "mlp": "mlp_norm", "mixture": "mlp_norm", "head": "final_norm"}
    found: dict[str, TensorRole] = {}
    for name, role in roles.items():
        facts = parts.get(str(role.part), {})
        if role.category == "norm" and not str(role.part).endswith("_bias"):
            layout = replace(role.layout, norm_function=function)
        elif plain and (name in main or role.layer is None) and not role.companion_of:
            reads = facts.get("residual") == "reader"
            norm = through.get(facts.get("block", "")) if reads else facts.get("norm")
            layout = replace(role.layout, residual=facts.get("residual"), norm=norm)
        else:
            layout = role.layout
        found[name] = replace(role, layout=layout)
    return found
