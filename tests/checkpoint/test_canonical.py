from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checks.checkpoint.canonical import (
    CanonicalModel,
    Mlp,
    MlpPlace,
    latent_key_value,
    latent_query,
    latent_rotary_key,
)
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.template import TensorRole, assign_roles
from tests.checkpoint.tiny_models import FAMILIES, TEXT, WRAPPERS, build, edited, logits, part_of, sizes

Tensors = dict[str, torch.Tensor]
MLP_PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Checkpoint:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return Checkpoint(directory)


def stored(directory: Path, model: Any, form: str) -> Checkpoint:
    """The model as transformers writes it ("saved"), or under the names that it has in memory ("state")."""
    if form == "saved":
        model.save_pretrained(directory)
        return Checkpoint(directory)
    floating = {name: one for name, one in model.state_dict().items() if one.is_floating_point()}
    if model.config.tie_word_embeddings:
        floating.pop("lm_head.weight")
    return write(directory, floating, json.loads(model.config.to_json_string(use_diff=False)))


class DividesByRms(torch.nn.Module):
    """A norm without gains behind a matrix that holds them: it divides by what the unfolded matrix gave."""

    def __init__(self, gain: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = gain, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x / self.gain).square().mean(-1, keepdim=True) + self.eps)


def canonical_part(model: CanonicalModel, role: TensorRole, part: str) -> list[torch.Tensor]:
    """A folded part, of every expert if the tensor with this role holds all of them."""
    if part not in MLP_PARTS:
        return [model.folded(part, role.layer)]
    kind = role.layout.experts or "dense"
    places = [one for one in model.mlps(role.layer or 0) if one.kind == kind]
    if kind == "routed" and not role.layout.stacked:
        places = [one for one in places if one.expert == role.expert]
    return [getattr(model.mlp(place, folded=True), part) for place in places]


def write_back(model: CanonicalModel, into: Any, roles: Mapping[str, TensorRole], config: Mapping[str, Any]) -> None:
    """Every matrix of a transformers model from the canonical one, every norm on the residual stream without gains."""
    tensors, s = into.state_dict(), sizes(config)
    text = {name: role for name, role in roles.items() if role.component == "text"}
    through = {role.layout.norm for role in text.values()} - {None}
    behind = {role.layout.norm for role in text.values() if role.layout.residual == "writer"} - {None}
    for name, role in text.items():
        if role.part in through:
            if role.part in behind:
                module = into.get_submodule(name.removesuffix(".weight"))
                eps = getattr(module, "variance_epsilon", None) or module.eps
                into.set_submodule(name.removesuffix(".weight"), DividesByRms(model.gain(role.part, role.layer), eps))
            else:
                tensors[name].fill_(0.0 if role.layout.zero_centred else 1.0)
        elif tensors[name].dim() > 1 and role.part != "position_embedding" and role.category != "bias":
            tensors[name].fill_(torch.nan)  # what is not written below shows
            for part in role.layout.fused or (str(role.part),):
                rows = part_of(tensors[name], role, part, s)
                assert rows is not None
                found = canonical_part(model, role, part)
                for view, matrix in zip(rows if role.layout.stacked else [rows], found, strict=True):
                    view.copy_(matrix.reshape(view.shape))


def with_gains(model: Any, config: Mapping[str, Any]) -> dict[str, TensorRole]:
    """Norms far from one, biases of norms zero; the roles of the model's tensors."""
    tensors = {name: one for name, one in model.state_dict().items() if one.is_floating_point()}
    roles = dict(assign_roles({name: tuple(one.shape) for name, one in tensors.items()}, config).roles)
    for name, role in roles.items():
        if role.category == "norm" and not str(role.part).endswith("_bias"):
            tensors[name].copy_(torch.rand_like(tensors[name]) + (-0.5 if role.layout.zero_centred else 0.5))
    return roles


