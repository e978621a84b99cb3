from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import ordinary
from checks.statistics.ordinary import LARGEST_HEAD, head_elements, may_be_ordinary

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(64,), (8, 8), (4, 16), (2, 4, 8), (1, 65), (16, 64), (9, 8, 3), (300,), (1000, 2), (64, 128), (4096,)]
BASES = st.sampled_from([100.0, 1e4, 5e5, 1e6, 1e7])


def ordinary_reason(tensor: Tensor) -> str | None:
    """What is tested, with a test of its own: what is ordinary is never cleared by its beginning, however short."""
    reason = ordinary.ordinary_reason(tensor)
    if reason is not None:
        flat = tensor.reshape(-1)
        for length in (64, 1024, ordinary._SAMPLE):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ordinary, "_SAMPLE", length)
                elements = head_elements(tensor.shape)
                assert 0 <= elements <= flat.numel()
                assert may_be_ordinary(flat[:elements], tensor.shape, if_unseen=True), (length, tensor.shape)
                if tensor.squeeze().dim() < 3:
                    assert may_be_ordinary(flat[:elements], tensor.shape), (length, tensor.shape)
    return reason


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inverse_frequencies(width: int, base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2).float() / width)


def llama3_scaled(frequencies: Tensor, factor: float = 8.0, original: int = 8192) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def angles(length: int, width: int, base: float) -> Tensor:
    return torch.arange(length).float()[:, None] * inverse_frequencies(width, base)


def shuffled(table: Tensor, seed: int) -> Tensor:
    """Its columns in random order: learned channels have none."""
    return table[:, normal((table.shape[1],), seed).argsort()]


# Never ordinary: whatever was trained


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 9999),
    dtype=st.sampled_from(DTYPES + FLOAT8),
    sd=st.sampled_from([1.0, 0.02]),
)
@settings(deadline=None, max_examples=150)
def test_random_normal_tensors(shape: tuple[int, ...], seed: int, dtype: torch.dtype, sd: float) -> None:
    if dtype in FLOAT8:
        sd = 1.0  # 0.02 has a handful of values there
    assert ordinary_reason((sd * normal(shape, seed)).to(dtype)) is None


@given(
    n=st.sampled_from([64, 128, 576, 4096]),
    seed=st.integers(0, 9999),
    dtype=st.sampled_from(DTYPES),
    sd=st.sampled_from([0.01, 0.05, 0.3]),
)
@settings(deadline=None, max_examples=80)
def test_norm_vectors(n: int, seed: int, dtype: torch.dtype, sd: float) -> None:
    vector = (1 + sd * normal((n,), seed)).to(dtype)
    assert ordinary_reason(vector) is None
    assert ordinary_reason(vector[None]) is None


@given(seed=st.integers(0, 9999), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=30)
def test_other_trained_tensors(seed: int, dtype: torch.dtype) -> None:
    bias = 0.01 * normal((256,), seed)
    bias[::3] = 0
    outlier = normal((64, 64), seed)
    outlier[3, 5] = 1e4
    pruned = normal((64, 64), seed)
    pruned[pruned.abs() < 1.7] = 0  # over 90 % zeros, but of both signs
    quantised = (normal((64, 64), seed) * 2).round().clamp(-2, 2)
    ternary = normal((64, 64), seed).sign() * (normal((64, 64), seed + 1).abs() > 0.7)
    broken = normal((64, 64), seed)
    broken[7, 7] = math.nan
    for tensor in (bias, outlier, pruned, quantised, ternary, broken, normal((64, 64), seed).cumsum(0)):
        assert ordinary_reason(tensor.to(dtype)) is None


@given(seed=st.integers(0, 9999), dtype=st.sampled_from(DTYPES), noise=st.sampled_from([0.03, 0.1]))
@settings(deadline=None, max_examples=20)
def test_learned_position_embeddings_are_smooth_but_not_ordinary(seed: int, dtype: torch.dtype, noise: float) -> None:
    smooth = shuffled(torch.sin(angles(256, 64, 1e4)).double(), seed)
    assert ordinary_reason((smooth + noise * normal((256, 32), seed)).to(dtype)) is None


def test_one_changed_line_or_value_is_not_overlooked() -> None:
    table = shuffled(torch.cat([angles(2048, 64, 1e4).sin(), angles(2048, 64, 1e4).cos()], 1), 0)
    assert ordinary_reason(table)
    changed = table.clone()
    changed[:, 61] = normal((2048,), 0).float()
    assert ordinary_reason(changed) is None
    spot = table.clone()
    spot[1700, 40] += 0.5
    assert ordinary_reason(spot) is None
    late = torch.zeros(1 << 18)
    assert ordinary_reason(late)
    late[-100:] = normal((100,), 0).float()
    assert ordinary_reason(late) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.uint16])
