from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.dequantise import (
    AWQ_ORDER,
    E2M1,
    awq,
    four_bit_floats,
    gptq,
    mxfp4,
    pack_quantised,
    scaled,
    unpacked,
)

FP8 = torch.float8_e4m3fn
sizes = st.integers(1, 12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of unsigned integers as one stream of bits in 32-bit words, value by value."""
    rows = []
    for row in values.tolist():
        stream = sum(value << (index * bits) for index, value in enumerate(row))
        words = [stream >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


@given(rows=sizes, count=st.integers(1, 50), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_unpacked_integers_are_those_that_were_packed(rows: int, count: int, bits: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, count), generator=generator(seed))
    assert torch.equal(unpacked(packed_bits(values, bits), bits, count), values.int())


@given(
    rows=sizes,
    columns=sizes,
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    first=st.integers(0, 4),
    shift=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_number_is_scaled_by_that_of_its_block(
    rows: int, columns: int, height: int, width: int, first: int, shift: bool, seed: int
) -> None:
    grid = (-(-(rows + first) // height), -(-columns // width))
    values = torch.randint(-8, 8, (rows, columns), generator=generator(seed)).to(torch.int8)
    scale = torch.rand(grid, generator=generator(seed + 1)) + 0.1
    zero = torch.randint(-3, 3, grid, generator=generator(seed + 2)) if shift else None
    expected = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            at = ((row + first) // height, column // width)
            base = values[row, column].double() - (0 if zero is None else zero[at].double())
            expected[row, column] = base * scale[at].double()
    found = scaled(values, scale, zero, (height, width), first)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 8), (6, 8), (1, 1)])
def test_scales_of_the_tensor_of_each_row_and_of_each_column(shape: tuple[int, ...]) -> None:
    values = torch.randn(6, 8).to(FP8)
    scale = torch.rand(shape) + 0.1
    plain = values.float() * (scale[:, None] if shape == (6,) else scale)
    assert torch.equal(scaled(values, scale), plain)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 6, 1), (3, 1, 8), (1, 6, 1)])
def test_scales_of_a_stack(shape: tuple[int, ...]) -> None:
    values = torch.randn(3, 6, 8).to(FP8)
    scale = torch.rand(shape) + 0.1
    assert torch.equal(scaled(values, scale), values.float() * (scale[:, None, None] if shape == (3,) else scale))


def test_a_block_is_of_128_unless_it_is_stated() -> None:
    values, scale = torch.ones(576, 192).to(FP8), torch.arange(10.0).reshape(5, 2)
    found = scaled(values, scale)
    assert found[127, 127] == 0 != found[128, 127] == 2
    assert found[0, 128] == found[127, 191] == 1
    assert torch.equal(found, scaled(values, scale, block=(128, 128)))
    assert scaled(values, torch.ones(6, 2), block=(96, 96)).sum() == 576 * 192
    assert scaled(values[100:300], scale, first_row=100, total_rows=576).equal(found[100:300])


def test_the_values_are_left_as_they_are() -> None:
    values = torch.randn(4, 4)
    before = values.clone()
    scaled(values, torch.tensor(3.0))
    assert torch.equal(values, before)


@pytest.mark.parametrize("scale", [torch.ones(7), torch.ones(5, 1), torch.ones(2, 6, 1)])
def test_scales_that_fit_no_values(scale: torch.Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        scaled(torch.ones(6, 8), scale)


@given(
    out=st.integers(1, 4).map(lambda n: 32 * n),
    groups=st.integers(1, 3),
    bits=st.sampled_from([2, 3, 4, 8]),
    first_format=st.booleans(),
    mixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gptq(out: int, groups: int, bits: int, first_format: bool, mixed: bool, seed: int) -> None:
    columns, made = 32 * groups, generator(seed)
    values = torch.randint(0, 2**bits, (out, columns), generator=made)
    zeros = torch.randint(0, 2**bits, (groups, out), generator=made)
    scales = torch.rand((groups, out), generator=made).half()
    group_of = torch.arange(columns) // 32
    group_of = group_of[torch.randperm(columns, generator=made)] if mixed else group_of
    expected = scales.float()[group_of].T * (values - zeros[group_of].T)
    qzeros = packed_bits((zeros - int(first_format)) % 2**bits, bits)
    found = gptq(
        packed_bits(values, bits).T.contiguous(), qzeros, scales, group_of if mixed else None, bits, int(first_format)
    )
    assert torch.equal(found, expected)


@given(out=st.integers(1, 4).map(lambda n: 8 * n), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_awq(out: int, groups: int, seed: int) -> None:
    columns, made = 4 * groups, generator(seed)
    values = torch.randint(0, 16, (columns, out), generator=made)
    zeros = torch.randint(0, 16, (groups, out), generator=made)
    scales = torch.rand((groups, out), generator=made).half()

    def packed(integers: torch.Tensor) -> torch.Tensor:
        return packed_bits(integers.reshape(len(integers), -1, 8)[..., list(AWQ_ORDER)].flatten(1), 4)

    group_of = torch.arange(columns) // 4
    expected = ((values - zeros[group_of]) * scales.float()[group_of]).T
    assert torch.equal(awq(packed(values), packed(zeros), scales), expected)


def test_awq_puts_the_second_column_into_the_fifth_nibble() -> None:
    """As its kernels read it: one word holds columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""
    word = sum(column << (4 * place) for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    found = awq(torch.tensor([[word]], dtype=torch.int32), torch.zeros((1, 1), dtype=torch.int32), torch.ones(1, 8))
    assert found.flatten().tolist() == list(range(8))


def scheme(**settings: Any) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**settings))


