"""The parts of a tiny model of each family are what they are called: its logits say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.checkpoint.tiny_models import GATELESS, TEXT, edited, logits, matrices, part_of


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("model_type", sorted(set(TEXT) - {"bloom", "gpt2", "opt"}))
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
