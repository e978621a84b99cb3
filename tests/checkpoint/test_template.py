from __future__ import annotations

import json
import math
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from checks.checkpoint import template
from checks.checkpoint.roles import CATEGORIES, Role, role_of
from checks.checkpoint.template import (
    LARGEST_COUNT,
    MISSING_NAMED,
    TEMPLATES,
    RoleAssignment,
    TemplateError,
    TensorRole,
    assign_roles,
    load,
)
from tests.checkpoint.tiny_models import (
    FAMILIES,
    FIXTURES,
    GATELESS,
    TEXT,
    WRAPPERS,
    build,
    edited,
    logits,
    matrices,
    part_of,
    sizes,
)

Shapes = dict[str, tuple[int, ...]]

#: Model types with a template that no tiny model stands for here, and why.
NOT_BUILT = {
    "AXK1": "the name in the hub's config.json; transformers calls it axk1",
    "exaone": "EXAONE 3.x is remote code; transformers 5.23 starts with exaone4",
    "kimi_k2": "remote code that is DeepSeek-V3; its text stands in transformers as deepseek_v3",
    "vaetki": "remote code; transformers 5.23 has no such model",
    "vlm": "the hub's name of hyperclovax_vision_v2",
    "qwen2_5_vl_text": "a part of qwen2_5_vl",
    "qwen2_5_vl_vision": "a part of qwen2_5_vl and hyperclovax_vision_v2",
    "exaone4_5_vision": "a part of exaone4_5",
    "siglip_vision_model": "a part of gemma3",
    "llama4_vision_model": "a part of llama4",
}


@dataclass(frozen=True)
class Written:
    """What transformers writes for a tiny model: config.json, and the shapes as released and as in memory."""

    config: dict[str, Any]
    saved: Shapes
    state: Shapes
    file: Path
    values: dict[str, torch.Tensor]  # of the state


def header(file: Path) -> Shapes:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    @cache
    def write(model_type: str) -> Written:
        model = build(model_type)
        directory = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(directory)
        state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        config = json.loads((directory / "config.json").read_text())
        file = directory / "model.safetensors"
        return Written(config, header(file), state, file, model.state_dict())

    return write


def label(role: TensorRole) -> str:
    """ "routed gate", "q", "v_bias": the part, and for an expert's whose."""
    return f"{role.layout.experts} {role.part}" if role.layout.experts else str(role.part)


def per_layer(roles: Mapping[str, TensorRole], component: str) -> dict[int | None, Counter[str]]:
    layers: dict[int | None, Counter[str]] = defaultdict(Counter)
    for role in roles.values():
        if role.component == component:
            layers[role.layer][label(role)] += 1
    return layers


STACKED = {"llama4_text", "gpt_oss", "dbrx"}  # released with the experts of a layer in one tensor


def routed(config: Mapping[str, Any], stacked: bool, model_type: str) -> Counter[str]:
    if model_type == "dbrx":
        return Counter({"routed gate": 1, "routed up": 1, "routed down": 1})
    if stacked:
        return Counter({"routed gate_up": 1, "routed down": 1})
    count = sizes(config).experts
    return Counter({"routed gate": count, "routed up": count, "routed down": count})


def matrix_shape(role: TensorRole, s: SimpleNamespace) -> tuple[int, ...] | None:
    """The shape [out, in] that a part must have, of one expert; None for the parts that this does not cover."""
    part, is_bias = str(role.part).removesuffix("_bias"), str(role.part).endswith("_bias")
    width = {"routed": s.moe, "shared": s.shared}.get(role.layout.experts, s.dense)
    q_head, v_head = (s.nope + s.rope, s.value) if s.kv_rank else (s.head, s.head)
    wide_norms = s.model_type in ("olmo2", "minimax_m2")
    matrices = {
        "embedding": (s.vocabulary, s.hidden),
        "position_embedding": (s.positions, s.hidden) if s.positions else None,
        "head": (s.vocabulary, s.hidden),
        "q": (s.heads * q_head, s.hidden),
        "k": (s.kv * s.head, s.hidden),
        "v": (s.kv * s.head, s.hidden),
        "qkv": ((s.heads + 2 * s.kv) * s.head, s.hidden),
        "o": (s.hidden, s.heads * v_head),
        "q_a": (s.q_rank, s.hidden),
        "q_b": (s.heads * q_head, s.q_rank),
        "kv_a": (s.kv_rank + s.rope, s.hidden),
        "kv_b": (s.heads * (s.nope + s.value), s.kv_rank),
        "gate": (width, s.hidden),
        "up": (width, s.hidden),
        "gate_up": (2 * width, s.hidden),
        "down": (s.hidden, width),
        "router": (s.experts, s.hidden),
        "router_correction": (s.experts,),
        "shared_expert_gate": (1, s.hidden),
        "sinks": (s.heads,),
        "q_norm": (s.heads * s.head if wide_norms else s.head,),
        "k_norm": (s.kv * s.head if wide_norms else s.head,),
        "q_a_norm": (s.q_rank,),
        "kv_a_norm": (s.kv_rank,),
    }
    norms = ("first_norm", "attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm", "final_norm")
    shape = matrices.get(part) or ((s.hidden,) if part in norms else None)
    return shape[:1] if shape and is_bias else shape


