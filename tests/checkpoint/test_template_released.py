"""Names and shapes of checkpoints as they were released."""

from __future__ import annotations

import math

import pytest

from checks.checkpoint.roles import Role, role_of
from checks.checkpoint.template import TensorRole, assign_roles
from tests.checkpoint.template_shapes import RELEASED, check_complete, released


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


def test_a_text_model_inside_an_unknown_wrapper() -> None:
    shapes, config = released("tiny_llama")
    inside = {f"language_model.{name}": shape for name, shape in shapes.items()} | {"tower.0.weight": (3, 3)}
    assigned = assign_roles(inside, {"model_type": "someones_vlm", "text_config": config})
    assert assigned.templates == {"text": "llama"}
    assert assigned.unassigned == ("tower.0.weight",)
    assert (assigned.missing_count, assigned.inferred_because) == (0, None)


def test_a_role_stands_wherever_a_plain_role_does() -> None:
    for known in ("tiny_llama", "tiny_qwen3_moe", "mixtral", "qwen2_moe"):
        shapes, config = released(known)
        for name, role in assign_roles(shapes, config).roles.items():
            plain = role_of(name)
            assert isinstance(role, Role)
            assert {key: getattr(role, key) for key in vars(plain)} == vars(plain), name
