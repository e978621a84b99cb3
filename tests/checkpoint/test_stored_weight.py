from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.dequantise import four_bit_floats, mxfp4
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.stored_weight import read_weight, stored_weight

FP8 = torch.float8_e4m3fn
NAME = "model.layers.0.self_attn.o_proj."
Tensors = Mapping[str, torch.Tensor]


def write(
    directory: Path, tensors: Tensors, quantization: Mapping[str, Any] | None = None, **config: Any
) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    given = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4, **config}
    given |= {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(given))
    return Checkpoint(directory)


def one(directory: Path, tensors: Tensors, quantization: Mapping[str, Any] | None = None) -> torch.Tensor:
    """The canonical output projection of a checkpoint that holds nothing else."""
    checkpoint = write(directory, {NAME + leaf: tensor for leaf, tensor in tensors.items()}, quantization)
    assert checkpoint.roles.unassigned == ()
    return CanonicalModel(checkpoint).matrix("o", 0)


def nibbles(values: torch.Tensor) -> torch.Tensor:
    """Rows of four-bit integers, eight to a 32-bit word, lowest bits first."""
    words = (values.reshape(len(values), -1, 8).long() << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_plain_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8).to(dtype)
    assert torch.equal(one(tmp_path, {"weight": weight}), weight.float())


@pytest.mark.parametrize(
    ("scale", "leaf", "quantization"),
    [
        (torch.rand(2, 2), "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (torch.rand(3, 4), "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        (torch.rand(1), "weight_scale", {"quant_method": "compressed-tensors"}),
        (torch.rand(()), "weight_scale_inv", {"quant_method": "fp8"}),
        (torch.rand(192, 1), "weight_scale", {"quant_method": "fbgemm_fp8"}),
    ],
)
def test_eight_bit_floats(tmp_path: Path, scale: torch.Tensor, leaf: str, quantization: Mapping[str, Any]) -> None:
    weight = torch.randn(192, 256).to(FP8)
    size = quantization.get("weight_block_size", [1, 1])[0]
    expected = weight.float() * (
        scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[:192, :256] if size > 1 else scale
    )
    assert torch.equal(
        one(tmp_path, {"weight": weight, leaf: scale, "input_scale": torch.ones(1)}, quantization), expected
    )


def test_eight_bit_floats_that_were_never_scaled(tmp_path: Path) -> None:
    weight = torch.randn(6, 8).to(torch.float8_e5m2)
    assert torch.equal(one(tmp_path, {"weight": weight}), weight.float())
    with pytest.raises(CheckpointUnavailable, match=r"no scales, quantised by fp8"):
        one(tmp_path, {"weight": weight}, {"quant_method": "fp8"})


def test_rows_of_block_scaled_values(tmp_path: Path) -> None:
    """The rows of one fused part begin in the middle of a block."""
    tensors = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(384, 192).to(FP8),
        "model.layers.0.self_attn.qkv_proj.weight_scale_inv": torch.rand(3, 2),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(192, 192).to(FP8),
        "model.layers.0.self_attn.o_proj.weight_scale_inv": torch.rand(2, 2),
    }
    checkpoint = write(tmp_path, tensors, {"quant_method": "fp8"}, model_type="phi3")
    whole = read_weight(checkpoint, stored_weight(checkpoint, "model.layers.0.self_attn.qkv_proj.weight"))
    model = CanonicalModel(checkpoint)
    assert torch.equal(torch.cat([model.matrix(part, 0) for part in ("q", "k", "v")]), whole)
    assert model.matrix("k", 0).shape == (96, 192)