def unstacked(role: TensorRole, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """A stored shape as [out, in] of one expert."""
    if role.layout.stacked == "axis":
        assert shape[0] == experts
        shape = shape[1:]
    elif role.layout.stacked == "rows":
        shape = (shape[0] // experts, *shape[1:])
    return shape[::-1] if role.layout.transposed else shape


def check_complete(shapes: Shapes, assigned: RoleAssignment) -> None:
    """Every tensor has a role of its own, and none is missing."""
    assert assigned.inferred_because is None
    assert assigned.unassigned == ()
    assert (assigned.missing, assigned.missing_count, assigned.problems) == ((), 0, {})
    assert assigned.roles.keys() == shapes.keys()
    weights = [one for one in assigned.roles.values() if not one.companion_of]
    places = Counter((one.component, one.layer, label(one), one.expert) for one in weights)
    assert max(places.values()) == 1
    assert {role.category for role in assigned.roles.values()} <= set(CATEGORIES)


def test_every_template_is_built_or_says_why_not() -> None:
    known = {model_type for _, model_type in load()[1]}
    assert known == FAMILIES.keys() | NOT_BUILT.keys()
    in_transformers = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    assert not {"AXK1", "exaone", "kimi_k2", "vaetki", "vlm"} & in_transformers


@pytest.mark.parametrize("form", ["saved", "state"])
@pytest.mark.parametrize("model_type", TEXT)
def test_a_checkpoint_of_transformers(written: Callable[[str], Written], model_type: str, form: str) -> None:
    one = written(model_type)
    shapes: Shapes = getattr(one, form)
    assigned = assign_roles(shapes, one.config)
    check_complete(shapes, assigned)
    stacked = form == "state" or model_type in STACKED
    layers = per_layer(assigned.roles, "text")
    holds = FAMILIES[model_type]
    count = next(one.config[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if key in one.config)
    dense_layers = holds.get("dense_layers", [] if "sparse" in holds else range(count))
    assert layers.keys() == {None, *range(count)}
    for layer in range(count):
        expected = Counter([*holds["every"], *holds.get("dense" if layer in dense_layers else "sparse", ())])
        expected += Counter() if layer in dense_layers else routed(one.config, stacked, model_type)
        assert layers[layer] == expected, layer
    whole = {"embedding", "final_norm", *(["head"] if {"lm_head.weight", "embed_out.weight"} & shapes.keys() else [])}
    assert layers[None].keys() == whole | set(holds.get("model", ()))


@pytest.mark.parametrize("form", ["saved", "state"])
@pytest.mark.parametrize("model_type", TEXT)
def test_shapes_follow_from_the_configuration(written: Callable[[str], Written], model_type: str, form: str) -> None:
    one = written(model_type)
    shapes: Shapes = getattr(one, form)
    s = sizes(one.config)
    for name, role in assign_roles(shapes, one.config).roles.items():
        expected = matrix_shape(role, s)
        if role.part == "router_bias":
            expected = (s.experts,)
        assert expected is not None, name
        assert unstacked(role, shapes[name], s.experts) == expected, name


@pytest.mark.parametrize("form", ["saved", "state"])
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_model_with_a_vision_tower(written: Callable[[str], Written], model_type: str, form: str) -> None:
    one = written(model_type)
    shapes: Shapes = getattr(one, form)
    assigned = assign_roles(shapes, one.config)
    check_complete(shapes, assigned)
    text, vision = (one.config[f"{part}_config"] for part in ("text", "vision"))
    depth = vision.get("depth") or vision["num_hidden_layers"]
    assert per_layer(assigned.roles, "text").keys() == {None, *range(text["num_hidden_layers"])}
    towers = per_layer(assigned.roles, "vision")
    assert towers.keys() == {None, *range(depth)}
    assert len({frozenset(towers[layer].items()) for layer in range(depth)}) == 1
    for name, role in assigned.roles.items():
        expected = matrix_shape(role, sizes(vision if role.component == "vision" else text))
        if expected and role.part != "embedding" and role.component != "projector":
            assert unstacked(role, shapes[name], sizes(text).experts) == expected, name
    projectors = {role.part for role in assigned.roles.values() if role.component == "projector"}
    assert bool(projectors) == (model_type in ("gemma3", "hyperclovax_vision_v2", "llama4"))


@pytest.mark.parametrize("model_type", TEXT)
def test_norms_fold_into_what_reads_through_them(model_type: str) -> None:
    model, tensors, roles, s = edited(model_type)
    gains = {
        (role.layer, role.part): (tensors[name], role.layout.zero_centred)
        for name, role in roles.items()
        if role.category == "norm" and not str(role.part).endswith("_bias")
    }
    for gain, zero_centred in gains.values():
        gain.copy_(torch.rand_like(gain) + (-0.5 if zero_centred else 0.5))
    before = logits(model)
    used = set()
    for name, role in roles.items():
        reads = role.layout.residual == "reader" or role.part in ("q_b", "kv_b")
        if reads and role.layout.norm is not None:
            place = (None if role.part == "head" else role.layer, role.layout.norm)
            gain, zero_centred = gains[place]
            matrices(tensors[name], role, s.experts).mul_(gain + 1 if zero_centred else gain)
            used.add(place)
    for place in used:
        gain, zero_centred = gains[place]
        gain.fill_(0.0 if zero_centred else 1.0)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    after = {role.layout.norm for role in roles.values() if role.layout.residual == "writer"} - {None}
    unused = {part for _, part in gains.keys() - used}
    assert unused == after | ({"q_norm", "k_norm", "first_norm"} & {part for _, part in gains})


def single_parts(
    tensors: Mapping[str, torch.Tensor], roles: Mapping[str, TensorRole], s: SimpleNamespace
) -> dict[tuple[object, ...], torch.Tensor]:
    """Every part by itself: a stack of experts taken apart, gate and up of each taken apart."""
    found: dict[tuple[object, ...], torch.Tensor] = {}
    for name, role in roles.items():
        place = (role.component, role.layer, role.layout.experts)
        if not role.layout.stacked:
            found[*place, role.part, role.expert] = tensors[name]
            continue
        for part in role.layout.fused or (str(role.part),):
            rows = part_of(tensors[name], role, part, s)
            assert rows is not None
            found.update(((*place, part, expert), one) for expert, one in enumerate(rows))
    return found


# gpt-oss is not among them: it is released under the very names that it has in memory.
@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gpt_oss"}))
def test_released_names_and_names_in_memory_are_the_same_parts(
    written: Callable[[str], Written], model_type: str
) -> None:
    one = written(model_type)
    s = sizes(one.config.get("text_config", one.config))
    saved = single_parts(load_file(one.file), assign_roles(one.saved, one.config).roles, s)
    state = single_parts(one.values, assign_roles(one.state, one.config).roles, s)
    assert saved.keys() <= state.keys()
    assert {place[3] for place in state.keys() - saved.keys()} <= {"head"}  # tied, and so not stored
    for place, value in saved.items():
        assert torch.equal(value, state[place]), place


@pytest.mark.parametrize("model_type", sorted(set(TEXT) - set(GATELESS)))
def test_a_closed_gate_lets_nothing_of_up_through(model_type: str) -> None:
    model, tensors, roles, s = edited(model_type)
    gates = [part_of(tensors[name], role, "gate", s) for name, role in roles.items()]
    for gate in filter(lambda one: one is not None, gates):
        gate.zero_()
    before = logits(model)
    ups = [part_of(tensors[name], role, "up", s) for name, role in roles.items()]
    for up in filter(lambda one: one is not None, ups):
        up.normal_()
    assert sum(one is not None for one in gates) == sum(one is not None for one in ups) > 0
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["axk1", "exaone4", "gemma2", "gemma3_text", "hyperclovax", "olmo2"])
@pytest.mark.parametrize("norm", ["post_attention_norm", "post_mlp_norm"])
def test_a_norm_after_a_block_stands_behind_what_writes_through_it(model_type: str, norm: str) -> None:
    model, tensors, roles, _ = edited(model_type)
    writers = [name for name, role in roles.items() if role.layout.norm == norm]
    assert bool(writers) == (model_type != "axk1" or norm == "post_mlp_norm")
    for name, role in roles.items():
        if role.part == norm:
            tensors[name].fill_(-1.0 if role.layout.zero_centred else 0.0)
    before = logits(model)
    for name in writers:
        assert roles[name].layout.residual == "writer"
        tensors[name].normal_()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


LATENT_FAMILIES = {"axk1", "deepseek_v2", "deepseek_v3"}  # no key and value projections of their own


@pytest.mark.parametrize(
    ("model_type", "grown", "shrunk"),
    # gpt-oss adds one to what `up` gives, so that it cannot be scaled; the closed gate above tests it. Without a gate
    # `up` stands before an activation.
    [(one, "up", "down") for one in TEXT if one not in ("gpt_oss", *GATELESS)]
    + [(one, "v", "o") for one in TEXT if one not in LATENT_FAMILIES]
    + [(one, "q", "k") for one in TEXT if one not in LATENT_FAMILIES],
)
def test_parts_are_what_they_are_called(model_type: str, grown: str, shrunk: str) -> None:
    model, tensors, roles, s = edited(model_type)
    before = logits(model)
    found = Counter()
    for name, role in roles.items():
        for part, factor in ((grown, 2.0), (shrunk, 0.5)):
            rows = part_of(tensors[name], role, part, s)
            if rows is not None:
                rows.mul_(factor)
                found[part] += 1
    assert found[grown] == found[shrunk] > 0
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", sorted(set(TEXT) - {"bloom", "gpt2"}))
def test_rotary_rows_pair_as_the_layout_says(model_type: str) -> None:
    """Turning both rows of a rotary frequency, in queries and keys alike, leaves every attention score unchanged."""
    model, tensors, roles, s = edited(model_type)
    before = logits(model)
    rope = getattr(model.config, "rope_parameters", None) or {}
    turned = set()
    for name, role in roles.items():
        for part in ("q", "k", "q_b", "kv_a"):
            rows = part_of(tensors[name], role, part, s)
            if rows is None or str(role.part).endswith("_bias"):
                continue
            if s.kv_rank:
                size = s.rope
                heads = rows[s.kv_rank :] if part == "kv_a" else rows.view(s.heads, -1, rows.shape[-1])[:, s.nope :]
            else:
                size = int(s.head * rope.get("partial_rotary_factor", 1.0))
                heads = rows.view(-1, s.head, rows.shape[-1])[:, :size]
            even, odd = (
                (heads[..., 0::2, :], heads[..., 1::2, :])
                if role.layout.rope_layout == "interleaved"
                else (heads[..., : size // 2, :], heads[..., size // 2 :, :])
            )
            angles = torch.linspace(0.3, 1.1, size // 2, dtype=rows.dtype)[:, None]
            a, b = even.clone(), odd.clone()
            even.copy_(a * angles.cos() - b * angles.sin())
            odd.copy_(a * angles.sin() + b * angles.cos())
            turned.add(part)
    assert turned == ({"q_b", "kv_a"} if s.q_rank else {"q", "kv_a"} if s.kv_rank else {"q", "k"})
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


#: Shapes of published checkpoints under their released names: models.md, sections 1 and 6.
RELEASED: dict[str, Any] = json.loads((FIXTURES / "released.json").read_text())


def released(name: str, **changes: Any) -> tuple[Shapes, dict[str, Any]]:
    shapes = {
        pattern.format(layer=layer, expert=expert): tuple(shape)
        for group in RELEASED[name]["groups"]
        for layer in range(*group.get("layers", [1]))
        for expert in range(group.get("experts", 1))
        for pattern, shape in group["tensors"].items()
    }
    return shapes, {**RELEASED[name]["config"], **changes}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_checkpoint(name: str) -> None:
    shapes, config = released(name)
    check_complete(shapes, assign_roles(shapes, config))
    total, stated = sum(math.prod(shape) for shape in shapes.values()), RELEASED[name].get("parameters")
    # Exact where an inventory of the real checkpoint is known, else as far as the number is published.
    assert stated is None or total == stated or (isinstance(stated, float) and abs(total / stated - 1) < 1e-4)


@pytest.mark.parametrize(("name", "layer", "parts"), [("glm_air", 46, 6), ("deepseek_v3", 61, 6), ("k_exaone", 48, 4)])
def test_blocks_that_predict_further_tokens(name: str, layer: int, parts: int) -> None:
    shapes, config = released(name)
    roles = assign_roles(shapes, config).roles
    mtp = {one: role for one, role in roles.items() if role.component == "mtp" and not role.companion_of}
    assert {role.layer for role in mtp.values()} == {layer}
    own = {"enorm", "hnorm", "eh_proj", "mtp_norm", "mtp_head", "mtp_embedding"}
    assert sum(role.part in own for role in mtp.values()) == parts
    assert {"o", "attention_norm", "mlp_norm"} <= {role.part for role in mtp.values()}
    assert all((role.layer or 0) < layer for role in roles.values() if role.component == "text")
    if name == "k_exaone":
        assert sum(math.prod(shapes[one]) for one in mtp) == 528_513_280
        assert roles["mtp.layers.0.mlp.up_proj.weight"].kind == "up"
        assert roles["mtp.fc.weight"].part == "eh_proj"


def test_what_stands_beside_quantised_weights() -> None:
    roles = assign_roles(*released("deepseek_v3")).roles
    scale = roles["model.layers.5.mlp.experts.2.up_proj.weight_scale_inv"]
    assert (scale.companion_of, scale.category, scale.kind) == ("weight", "other", None)
    assert (scale.part, scale.layer, scale.expert) == ("up", 5, 2)
    roles = assign_roles(*released("gpt_oss_mxfp4")).roles
    blocks_of, scales = (roles[f"model.layers.0.mlp.experts.down_proj_{one}"] for one in ("blocks", "scales"))
    assert (blocks_of.packed, blocks_of.layout.transposed, blocks_of.category) == ("mxfp4", False, "routed expert")
    assert (scales.companion_of, scales.category) == ("down_proj", "other")
    packed = {"model.layers.0.mlp.up_proj.weight_packed": (8, 2), "model.layers.0.mlp.up_proj.weight_shape": (2,)}
    packed |= {"model.layers.1.mlp.up_proj.qweight": (2, 8), "model.layers.1.mlp.up_proj.scales": (1, 8)}
    roles = assign_roles(packed, {"model_type": "llama", "num_hidden_layers": 2}).roles
    assert [roles[name].packed for name in packed] == ["weight_packed", None, "qweight", None]
    assert [roles[name].companion_of for name in packed] == [None, "weight", None, "weight"]
    assert all(role.kind is None for role in roles.values())


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("", ""),
        ("model.language_model.", ""),
        ("language_model.model.", "language_model."),
        ("model.language_model.model.", "model.language_model."),
        ("model.language_model.", "model.language_model."),
        ("thinker.model.", "thinker."),
    ],
)
@pytest.mark.parametrize("known", ["tiny_llama", "tiny_qwen3_moe", "deepseek_v3", "exaone_3_5"])
def test_a_known_prefix_changes_no_role(known: str, body: str, head: str) -> None:
    shapes, config = released(known)
    base = "transformer." if config["model_type"] == "exaone" else "model."
    body = body.replace("model.model.", f"model.{base}").replace("thinker.model.", f"thinker.{base}")
    new = {name: (head + name if name.startswith("lm_head") else body + name.removeprefix(base)) for name in shapes}
    before = assign_roles(shapes, config)
    after = assign_roles({new[name]: shape for name, shape in shapes.items()}, config)
    assert (after.missing_count, after.problems, after.unassigned) == (0, {}, ())
    for name, role in before.roles.items():
        moved = after.roles[new[name]]
        assert TensorRole(**{**vars(moved), "stack": role.stack}) == role
        assert moved.stack == (new[name][: new[name].index(f".{role.layer}.") + 1] if role.stack else "")


@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", "model.vision_model.", "vision_tower.", ""])
def test_a_vision_tower_under_any_prefix_and_alone(written: Callable[[str], Written], prefix: str) -> None:
    one = written("qwen2_5_vl")
    tower = {name.removeprefix("visual."): shape for name, shape in one.saved.items() if name.startswith("visual.")}
    alone = assign_roles({prefix + name: shape for name, shape in tower.items()}, one.config["vision_config"])
    check_complete({prefix + name: shape for name, shape in tower.items()}, alone)
    assert {role.component for role in alone.roles.values()} == {"vision"}


def test_a_text_model_inside_an_unknown_wrapper() -> None:
    shapes, config = released("tiny_llama")
    inside = {f"language_model.{name}": shape for name, shape in shapes.items()} | {"tower.0.weight": (3, 3)}
    assigned = assign_roles(inside, {"model_type": "someones_vlm", "text_config": config})
    assert assigned.templates == {"text": "llama"}
    assert assigned.unassigned == ("tower.0.weight",)
    assert (assigned.missing_count, assigned.inferred_because) == (0, None)


def test_text_keys_beside_a_vision_config(written: Callable[[str], Written]) -> None:
    """As Qwen2.5-VL was released: no text_config, and the vision part named like the whole."""
    one = written("qwen2_5_vl")
    vision = {**one.config["vision_config"], "model_type": "qwen2_5_vl"}
    flat = {**one.config["text_config"], "model_type": "qwen2_5_vl", "vision_config": vision}
    check_complete(one.saved, assign_roles(one.saved, flat))


def test_a_role_stands_wherever_a_plain_role_does() -> None:
    for known in ("tiny_llama", "tiny_qwen3_moe", "mixtral", "qwen2_moe"):
        shapes, config = released(known)
        for name, role in assign_roles(shapes, config).roles.items():
            plain = role_of(name)
            assert isinstance(role, Role)
            assert {key: getattr(role, key) for key in vars(plain)} == vars(plain), name


def test_no_kind_for_what_cannot_be_read_as_it_stands(written: Callable[[str], Written]) -> None:
    for model_type in ("dbrx", "gpt_oss", "llama4_text", "mixtral"):
        one = written(model_type)
        for name, role in assign_roles(one.state, one.config).roles.items():
            assert role.kind is None or len(one.state[name]) == 2, name
            assert role.kind is None or not (role.layout.stacked or role.layout.transposed), name


def test_missing_tensors_are_named() -> None:
    shapes, config = released("tiny_qwen3_moe")
    gone = ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "lm_head.weight")
    for name in gone:
        del shapes[name]
    assigned = assign_roles(shapes, config)
    assert (set(assigned.missing), assigned.missing_count) == (set(gone), 3)
    assert assign_roles(shapes, config | {"tie_word_embeddings": True}).missing_count == 2
    assert assign_roles(*released("tiny_llama", attention_bias=True)).missing_count == 8
    assert assign_roles(*released("tiny_llama", num_hidden_layers=3)).missing_count == 9


def test_a_layer_less_in_the_configuration_is_reported() -> None:
    shapes, config = released("tiny_llama")
    assigned = assign_roles(shapes, config | {"num_hidden_layers": 1})
    assert len(assigned.problems) == 9
    assert "layer 1" in assigned.problems["model.layers.1.mlp.up_proj.weight"]
    assert set(assigned.problems) == set(assigned.unassigned)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model.layers.999999.mlp.up_proj.weight": (48, 32)}, "model.layers.999999.mlp.up_proj.weight"),
        ({"model.layers.0.mlp.experts.3.up_proj.weight": (20, 32)}, "model.layers.0.mlp.experts.3.up_proj.weight"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (4, 40, 32)}, "model.layers.0.mlp.experts.gate_up_proj"),
        ({"model.language_model.norm.weight": (32,)}, "model.norm.weight"),
        ({"model.language_model.norm.weight": (32,)}, "model.language_model.norm.weight"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (3, 40, 32)}, "model.layers.0.mlp.experts.0.up_proj.weight"),
        ({"model.norm.weight": (32, 32)}, "model.norm.weight"),
        ({"model.norm.weight": ()}, "model.norm.weight"),
    ],
)
def test_a_name_that_contradicts_the_configuration_has_no_role(change: Shapes, name: str) -> None:
    shapes, config = released("tiny_qwen3_moe")
    assigned = assign_roles(shapes | change, config)
    assert name in assigned.problems
    assert name in assigned.unassigned


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.\N{ARABIC-INDIC DIGIT ONE}.mlp.up_proj.weight",
        "model.layers.#.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
        f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj",
        "../model.norm.weight",
        "",
    ],
)
def test_a_name_that_only_resembles_a_pattern_has_no_role(name: str) -> None:
    shapes, config = released("tiny_llama")
    assert assign_roles(shapes | {name: (48, 32)}, config).unassigned == (name,)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3),
    max_leaves=5,
)
KEYS = ["num_hidden_layers", "num_experts", "n_routed_experts", "ffn_config", "text_config", "vision_config"]
KEYS += ["mlp_layer_types", "moe_layers", "moe_layer_freq", "first_k_dense_replace", "mlp_only_layers", "hidden_size"]
KEYS += ["decoder_sparse_step", "num_nextn_predict_layers", "tie_word_embeddings", "vocab_size", "q_lora_rank"]
WORDS = ["model", "layers", "0", "7", "999999", "mlp", "experts", "gate_proj", "up_proj", "weight", "bias"]
WORDS += ["mtp", "lm_head", "visual", "blocks", "attn", "#", "{layer}", "qweight", "weight_scale", "norm"]
NAMES = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=8).map(".".join)
SHAPE = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(
    shapes=st.dictionaries(NAMES, SHAPE, max_size=6),
    config=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6),
    model_type=st.sampled_from(sorted({model_type for _, model_type in load()[1]})) | JSON,
)
def test_nothing_in_a_checkpoint_raises(shapes: Shapes, config: dict[str, Any], model_type: object) -> None:
    assigned = assign_roles(shapes, config | {"model_type": model_type})
    assert set(assigned.unassigned) == shapes.keys() - assigned.roles.keys()
    assert assigned.roles.keys() <= shapes.keys()
    assert assigned.missing_count >= len(assigned.missing)
    for role in assigned.roles.values():
        assert role.category in CATEGORIES
        assert (role.layer or 0) <= 2 * LARGEST_COUNT
        assert (role.expert or 0) <= 999_999