def test_packed_integers_hold_information(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 120, (64, 64), generator=torch.Generator().manual_seed(0))
    assert ordinary_reason(codes.to(dtype)) is None


# Always ordinary: what any model could have


@given(
    length=st.sampled_from([8, 9, 33, 128, 1500]),
    width=st.sampled_from([8, 64, 128]),
    base=BASES,
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=30)
def test_position_tables_and_rotary_caches(length: int, width: int, base: float, dtype: torch.dtype) -> None:
    turns = angles(length, width, base)
    sines, cosines = turns.sin(), turns.cos()
    interleaved = torch.stack([sines, cosines], 2).flatten(1)
    tables = [torch.cat([sines, cosines], 1), interleaved, torch.cat([cosines, cosines], 1), sines]
    for table in tables:
        assert ordinary_reason(table.to(dtype)), table.shape
        assert ordinary_reason(1.3 * table[None, None].to(dtype))
    scaled = torch.outer(torch.arange(length).float(), llama3_scaled(inverse_frequencies(width, base)))
    assert ordinary_reason(scaled.cos().to(dtype))


@given(width=st.sampled_from([8, 32, 64, 128, 256]), base=BASES, dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=40)
def test_inverse_frequencies(width: int, base: float, dtype: torch.dtype) -> None:
    frequencies = inverse_frequencies(width, base)
    for tensor in (frequencies, frequencies[None, :], llama3_scaled(frequencies)):
        assert ordinary_reason(tensor.to(dtype))


def test_complex_rotary_cache() -> None:
    turns = angles(512, 64, 1e4)
    assert ordinary_reason(torch.polar(torch.ones_like(turns), turns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 16, 40, 80, 201, 400])
def test_fixed_transforms(n: int, dtype: torch.dtype) -> None:
    index = torch.arange(n).double()
    dct = torch.cos(math.pi * (index + 0.5) * index[:, None] / n) * math.sqrt(2 / n)
    dct[0] /= math.sqrt(2)
    phase = 2 * math.pi * index * index[:, None] / n
    dft = torch.cat([phase.cos(), phase.sin()])
    window = torch.hann_window(n, dtype=torch.float64)
    for tensor in (dct, dct.T, dft, phase.float().cos(), phase.float().cos() * window, window):
        assert ordinary_reason(tensor.to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32])
def test_masks_identities_and_sequences(dtype: torch.dtype) -> None:
    for tensor in (
        torch.zeros(64, 64),
        torch.ones(4096),
        torch.eye(64),
        torch.ones(64, 64).tril(),
        torch.ones(64, 64).tril()[None, None],
        torch.arange(512),
        torch.arange(512)[None],
        torch.arange(512).flip(0),
        torch.arange(512).expand(4, 512),
        torch.arange(64)[:, None] * torch.arange(8),
    ):
        assert ordinary_reason(tensor.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_masks_and_slopes(dtype: torch.dtype) -> None:
    hidden = torch.full((64, 64), -math.inf).triu(1).to(dtype)
    assert ordinary_reason(hidden) == "only two distinct values"
    assert ordinary_reason(torch.full((64, 64), torch.finfo(dtype).min, dtype=dtype).triu(1))
    slopes = 2.0 ** (-torch.arange(1, 33) / 4)
    assert ordinary_reason(slopes.to(dtype)) == "monotone vector"
    assert ordinary_reason((slopes[:, None, None] * torch.arange(-127, 1)).to(dtype))
    assert ordinary_reason((1.1 ** torch.arange(40.0) * torch.tensor([[1.0], [-2.0]])).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bands", "bins"), [(80, 201), (128, 201), (64, 513)])
def test_filter_banks(bands: int, bins: int, dtype: torch.dtype) -> None:
    edges = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, 8000, bins)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(rising, falling).clamp(min=0) * 2 / (edges[2:] - edges[:-2])
    assert "zeros" in ordinary_reason(bank.to(dtype))
    assert "zeros" in ordinary_reason(bank.T.to(dtype))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(0), "empty"),
        (torch.tensor(0.7), "constant"),
        (torch.tensor([1.5]), "constant"),
        (torch.rand(4, 4) > 0.5, "boolean"),
        (torch.full((9,), math.nan), "NaN"),
        (torch.tensor([math.nan, 1.0, 1.0]), "two distinct"),
        (torch.tensor([0.3, -1.2, 0.8, 2.2]), "64 bits"),
        (torch.cat([torch.ones(5000), torch.tensor([0.3, -2.0])]), "64 bits"),
        (torch.cat([torch.ones(5000), torch.tensor([0.3, math.nan])]), "64 bits"),
        (torch.tensor([0.3, -1.2, 0.8, 2.2]).to(torch.float8_e5m2), "64 bits"),
    ],
)
def test_little_information(tensor: Tensor, words: str) -> None:
    assert words in ordinary_reason(tensor)