def test_integers_of_eight_bits(tmp_path: Path) -> None:
    weight, scale = torch.randint(-128, 128, (6, 8)).to(torch.int8), torch.rand(6, 1)
    zero = torch.randint(-3, 3, (6, 1)).to(torch.int8)
    tensors = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    torch.testing.assert_close(one(tmp_path, tensors), (weight.float() - zero) * scale)


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers(tmp_path: Path, bits: int, stated: bool) -> None:
    values, scale = torch.randint(0, 2**bits, (6, 40)), torch.rand(6, 5)
    words = torch.randint(0, 1, (6, 40 * bits // 32), dtype=torch.int32)
    for column in range(40):
        words[:, column * bits // 32] |= (values[:, column] << (column * bits % 32)).int()
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([6, 40])}
    groups = {"config_groups": {"group_0": {"weights": {"num_bits": bits, "group_size": 8}}}}
    quantization = {"quant_method": "compressed-tensors", **(groups if stated else {})}
    expected = (values - 2 ** (bits - 1)).float() * scale.repeat_interleave(8, 1)
    assert torch.equal(one(tmp_path, tensors, quantization), expected)


def test_padding_of_packed_integers_is_cut(tmp_path: Path) -> None:
    values = torch.randint(0, 16, (6, 24))
    tensors = {
        "weight_packed": nibbles(values),
        "weight_scale": torch.ones(6, 1),
        "weight_shape": torch.tensor([6, 20]),
    }
    assert torch.equal(one(tmp_path, tensors), (values - 8).float()[:, :20])


@pytest.mark.parametrize(("quantization", "offset"), [({"checkpoint_format": "gptq_v2"}, 0), ({}, 1)])
def test_gptq(tmp_path: Path, quantization: dict[str, Any], offset: int) -> None:
    values, zeros, scales = torch.randint(0, 16, (16, 32)), torch.randint(0, 15, (2, 16)), torch.rand(2, 16).half()
    group_of = torch.arange(32) // 16
    tensors = {
        "qweight": nibbles(values).T,
        "qzeros": nibbles(zeros),
        "scales": scales,
        "g_idx": group_of.int(),
    }
    expected = (values - zeros[group_of].T - offset) * scales.float()[group_of].T
    assert torch.equal(one(tmp_path, tensors, {"quant_method": "gptq", "bits": 4} | quantization), expected)


def test_awq(tmp_path: Path) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    values, zeros, scales = torch.randint(0, 16, (32, 16)), torch.randint(0, 16, (2, 16)), torch.rand(2, 16).half()
    packed, packed_zeros = (nibbles(one.reshape(len(one), 2, 8)[..., order].flatten(1)) for one in (values, zeros))
    group_of = torch.arange(32) // 16
    expected = ((values - zeros[group_of]) * scales.float()[group_of]).T
    assert torch.equal(one(tmp_path, {"qweight": packed, "qzeros": packed_zeros, "scales": scales}), expected)


@pytest.mark.parametrize(
    "beside",
    [
        {"weight_scale": torch.rand(6, 2).to(FP8), "weight_global_scale": torch.tensor([4.0])},
        {"weight_scale": torch.rand(6, 2).to(FP8), "weight_scale_2": torch.tensor(0.25)},
    ],
)
def test_nvfp4(tmp_path: Path, beside: dict[str, torch.Tensor]) -> None:
    packed = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    leaf = "weight" if "weight_scale_2" in beside else "weight_packed"
    expected = four_bit_floats(packed) * beside["weight_scale"].float().repeat_interleave(16, 1) / 4
    assert torch.equal(one(tmp_path, {leaf: packed, **beside}), expected)


class Counting(Checkpoint):
    """A checkpoint that counts the bytes that are read."""

    read_bytes = 0

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = super().read(name, rows)
        self.read_bytes += tensor.numel() * tensor.element_size()
        return tensor


def test_one_expert_of_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts."
    blocks = {"gate_up_proj": (3, 16, 1, 16), "down_proj": (3, 32, 1, 16)}
    tensors = {f"{at}{name}_blocks": torch.randint(0, 256, shape, dtype=torch.uint8) for name, shape in blocks.items()}
    tensors |= {
        f"{at}{name}_scales": torch.randint(120, 130, shape[:-1], dtype=torch.uint8) for name, shape in blocks.items()
    }
    # 8 hidden units; what pads them to 32 columns of `down` is no unit.
    write(tmp_path, tensors, model_type="gpt_oss", num_local_experts=3)
    checkpoint = Counting(tmp_path)
    model = CanonicalModel(checkpoint)
    places = model.mlps(0)
    assert [place.expert for place in places] == [0, 1, 2]
    with pytest.raises(CheckpointUnavailable, match="32 hidden units as down, and 8 as up"):
        model.mlp(places[1])
    tensors[f"{at}gate_up_proj_blocks"] = torch.randint(0, 256, (3, 64, 1, 16), dtype=torch.uint8)
    tensors[f"{at}gate_up_proj_scales"] = torch.randint(120, 130, (3, 64, 1), dtype=torch.uint8)
    write(tmp_path, tensors, model_type="gpt_oss", num_local_experts=3)
    checkpoint = Counting(tmp_path)
    model = CanonicalModel(checkpoint)
    mlp = model.mlp(model.mlps(0)[1])
    assert checkpoint.read_bytes == (64 + 32) * 17
    whole = mxfp4(tensors[f"{at}gate_up_proj_blocks"], tensors[f"{at}gate_up_proj_scales"])
    assert mlp.gate is not None
    assert torch.equal(mlp.gate, whole[1, 0::2])
    assert torch.equal(mlp.up, whole[1, 1::2])
    assert mlp.down.shape == (32, 32)


def test_a_stack_of_experts_in_eight_bits(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts."
    tensors = {
        f"{at}gate_up_proj": torch.randn(3, 20, 32).to(FP8),
        f"{at}gate_up_proj_scale_inv": torch.rand(3, 1, 1),
        f"{at}down_proj": torch.randn(3, 32, 10).to(FP8),
        f"{at}down_proj_scale_inv": torch.rand(3, 1, 1),
    }
    checkpoint = write(tmp_path, tensors, {"quant_method": "fp8"}, model_type="qwen3_moe", num_experts=3)
    assert checkpoint.roles.unassigned == ()
    model = CanonicalModel(checkpoint)
    mlp = model.mlp(model.mlps(0)[2])
    expected = tensors[f"{at}gate_up_proj"][2].float() * tensors[f"{at}gate_up_proj_scale_inv"][2]
    assert torch.equal(mlp.up, expected[10:])


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        ({"weight": torch.zeros((24, 1), dtype=torch.uint8)}, {"quant_method": "bitsandbytes"}, "by bitsandbytes"),
        ({"weight": torch.zeros((6, 8), dtype=torch.int8)}, {}, "I8 .* no scales, quantised by an unknown method"),
        ({"qweight": torch.zeros((6, 8), dtype=torch.int32)}, {"quant_method": "gptq"}, "quantised by gptq"),
        (
            {"weight_packed": torch.zeros((6, 1), dtype=torch.int32), "weight_scale": torch.ones(6, 1)},
            {},
            "beside weight_scale, ",
        ),
        (
            {
                "weight_packed": torch.zeros((6, 1), dtype=torch.int32),
                "weight_scale": torch.ones(6, 1),
                "weight_shape": torch.tensor([6, 10**15]),
            },
            {},
            "do not fit each other .*not packed with",
        ),
        (
            {
                "weight_packed": torch.zeros((6, 1), dtype=torch.int32),
                "weight_scale": torch.ones(6, 3),
                "weight_shape": torch.tensor([6, 8]),
            },
            {},
            "weight_scale .*the checkpoint is damaged",
        ),
        (
            {"weight": torch.zeros((6, 8)).to(FP8), "weight_scale": torch.ones(5)},
            {},
            "do not fit each other",
        ),
        (
            {
                "qweight": torch.zeros((2, 16), dtype=torch.int32),
                "qzeros": torch.zeros((1, 3), dtype=torch.int32),
                "scales": torch.ones(1, 16),
            },
            {},
            r"qzeros \[1, 3\] do not fit",
        ),
        (
            {
                "qweight": torch.zeros((2, 16), dtype=torch.int32),
                "qzeros": torch.zeros((1, 2), dtype=torch.int32),
                "scales": torch.tensor(1.0),
            },
            {},
            r"do not fit scales \[\]",
        ),
        (
            {
                "qweight": torch.zeros((2, 16), dtype=torch.int32),
                "qzeros": torch.zeros((1, 2), dtype=torch.int32),
                "scales": torch.ones(1, 16),
                "g_idx": torch.full((16,), 7, dtype=torch.int32),
            },
            {},
            "beyond 1",
        ),
    ],
)
def test_what_cannot_be_read_says_why(
    tmp_path: Path, tensors: Tensors, quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointUnavailable, match=message):
        one(tmp_path, tensors, quantization)


@pytest.mark.parametrize(
    "quantization", [None, [], {"config_groups": [1]}, {"weight_block_size": [0, -1]}, {"weight_block_size": "x"}]
)
def test_a_hostile_configuration_does_not_raise_anything_else(tmp_path: Path, quantization: Any) -> None:
    tensors = {NAME + "weight": torch.ones(6, 8).to(FP8), NAME + "weight_scale_inv": torch.tensor([[2.0]])}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(CanonicalModel(Checkpoint(tmp_path)).matrix("o", 0), torch.full((6, 8), 2.0))