@given(names=st.lists(NAMES, max_size=5))
def test_junk_beside_a_model_changes_nothing_of_it(names: list[str]) -> None:
    shapes, config = released("tiny_llama")
    junk = {f"junk.{name}": (1,) for name in names}
    assigned = assign_roles(shapes | junk, config)
    assert set(assigned.unassigned) == junk.keys()
    assert assigned.roles == assign_roles(shapes, config).roles


def test_a_hostile_configuration_ends_in_time() -> None:
    started = time.process_time()
    shapes, _ = released("tiny_qwen3_moe")
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LARGEST_COUNT, "num_experts": LARGEST_COUNT}
    assigned = assign_roles(shapes, config | {"mlp_only_layers": list(range(100_000))})
    assert len(assigned.missing) == MISSING_NAMED < assigned.missing_count
    assert assign_roles(shapes, config | {"num_hidden_layers": 10**18}).missing_count > 0
    assert time.process_time() - started < 10


def test_an_unknown_model_type_falls_back_on_names_and_shapes() -> None:
    shapes, config = released("tiny_llama")
    assigned = assign_roles(shapes, config | {"model_type": "someones_own"})
    assert "someones_own" in str(assigned.inferred_because)
    assert (assigned.templates, assigned.missing, assigned.unassigned) == ({}, (), ())
    for name, role in assigned.roles.items():
        plain = role_of(name)
        assert {key: getattr(role, key) for key in vars(plain)} == vars(plain)
    assert assigned.roles["model.layers.1.self_attn.v_proj.weight"].part == "v"
    assert assigned.roles["model.layers.1.mlp.down_proj.weight"].part == "down"