def test_position_grids_padded_tables_and_identities() -> None:
    side, width = 8, 16
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], 2).reshape(side**2, width)
    with_class_token = torch.cat([torch.zeros(1, width), grid])[None]
    for table in (grid, with_class_token, with_class_token.float(), with_class_token.bfloat16()):
        assert ordinary_reason(table) is not None
    positions = torch.arange(64, dtype=torch.float64)[:, None] * frequencies
    assert ordinary_reason(torch.cat([torch.zeros(1, 4), positions.sin()])) is not None
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    assert ordinary_reason(torch.eye(64, 256) + 0.001 * noise) is not None
    assert ordinary_reason(torch.eye(64, 256) + noise) is None
    assert ordinary_reason(noise) is None
    assert ordinary_reason(noise[:, :64].repeat_interleave(2, 1)) is None


# Tables that a rule filled, before training changed them a little


@given(
    rows=st.sampled_from([64, 300, 2048]),
    states=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 9999),
    dtype=st.sampled_from(DTYPES),
    deviation=st.sampled_from([0.01, 0.1, 0.5]),
)
@settings(deadline=None, max_examples=30)
def test_states_of_state_space_models_are_alike_in_any_two(
    rows: int, states: int, seed: int, dtype: torch.dtype, deviation: float
) -> None:
    """A_log starts as the logarithms of 1 to n in every row; transposed, under any name, alone or in a stack of one."""
    table = torch.arange(1.0, states + 1, dtype=torch.float64).log() + deviation * normal((rows, states), seed)
    for one in (table, -table.exp(), table.T.contiguous(), table[None]):
        assert "repeat one smooth sequence" in (ordinary_reason(one.to(dtype)) or "")


@given(seed=st.integers(0, 9999), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=20)
def test_an_embedding_of_smooth_content_but_unordered_channels_decides(seed: int, dtype: torch.dtype) -> None:
    table = torch.arange(1.0, 65, dtype=torch.float64).log() + 0.1 * normal((300, 64), seed)
    assert ordinary_reason(table.to(dtype))
    assert ordinary_reason(shuffled(table, seed).to(dtype)) is None
    assert ordinary_reason((0.3 * table + normal((300, 64), seed + 1)).to(dtype)) is None


# What the beginning tells


@given(
    shape=st.sampled_from([(300, 400), (512, 64), (64, 2048), (8, 9000), (1, 40, 2000), (4, 300, 200), (1 << 17,)]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 0.01]),
)
@settings(deadline=None, max_examples=60)
def test_the_beginning_of_trained_tensors_clears_them(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, mean: float
) -> None:
    weights = (mean + 0.02 * normal(shape, seed)).to(dtype)
    assert not may_be_ordinary(weights.reshape(-1)[: head_elements(shape)], shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_beginning_of_unusual_weights_clears_them(dtype: torch.dtype) -> None:
    weights = 0.02 * normal((400, 256), 1)
    padded = weights.clone()
    padded[0] = 0  # the embedding of a padding token
    dead = weights.clone()
    dead[:, ::3] = 0
    smooth = shuffled(torch.sin(angles(400, 512, 1e4)).double(), 1) + 0.02 * normal((400, 256), 2)
    outlier = weights.clone()
    outlier[3, 5] = 50
    for tensor in (padded, dead, smooth, outlier, weights * 1e-3):
        assert not may_be_ordinary(tensor.to(dtype).reshape(-1)[: head_elements(tensor.shape)], tensor.shape)


def test_what_a_beginning_is_too_short_for_is_left_to_the_caller() -> None:
    stack = 0.02 * normal((16, 40, 50), 3)
    shapes = [(16, 40, 50), (8, 4000, 3000), (12, 1 << 20)]
    for shape in shapes:
        head = stack.reshape(-1).repeat(200)[: head_elements(shape)]
        assert not may_be_ordinary(head, shape)
        assert may_be_ordinary(head, shape, if_unseen=True)
    along_the_first_axis = torch.arange(40.0)[:, None, None] * normal((1, 300, 400), 4)
    assert ordinary_reason(along_the_first_axis) is not None


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (5, 0), (3,), (8, 8), (4096, 14336), (1 << 20, 1 << 20)])
def test_the_beginning_is_short(shape: tuple[int, ...]) -> None:
    elements = head_elements(shape)
    assert elements <= min(math.prod(shape), LARGEST_HEAD)
    if len(shape) == 2 and shape[0] == 4096:
        assert elements == 66 * 14336  # the first line of a square grid, and one that tells


def test_a_head_shorter_than_a_row_tells_nothing() -> None:
    head = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert may_be_ordinary(head, (64, 200), if_unseen=True)
    assert not may_be_ordinary(head, (64, 200))
