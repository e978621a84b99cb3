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
_WRITERS = frozenset({"down", "o"})
_PROJECTIONS = frozenset({"q", "k", "v", "qkv", "o"}) | _MLP


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
    roles |= _turned(roles, tensors, common, config)
    roles |= _gates_within_up(roles, tensors)
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
        transposed = rows == _width(common, config) != columns
        layout, guess["kind"] = replace(layout, stacked="axis", transposed=transposed), None
    elif guess["category"] == "other" and len(shape) == 2 and shape[0] == config.get("vocab_size"):
        guess["category"] = "embedding"
    elif guess["category"] == "other" and part in common["parts"]:
        guess["category"] = common["parts"][part]["category"]
    if part in ("gate", "up", "down") and leaf == "weight" and layout.stacked is None:
        guess["kind"] = part
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
        known, blocks = common["inferred_parts"], common["inferred_blocks"]
        block = next((blocks[step] for step in reversed(steps) if step in blocks), None)
        if block is not None and guess["layer"] is not None:
            known = known | common["inferred_parts_of"][block]
        kind = role_of(".".join([*steps[:-1], "weight"])).kind if is_bias else guess["kind"]
        part = next((known[step] for step in reversed(steps) if step in known), kind)
    return f"{part}_bias" if part and is_bias else part


def _width(common: Words, config: Mapping[str, Any]) -> object:
    """The width of the text decoder's residual stream that a configuration states."""
    inner = config.get(common["components"]["text"]["config"])
    own = inner if isinstance(inner, Mapping) else config
    return next((own[key] for key in common["config"]["width"] if own.get(key)), None)


def _turned(
    roles: Mapping[str, TensorRole], tensors: Shapes, common: Words, config: Mapping[str, Any]
) -> dict[str, TensorRole]:
    """The projections of a text decoder that stores them [in, out], as GPT-2's: all matrices of its MLPs show it."""
    width = _width(common, config)
    stacks: dict[tuple[str, str], dict[str, TensorRole]] = defaultdict(dict)
    for name, role in roles.items():
        plain = len(tensors[name]) == 2 and not (role.packed or role.companion_of)
        if role.part in _PROJECTIONS and role.layer is not None and role.component in ("text", "mtp") and plain:
            stacks[role.component, role.stack][name] = role
    found: dict[str, TensorRole] = {}
    for stack in stacks.values():
        # The side of each MLP matrix that is the residual stream's: True for the one that is [in, out].
        sides = [
            tensors[name][role.part in _WRITERS] == width
            for name, role in stack.items()
            if role.part in _MLP and width in tensors[name] and tensors[name][0] != tensors[name][1]
        ]
        if sides and all(sides):
            found |= {
                name: replace(role, kind=None, layout=replace(role.layout, transposed=True))
                for name, role in stack.items()
            }
    return found


def _gates_within_up(roles: Mapping[str, TensorRole], tensors: Shapes) -> dict[str, TensorRole]:
    """What is called `up` and has two rows for each unit of `down` holds the gate as well, as ChatGLM's."""
    mlps: dict[tuple[object, ...], dict[str | None, str]] = defaultdict(dict)
    for name, role in roles.items():
        if role.part in _MLP and len(tensors[name]) == 2 and not (role.packed or role.companion_of):
            mlps[role.stack, *role.mlp_place][role.part] = name
    found: dict[str, TensorRole] = {}
    for parts in mlps.values():
        if parts.keys() != {"up", "down"}:
            continue
        up = roles[parts["up"]]
        units = tensors[parts["down"]][not up.layout.transposed]
        if tensors[parts["up"]][up.layout.transposed] == 2 * units:
            layout = replace(up.layout, fused=_FUSED["gate_up"])
            found[parts["up"]] = replace(up, part="gate_up", kind=None, layout=layout)
    return found


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