def test_the_fallback_reads_stacks_and_tables_from_shapes() -> None:
    stacks = {"layers.0.moe.experts.gate_up_proj": (3, 32, 40), "layers.0.moe.experts.down_proj": (3, 20, 32)}
    shapes = stacks | {"layers.1.moe.experts.gate_up_proj": (3, 40, 32), "lookup": (64, 32), "rest": (5, 5)}
    config = {"model_type": "someones_own", "hidden_size": 32, "vocab_size": 64}
    assigned = assign_roles(shapes, config)
    assert assigned.unassigned == ("rest",)
    assert assigned.roles["lookup"].category == "embedding"
    for name in stacks:
        layout = assigned.roles[name].layout
        assert (layout.stacked, layout.transposed, assigned.roles[name].kind) == ("axis", True, None)
    assert not assigned.roles["layers.1.moe.experts.gate_up_proj"].layout.transposed
    assert (
        "layer 1"
        in assign_roles(shapes, config | {"num_hidden_layers": 1}).problems["layers.1.moe.experts.gate_up_proj"]
    )


def test_names_that_do_not_follow_the_template_fall_back_too() -> None:
    shapes, config = released("tiny_llama")
    other = {name.replace("model.layers.", "stages.h."): shape for name, shape in shapes.items()}
    assigned = assign_roles(other, config)
    assert "3 of 21" in str(assigned.inferred_because)
    assert assigned.roles["stages.h.1.mlp.up_proj.weight"].kind == "up"