@pytest.mark.parametrize("form", ["saved", "state"])
@pytest.mark.parametrize("model_type", TEXT)
def test_written_back_without_norms_the_logits_are_the_same(tmp_path: Path, model_type: str, form: str) -> None:
    model, _, _, _ = edited(model_type)
    config = json.loads(model.config.to_json_string(use_diff=False))
    roles = with_gains(model, config)
    before = logits(model)
    canonical = CanonicalModel(stored(tmp_path, model, form))
    write_back(canonical, model, roles, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    assert canonical.unfolded_because is None
    assert canonical.hidden_size == 32
    assert canonical.layers == tuple(range(len(canonical.layers)))


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_text_decoder_of_a_model_with_a_vision_tower(tmp_path: Path, model_type: str) -> None:
    model = build(model_type, tie_word_embeddings=False).eval()
    for name, value in model.state_dict().items():
        if value.dim() > 1 and value.is_floating_point():
            value.normal_(0, 0.25)
        elif name.endswith("bias"):
            value.zero_()
    config = json.loads(model.config.to_json_string(use_diff=False))
    roles = with_gains(model, config)
    before = logits(model)
    checkpoint = stored(tmp_path, model, "saved")
    canonical = CanonicalModel(checkpoint)
    write_back(canonical, model, roles, config["text_config"])
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)

    vision = CanonicalModel(checkpoint, component="vision")
    assert (vision.component, vision.hidden_size, vision.layers) == ("vision", 16, (0, 1))
    assert {"q", "k", "v", "o"} <= vision.parts(1)
    norm = vision.gain("attention_norm", 1)
    plain = vision.matrix("q", 1) * norm
    plain = plain - plain.mean(1, keepdim=True) if model_type in ("gemma3", "llama4") else plain
    torch.testing.assert_close(vision.folded("q", 1), plain)
    assert vision.mlp(vision.mlps(1)[0]).down.shape[0] == 16


@pytest.mark.parametrize("model_type", ["bloom", "dbrx", "gpt2", "gpt_neox", "opt", "phi", "phimoe", "starcoder2"])
def test_readers_through_a_layer_norm_are_centred(tmp_path: Path, model_type: str) -> None:
    """The LayerNorm of the model would hide a lack of it: what it gives has no mean to be read."""
    model = build(model_type)
    with_gains(model, json.loads(model.config.to_json_string(use_diff=False)))
    canonical = CanonicalModel(stored(tmp_path, model, "saved"))
    place = canonical.mlps(0)[0]
    for matrix in (canonical.folded("q", 0), canonical.mlp(place, folded=True).up, canonical.folded("head")):
        torch.testing.assert_close(matrix.sum(1), torch.zeros(len(matrix)), rtol=0, atol=1e-5)
    assert canonical.matrix("q", 0).sum(1).abs().max() > 1e-3
    biases = model_type != "dbrx"
    assert any("biases of norms are left out" in note for note in canonical.notes) == biases


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "llama"])
def test_a_tied_head_is_a_folded_copy_of_the_embedding(tmp_path: Path, model_type: str) -> None:
    model = build(model_type, tie_word_embeddings=True)
    with_gains(model, json.loads(model.config.to_json_string(use_diff=False)))
    canonical = CanonicalModel(stored(tmp_path, model, "saved"))
    embedding = model.get_input_embeddings().weight.detach()
    assert not canonical.has("head")
    assert torch.equal(canonical.head(), embedding)
    assert torch.equal(canonical.matrix("head"), embedding)
    expected = embedding * canonical.gain("final_norm")
    expected = expected - expected.mean(1, keepdim=True) if model_type == "gpt2" else expected
    torch.testing.assert_close(canonical.folded("head"), expected)
    assert torch.equal(canonical.folded("embedding"), embedding)
    some = torch.tensor([63, 0, 7, 7])
    assert torch.equal(canonical.head(some), embedding[some])