def compressor(name: str) -> Any:
    return pytest.importorskip("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(name)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (2, 32), (4, None), (8, None)])
def test_pack_quantised_as_its_library_reads_it(bits: int, group: int | None, symmetric: bool) -> None:
    grouped = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    how = scheme(num_bits=bits, type="int", symmetric=symmetric, **grouped)
    weight, groups = torch.randn(24, 128), 128 // group if group else 1
    scale = (weight.reshape(24, groups, -1).abs().amax(-1) / 2 ** (bits - 1)).contiguous()
    state = {"weight": weight, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-2, 2, (24, groups), dtype=torch.int8)
    small = compressor("pack-quantized").compress(state, how)
    expected = compressor("pack-quantized").decompress(small, how)["weight"]
    zero_point = small.get("weight_zero_point")
    assert torch.equal(pack_quantised(small["weight_packed"], scale, (24, 128), bits, zero_point, None), expected)
    if not symmetric:  # older files hold zero points of a byte each
        plain = pack_quantised(small["weight_packed"], scale, (24, 128), bits, state["weight_zero_point"], None)
        assert torch.equal(plain, expected)


def test_pack_quantised_with_mixed_columns() -> None:
    values = torch.randint(-8, 8, (6, 20))
    scale, zero = torch.rand(6, 4), torch.randint(-2, 2, (6, 4)).to(torch.int8)
    group_of = (torch.arange(20) // 5)[torch.randperm(20)].int()
    packed = packed_bits(values + 8, 4)
    found = pack_quantised(packed, scale, (6, 20), 4, zero, group_of)
    torch.testing.assert_close(found, (values - zero[:, group_of.long()]) * scale[:, group_of.long()])
    unmixed = pack_quantised(packed, scale, (6, 20), 4, zero, torch.full((20,), -1))
    torch.testing.assert_close(unmixed, (values - zero.repeat_interleave(5, 1)) * scale.repeat_interleave(5, 1))
    with pytest.raises(ValueError, match="beyond 4"):
        pack_quantised(packed, scale, (6, 20), 4, zero, group_of + 1)


@pytest.mark.parametrize(
    ("format_name", "settings", "shape"),
    [
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (24, 1)),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (1,)),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (24, 1)),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]}, (3, 8)),
    ],
)
def test_scaled_values_as_compressed_tensors_reads_them(
    format_name: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    how, scale = scheme(symmetric=True, **settings), torch.rand(shape) + 0.01
    small = compressor(format_name).compress({"weight": torch.randn(24, 128), "weight_scale": scale}, how)
    expected = compressor(format_name).decompress(small, how)["weight"]
    assert torch.equal(scaled(small["weight"], scale, block=settings.get("block_structure")), expected)


def test_blocks_as_transformers_reads_them() -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    values, scale = torch.randn(256, 384).to(FP8), torch.rand(2, 3)
    expected = module.Fp8Dequantize(None)._dequantize_one(values, scale)
    assert torch.equal(scaled(values, scale, block=(128, 128)), expected)


def test_mxfp4_as_transformers_reads_it() -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    exponents = torch.randint(100, 150, (3, 10, 2), dtype=torch.uint8)
    expected = module.convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert torch.equal(mxfp4(blocks, exponents), expected.transpose(1, 2))
    with pytest.raises(ValueError, match="have not the groups"):
        mxfp4(blocks, exponents[:, :5])


@pytest.mark.parametrize(("format_name", "group"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_four_bit_floats_as_compressed_tensors_reads_them(format_name: str, group: int) -> None:
    strategy = "tensor_group" if group == 16 else "group"
    how = scheme(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    scale = (torch.rand(6, 64 // group) + 0.5).to(FP8)
    if group == 32:
        scale = torch.randint(120, 135, (6, 2), dtype=torch.uint8)
    state = {"weight_packed": packed, "weight_scale": scale}
    state |= {"weight_global_scale": torch.tensor([4.0])} if group == 16 else {}
    expected = compressor(format_name).decompress(state, how)["weight"]
    found = scaled(four_bit_floats(packed), scale, block=(1, group)) / (4 if group == 16 else 1)
    assert torch.equal(found, expected)


def test_the_four_bit_floats() -> None:
    assert four_bit_floats(torch.tensor([[0x10, 0xF7]], dtype=torch.uint8)).tolist() == [[0.0, 0.5, 6.0, -6.0]]
    assert sorted(set(E2M1)) == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="uint8"):
        four_bit_floats(torch.zeros(2, 2))


def test_packed_words_that_are_too_few() -> None:
    with pytest.raises(ValueError, match="9 values of 4 bits"):
        unpacked(torch.zeros((2, 1), dtype=torch.int32), 4, 9)
    with pytest.raises(ValueError, match="equal size"):
        pack_quantised(torch.zeros((2, 2), dtype=torch.int32), torch.ones(2, 3), (2, 16), 4, None, None)