def test_without_a_configuration_the_names_count() -> None:
    shapes, _ = released("tiny_qwen3_moe")
    assigned = assign_roles(shapes, {"model_type": "qwen3_moe"})
    assert (assigned.missing_count, assigned.problems, assigned.unassigned) == (0, {}, ())


def test_a_hundred_thousand_names_take_less_than_two_seconds() -> None:
    shapes, config = released("kimi_k2")
    shapes |= {f"{name}_scale_inv": (1, 1) for name in list(shapes)[-30_000:] if name.endswith(".weight")}
    assert len(shapes) > 99_000
    load()
    started = time.process_time()
    assigned = assign_roles(shapes, config)
    assert time.process_time() - started < 2
    assert (assigned.unassigned, assigned.missing_count) == ((), 0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the shared files and one good template."""
    for name in ("common", "llama"):
        (tmp_path / f"{name}.json").write_text(
            (TEMPLATES / f"{name}.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
    return tmp_path


GOOD = {"model_types": ["own"], "source": "here", "tensors": {"a.weight": {"part": "embedding"}}}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", r"own\.json: cannot be read as JSON"),
        ("[]", r"own\.json: \$: \[\] is not of type 'object'"),
        ({"model_types": ["own"]}, "'source' is a required property"),
        (GOOD | {"extend": []}, "'extend' was unexpected"),
        (GOOD | {"extends": ["nobody"]}, r"own\.json: extends: 'nobody' is absent"),
        (GOOD | {"extends": ["own"]}, r"own\.json: extends: 'own' extends it"),
        (GOOD | {"model_types": ["llama"]}, r"own\.json: model_types: 'llama' also stands in llama\.json"),
        (GOOD | {"tensors": {"a.weight": {"part": "ears"}}}, r"own\.json: tensors: a\.weight: .* no part 'ears'"),
        (GOOD | {"tensors": {"a.weight": {"part": "q", "fused": ["x"]}}}, "no part 'x'"),
        (
            GOOD | {"tensors": {"a.weight": {"part": "q", "fuse": []}}},
            r"tensors\['a\.weight'\]: .*'fuse' was unexpected",
        ),
        (GOOD | {"tensors": {"a.weight": {"part": "q", "stacked": "up"}}}, "'up' is not one of"),
        (GOOD | {"tensors": {"a.{leyer}.weight": {"part": "q"}}}, "does not match"),
    ],
)
def test_a_broken_template_names_the_file_and_the_key(directory: Path, broken: object, message: str) -> None:
    (directory / "own.json").write_text(broken if isinstance(broken, str) else json.dumps(broken), encoding="utf-8")
    with pytest.raises(TemplateError, match=message):
        load(directory)


def test_a_directory_without_what_all_templates_share(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"common\.json"):
        load(tmp_path)


def test_a_good_template_loads(directory: Path) -> None:
    (directory / "own.json").write_text(json.dumps(GOOD), encoding="utf-8")
    _, by_type = load(directory)
    assert by_type["text", "own"].patterns[0].role.category == "embedding"


def test_two_patterns_with_one_name_are_an_error() -> None:
    patterns = load()[1]["text", "llama"].patterns
    short = [replace(one, name=one.name.removeprefix("model.")) for one in patterns]
    with pytest.raises(TemplateError, match=r"clash\.json: tensors: .* also fits"):
        template._table((template.Template("clash", (*patterns, *short), base="model."),))


def test_every_pattern_can_be_claimed() -> None:
    for one in load()[1].values():
        table = template._table((one,))
        for pattern in one.patterns:
            name = pattern.name.format(layer=3, expert=4, block=0)
            claim = template._claim(name, table)
            assert claim is not None, (one.name, name)
            assert claim[0].name == pattern.name, (one.name, name)
            assert claim[0].role.category in CATEGORIES


def test_matrices_of_one_mlp_share_a_place_and_no_others_do() -> None:
    for known in ("tiny_qwen3_moe", "qwen2_moe", "k_exaone"):
        roles = assign_roles(*released(known)).roles.values()
        found = Counter(role.mlp_place for role in roles if role.part in ("gate", "up", "down"))
        assert set(found.values()) == {3}
    assert ("mtp", 48, None, None) in found


def test_which_names_follow_a_template() -> None:
    shapes, config = released("tiny_qwen3_moe")
    known = template.follows_template(config)
    assert all(map(known, shapes))
    assert known("model.layers.7.mlp.experts.900.up_proj.weight_scale_inv")
    assert not known("model.layers.7.mlp.experts.up.up_proj.weight")
    assert not template.follows_template({"model_type": "someones_own"})("model.norm.weight")


def test_the_summary_of_a_checkpoint_that_fits() -> None:
    summary = assign_roles(*released("tiny_llama")).summary()
    nothing = {"count": 0, "tensors": []}
    assert summary == {
        "templates": {"text": "llama"},
        "inferred_because": None,
        "problems": {"count": 0, "tensors": {}},
        "missing": nothing,
        "unassigned": nothing,
    }


def test_scales_beside_a_stack_of_experts() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shapes = {name: (3, 40, 32), f"{name}_scale_inv": (3, 1, 1), f"{name}_scale": (3, 40, 1)}
    roles = assign_roles(shapes, {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 3}).roles
    assert {one.removeprefix(name): role.companion_of for one, role in roles.items()} == {
        "": None,
        "_scale_inv": "gate_up_proj",
        "_scale": "gate_up_proj",
    }


def test_what_configurations_call_the_numbers_of_heads() -> None:
    assert template.stated_count({"n_head": 12}, "heads", 0) == 12
    assert template.stated_count({"attn_config": {"kv_n_heads": 8}}, "key_heads", 3) == 8
    assert template.stated_count({"num_attention_heads": -1}, "heads", 3) == 3
    assert template.component_config({"text_config": {"a": 1}}, "text") == {"a": 1}
    assert template.component_config({"a": 1}, "text") == {"a": 1}
    assert template.component_config({"a": 1, "text_config": 3}, "vision") == {}