def llama(directory: Path, layers: int = 2, **changes: Any) -> tuple[Checkpoint, Tensors]:
    """A Llama with 4 query heads, 2 key heads of size 8, width 32 and 48 hidden units."""
    torch.manual_seed(3)
    shapes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    tensors = {"model.embed_tokens.weight": torch.randn(64, 32), "lm_head.weight": torch.randn(64, 32)}
    tensors["model.norm.weight"] = torch.rand(32) + 0.5
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}self_attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        tensors |= {f"{at}{name}_layernorm.weight": torch.rand(32) + 0.5 for name in ("input", "post_attention")}
        tensors |= {f"{at}mlp.{name}_proj.weight": torch.randn(48, 32) for name in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = torch.randn(32, 48)
    config = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 64, "hidden_size": 32}
    return write(directory, tensors, config | changes), tensors


def test_the_parts_of_a_llama(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path)
    model = CanonicalModel(checkpoint)
    assert (model.component, model.hidden_size, model.layers) == ("text", 32, (0, 1))
    assert model.parts(1) == {"q", "k", "v", "o", "attention_norm", "mlp_norm"}
    assert model.parts(7) == frozenset()
    assert model.matrix("k", 1).shape == (16, 32)  # key heads that query heads share stand once
    assert torch.equal(model.matrix("q", 0), tensors["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(model.gain("mlp_norm", 1), tensors["model.layers.1.post_attention_layernorm.weight"])
    place = MlpPlace(1, "dense", None, 48, True, 3 * 48 * 32)
    assert model.mlps(1) == (place,)
    assert place.key == (1, "dense", None)
    mlp = model.mlp(place)
    assert torch.equal(mlp.down, tensors["model.layers.1.mlp.down_proj.weight"])
    assert model.has("o", 0)
    assert not model.has("o", 2)
    assert model.notes == ()
    for part, layer in (("q", 2), ("sinks", 0), ("attention_norm", 0), ("q_bias", 0), ("up", None)):
        with pytest.raises(KeyError):
            model.matrix(part, layer)
    with pytest.raises(KeyError, match="no norm"):
        model.gain("q", 0)
    with pytest.raises(KeyError):
        model.mlp(MlpPlace(1, "routed", 0, 48, True, 0))


def test_what_is_returned_may_be_changed(tmp_path: Path) -> None:
    model = CanonicalModel(llama(tmp_path)[0])
    before = model.folded("q", 0)
    model.gain("attention_norm", 0).zero_()
    model.matrix("q", 0).zero_()
    assert torch.equal(model.folded("q", 0), before)


@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss", "mixtral", "dbrx", "phi3", "gpt2"])
def test_chosen_hidden_units(tmp_path: Path, model_type: str) -> None:
    model = CanonicalModel(stored(tmp_path, edited(model_type)[0], "saved"))
    place = model.mlps(1)[-1]
    rows = torch.tensor([5, 0, 17])
    for folded in (False, True):
        whole, some = model.mlp(place, folded), model.mlp(place, folded, rows)
        torch.testing.assert_close(some.up, whole.up[rows])
        torch.testing.assert_close(some.down, whole.down[:, rows])
        if whole.gate is not None and some.gate is not None:
            torch.testing.assert_close(some.gate, whole.gate[rows])
        assert (some.gate is None) == (not place.has_gate) == (model_type == "gpt2")


class Counting(Checkpoint):
    """A checkpoint that counts the bytes that are read of each tensor."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = super().read(name, rows)
        self.bytes_read = getattr(self, "bytes_read", 0) + tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss", "dbrx"])
def test_one_expert_costs_the_bytes_of_one_expert(tmp_path: Path, model_type: str) -> None:
    build(model_type).save_pretrained(tmp_path)
    checkpoint = Counting(tmp_path)
    model = CanonicalModel(checkpoint)
    places = model.mlps(1)
    assert [place.expert for place in places if place.kind == "routed"] == [0, 1, 2]
    assert not hasattr(checkpoint, "bytes_read")  # headers alone
    model.mlp(places[-1])
    assert checkpoint.bytes_read == 4 * places[-1].elements


def test_rows_of_fused_tensors_cost_no_more_than_themselves(tmp_path: Path) -> None:
    build("phi3").save_pretrained(tmp_path)
    checkpoint = Counting(tmp_path)
    model = CanonicalModel(checkpoint)
    assert model.matrix("k", 0).shape == (16, 32)
    assert checkpoint.bytes_read == 4 * 16 * 32
    model.mlp(model.mlps(0)[0])
    assert checkpoint.bytes_read == 4 * 16 * 32 + 4 * model.mlps(0)[0].elements


def test_rows_of_the_embedding_cost_little_more_than_themselves(tmp_path: Path) -> None:
    table = torch.arange(5000 * 256, dtype=torch.float32).reshape(5000, 256)
    write(tmp_path, {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(256)}, {"model_type": "llama"})
    checkpoint = Counting(tmp_path)
    model = CanonicalModel(checkpoint)
    rows = torch.tensor([4999, 3, 3, 2500, 0])
    assert torch.equal(model.embedding(rows), table[rows])
    assert checkpoint.bytes_read < 10 * 4 * 256
    assert model.embedding(torch.tensor([], dtype=torch.int64)).shape == (0, 256)
    with pytest.raises(IndexError):
        model.embedding(torch.tensor([5000]))


def test_gains_moved_between_norm_and_readers_change_nothing(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path / "a")
    scale = torch.rand(32) * 3 + 0.1
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] *= scale
        for name in ("q", "k", "v"):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] /= scale
    moved = CanonicalModel(write(tmp_path / "b", tensors, dict(checkpoint.config)))
    model = CanonicalModel(checkpoint)
    for part in ("q", "k", "v", "o"):
        torch.testing.assert_close(moved.folded(part, 1), model.folded(part, 1))
    assert not torch.allclose(moved.matrix("q", 1), model.matrix("q", 1))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "axk1"])
def test_products_of_latent_attention_do_not_see_the_latent_basis(tmp_path: Path, model_type: str) -> None:
    model, tensors, roles, s = edited(model_type)
    with_gains(model, json.loads(model.config.to_json_string(use_diff=False)))
    before = CanonicalModel(stored(tmp_path / "before", model, "saved"))
    order, q_order = torch.randperm(s.kv_rank), torch.randperm(s.q_rank)
    for name, role in roles.items():
        at = {"q_a": (q_order, 0), "q_a_norm": (q_order, 0), "q_b": (q_order, 1), "kv_b": (order, 1)}.get(
            str(role.part)
        )
        if at is not None:
            tensors[name].copy_(tensors[name].index_select(at[1], at[0]))
        elif role.part in ("kv_a", "kv_a_norm"):
            tensors[name][: s.kv_rank] = tensors[name][: s.kv_rank][order].clone()
    after = CanonicalModel(stored(tmp_path / "after", model, "saved"))
    assert not torch.allclose(before.matrix("kv_b", 1), after.matrix("kv_b", 1))
    for folded in (False, True):
        for product, rows in (
            (latent_query, s.heads * (s.nope + s.rope)),
            (latent_key_value, s.heads * (s.nope + s.value)),
            (latent_rotary_key, s.rope),
        ):
            one = product(before, 1, folded)
            assert one.shape == (rows, 32)
            torch.testing.assert_close(one, product(after, 1, folded))
    assert not torch.allclose(latent_query(before, 1), latent_query(before, 1, folded=False))


def test_blocks_that_predict_further_tokens_are_no_layers(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path / "plain", layers=3)
    kept = {name: one for name, one in tensors.items() if ".self_attn." not in name}
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm"):
        kept[f"model.layers.2.{name}.weight"] = torch.ones(32, 64) if name == "eh_proj" else torch.ones(32)
    config = {**checkpoint.config, "num_hidden_layers": 2, "model_type": "glm4_moe", "n_routed_experts": 0}
    model = CanonicalModel(write(tmp_path / "mtp", kept, config))
    assert model.layers == (0, 1)
    assert {role.component for role in model._source.roles.roles.values() if role.layer == 2} == {"mtp"}
    inferred = {name.replace("model.layers.2.", "mtp.layers.0."): one for name, one in tensors.items()}
    unknown = CanonicalModel(write(tmp_path / "own", inferred, {"model_type": "someones_own", "num_hidden_layers": 2}))
    assert unknown.layers == (0, 1)


def test_an_unknown_model_type_with_the_names_of_llama_is_folded_and_says_so(tmp_path: Path) -> None:
    known = CanonicalModel(llama(tmp_path / "known")[0])
    unknown = CanonicalModel(llama(tmp_path / "unknown", model_type="someones_own")[0])
    for part in ("q", "k", "v", "o"):
        assert torch.equal(unknown.folded(part, 1), known.folded(part, 1))
    place = known.mlps(1)[0]
    assert unknown.mlps(1) == (place,)
    assert torch.equal(unknown.mlp(place, folded=True).up, known.mlp(place, folded=True).up)
    assert torch.equal(unknown.folded("head"), known.folded("head"))
    assert "someones_own" in unknown.notes[0]
    assert unknown.unfolded_because is None


def test_norms_that_no_template_explains_are_not_folded(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path / "known")
    extra = {f"model.layers.{layer}.post_feedforward_layernorm.weight": torch.rand(32) for layer in (0, 1)}
    model = CanonicalModel(write(tmp_path / "own", tensors | extra, checkpoint.config | {"model_type": "someones_own"}))
    assert "no template says" in str(model.unfolded_because)
    assert model.unfolded_because in model.notes
    assert torch.equal(model.folded("q", 1), tensors["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(model.folded("head"), tensors["lm_head.weight"])


def test_a_vision_tower_beside_an_unknown_text_model_is_not_mixed_in(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path / "known")
    tower = {f"visual.blocks.{layer}.attn.q_proj.weight": torch.ones(8, 8) for layer in range(20)}
    model = CanonicalModel(write(tmp_path / "own", tensors | tower, checkpoint.config | {"model_type": "someones_own"}))
    assert model.layers == (0, 1)
    assert model.matrix("q", 0).shape == (32, 32)


def test_a_missing_norm_is_no_norm_of_ones(tmp_path: Path) -> None:
    _, tensors = llama(tmp_path / "whole")
    del tensors["model.layers.1.input_layernorm.weight"]
    model = CanonicalModel(write(tmp_path / "part", tensors, {"model_type": "llama", "num_hidden_layers": 2}))
    with pytest.raises(CheckpointUnavailable, match="attention_norm of layer 1, which is missing"):
        model.folded("q", 1)
    assert model.matrix("q", 1).shape == (32, 32)


def test_shapes_that_do_not_fit_each_other(tmp_path: Path) -> None:
    _, tensors = llama(tmp_path / "whole")
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 40)
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(16)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    model = CanonicalModel(write(tmp_path / "odd", tensors, {"model_type": "llama", "num_hidden_layers": 2}))
    with pytest.raises(CheckpointUnavailable, match=r"down_proj.* 40 hidden units"):
        model.mlp(model.mlps(0)[0])
    with pytest.raises(CheckpointUnavailable, match="16 gains"):
        model.folded("q", 0)
    assert model.mlps(1) == ()
    assert model.notes == ("no complete MLP in layers 1",)


def test_biases_and_vectors_that_are_left_out_are_told(tmp_path: Path) -> None:
    notes = CanonicalModel(stored(tmp_path, build("gpt_oss"), "saved")).notes
    assert [note.split(",")[0] for note in notes] == ["14 biases are left out", "2 vectors are left out"]


def test_every_family_is_tested() -> None:
    assert {*TEXT, *WRAPPERS} == FAMILIES.keys()


def test_half_precision_is_widened(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path / "single")
    half = {name: one.to(torch.bfloat16) for name, one in tensors.items()}
    model = CanonicalModel(write(tmp_path / "half", half, checkpoint.config))
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(model.matrix("v", 1), half[name].float())
    assert {one.dtype for one in (model.gain("final_norm"), model.folded("v", 1), model.head())} == {torch.float32}
    assert isinstance(model.mlp(model.mlps(0)[0]), Mlp)


def test_exaone_3_is_llama_under_other_names(tmp_path: Path) -> None:
    checkpoint, tensors = llama(tmp_path / "llama")
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h"}
    names |= {"self_attn.o_proj": "attn.attention.out_proj", "self_attn": "attn.attention", "up_proj": "c_fc_1"}
    names |= {"gate_proj": "c_fc_0", "down_proj": "c_proj", "input_layernorm": "ln_1"}
    names |= {"post_attention_layernorm": "ln_2"}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    exaone = write(tmp_path / "exaone", renamed, {"model_type": "exaone", "num_layers": 2})
    assert (exaone.roles.unassigned, exaone.roles.missing_count) == ((), 0)
    one, other = CanonicalModel(exaone), CanonicalModel(checkpoint)
    for part in ("q", "k", "v", "o"):
        assert torch.equal(one.folded(part, 1), other.folded(part, 1))
    assert one.mlps(1) == other.mlps(1)
    mlps = [model.mlp(one.mlps(1)[0], folded=True) for model in (one, other)]
    for part in MLP_PARTS:
        assert torch.equal(getattr(mlps[0], part), getattr(mlps[1], part))
    assert torch.equal(one.folded("head"), other.folded("head"))


def test_vaetki_reads_and_writes_through_zero_centred_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    at = "model.layers.0."
    shapes = {"q_a_proj": (12, 32), "q_b_proj": (40, 12), "kv_a_proj_with_mqa": (14, 32), "kv_b_proj": (52, 10)}
    tensors = {f"{at}self_attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"{at}self_attn.o_proj.weight": torch.randn(32, 28), "model.norm.weight": torch.randn(32)}
    tensors |= {"model.embed_tokens.weight": torch.randn(64, 32), "lm_head.weight": torch.randn(64, 32)}
    for norm in ("input", "post_attention", "pre_mlp", "post_mlp"):
        tensors[f"{at}{norm}_layernorm.weight"] = torch.randn(32)
    for norm, size in (("q_a", 12), ("kv_a", 10)):
        tensors[f"{at}self_attn.{norm}_layernorm.weight"] = torch.randn(size)
    tensors[f"{at}mlp.down_proj.weight"] = torch.randn(32, 48)
    for name in ("gate", "up"):
        tensors[f"{at}mlp.{name}_proj.weight"] = torch.randn(48, 32)
    config = {"model_type": "vaetki", "num_hidden_layers": 1, "first_k_dense_replace": 3, "q_lora_rank": 12}
    checkpoint = write(tmp_path, tensors, config)
    assert (checkpoint.roles.unassigned, checkpoint.roles.missing_count) == ((), 0)
    model = CanonicalModel(checkpoint)

    def gain(name: str) -> torch.Tensor:
        return 1 + tensors[f"{at}{name}.weight"]

    def weight(name: str) -> torch.Tensor:
        return tensors[f"{at}{name}.weight"]

    assert torch.equal(model.folded("q_a", 0), weight("self_attn.q_a_proj") * gain("input_layernorm"))
    assert torch.equal(model.folded("q_b", 0), weight("self_attn.q_b_proj") * gain("self_attn.q_a_layernorm"))
    assert torch.equal(model.folded("kv_b", 0), weight("self_attn.kv_b_proj") * gain("self_attn.kv_a_layernorm"))
    assert torch.equal(model.folded("o", 0), weight("self_attn.o_proj") * gain("post_attention_layernorm")[:, None])
    mlp = model.mlp(model.mlps(0)[0], folded=True)
    assert torch.equal(mlp.up, weight("mlp.up_proj") * gain("pre_mlp_layernorm"))
    assert torch.equal(mlp.down, weight("mlp.down_proj") * gain("post_mlp_layernorm")[:, None])
    assert torch.equal(model.folded("head"), tensors["lm_head.weight"] * (1 + tensors["model.norm.weight"]))
