"""Every tensor that transformers writes for a tiny model of each family has its role."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from checks.checkpoint.template import TensorRole, assign_roles, load
from tests.checkpoint.template_shapes import Shapes, check_complete, per_layer
from tests.checkpoint.tiny_models import FAMILIES, TEXT, WRAPPERS, build, part_of, sizes

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


@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", "model.vision_model.", "vision_tower.", ""])
def test_a_vision_tower_under_any_prefix_and_alone(written: Callable[[str], Written], prefix: str) -> None:
    one = written("qwen2_5_vl")
    tower = {name.removeprefix("visual."): shape for name, shape in one.saved.items() if name.startswith("visual.")}
    alone = assign_roles({prefix + name: shape for name, shape in tower.items()}, one.config["vision_config"])
    check_complete({prefix + name: shape for name, shape in tower.items()}, alone)
    assert {role.component for role in alone.roles.values()} == {"vision"}


def test_text_keys_beside_a_vision_config(written: Callable[[str], Written]) -> None:
    """As Qwen2.5-VL was released: no text_config, and the vision part named like the whole."""
    one = written("qwen2_5_vl")
    vision = {**one.config["vision_config"], "model_type": "qwen2_5_vl"}
    flat = {**one.config["text_config"], "model_type": "qwen2_5_vl", "vision_config": vision}
    check_complete(one.saved, assign_roles(one.saved, flat))


def test_no_kind_for_what_cannot_be_read_as_it_stands(written: Callable[[str], Written]) -> None:
    for model_type in ("dbrx", "gpt_oss", "llama4_text", "mixtral"):
        one = written(model_type)
        for name, role in assign_roles(one.state, one.config).roles.items():
            assert role.kind is None or len(one.state[name]) == 2, name
            assert role.kind is None or not (role.layout.stacked or role.layout.transposed), name


VARIANTS: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi": {"qk_layernorm": True},
    "starcoder2": {"use_bias": False, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("model_type", VARIANTS)
def test_a_variant_of_a_family(model_type: str) -> None:
    model = build(model_type, **VARIANTS[model_type])
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assigned = assign_roles(shapes, json.loads(model.config.to_json_string(use_diff=False)))
    check_complete(shapes, assigned)
    parts = {role.part for role in assigned.roles.values()}
    assert ("q_norm_bias" in parts) == (model_type == "phi")
    assert ({"embedding_projection", "head_projection"} <= parts) == (model_type == "opt")
    assert ("q_bias" in parts) == (model_type != "starcoder2")


@pytest.mark.parametrize("key", ["do_layer_norm_before", "layer_norm_elementwise_affine"])
def test_nothing_is_read_through_a_norm_that_is_not_there_or_stands_behind(key: str) -> None:
    """OPT-350m has its norms on the residual stream itself, Galactica has none that is stored."""
    for value, through in ((True, {"attention_norm", "mlp_norm", "final_norm", None}), (False, {None})):
        model = build("opt", **{key: value, "tie_word_embeddings": False})
        shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
        assigned = assign_roles(shapes, json.loads(model.config.to_json_string(use_diff=False)))
        assert (assigned.missing_count, assigned.unassigned, assigned.inferred_because) == (0, (), None)
        assert {role.layout.norm for role in assigned.roles.values()} == through
