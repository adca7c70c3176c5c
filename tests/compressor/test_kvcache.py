"""Low-rank key-value caches: what they hold, what they give back, and ranks that cannot be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.kvcache.cache import (
    Bases,
    LowRankCache,
    LowRankLayer,
    Plain,
    Projected,
    Side,
    rotated,
    unrotated,
)
from compressor.kvcache.layout import codec_of, side_of
from compressor.kvcache.ranks import (
    CacheError,
    adaptive,
    check_chunks,
    check_ranks,
    manual,
    optimal_rank_analysis,
    predicted_bytes,
    preset_for,
    presets,
    progressive,
    rank_within,
    true_ratio,
    uniform,
)

HEADS, HEAD, CHUNK, TOKENS = 2, 8, 4, 24
SHAPE = (1, 2, HEADS, HEAD // CHUNK)
MakeTensor = Callable[..., torch.Tensor]


def angles(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle_Tn = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    angle_Tn = torch.cat([angle_Tn, angle_Tn], dim=-1)
    return 1.5 * angle_Tn.cos(), 1.5 * angle_Tn.sin()


def layer_of(ranks: np.ndarray, bits: int = 16) -> LowRankLayer:
    generator = torch.Generator().manual_seed(0)

    def side(rank_HC: np.ndarray) -> Side:
        square = torch.linalg.qr(torch.randn(rank_HC.size, CHUNK, CHUNK, generator=generator)).Q
        blocks = tuple(q[:, :r].contiguous() for q, r in zip(square, rank_HC.ravel(), strict=True))
        bases = Bases(blocks, HEADS)
        return Projected(bases, codec_of(bases, bits, torch.float32))

    return LowRankLayer(side(ranks[0, 0]), side(ranks[0, 1]), angles)


def keys_and_values(normal: MakeTensor) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(3, HEADS, TOKENS, HEAD), normal(3, HEADS, TOKENS, HEAD, seed=1)


def test_undoing_a_rotation_gives_what_was_rotated(normal: MakeTensor) -> None:
    key_BHTd, turn = normal(2, HEADS, TOKENS, HEAD), angles(TOKENS)
    assert not torch.allclose(rotated(key_BHTd, *turn), key_BHTd, atol=0.1)
    torch.testing.assert_close(unrotated(rotated(key_BHTd, *turn), *turn), key_BHTd)


def test_at_full_rank_everything_comes_back(normal: MakeTensor) -> None:
    key_BHTd, value_BHTd = keys_and_values(normal)
    found = layer_of(np.full(SHAPE, CHUNK)).update(key_BHTd, value_BHTd)
    torch.testing.assert_close(found[0], key_BHTd, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], value_BHTd, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_token_by_token_is_as_all_at_once(normal: MakeTensor, bits: int) -> None:
    key_BHTd, value_BHTd = keys_and_values(normal)
    ranks = uniform(SHAPE, 0.5, TOKENS, CHUNK)
    whole, stream = layer_of(ranks, bits), layer_of(ranks, bits)
    at_once = whole.update(key_BHTd, value_BHTd)
    for t in range(TOKENS):
        streamed = stream.update(key_BHTd[:, :, t : t + 1], value_BHTd[:, :, t : t + 1])
    for one, other in zip(at_once, streamed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert stream.get_seq_length() == TOKENS and stream.held_bytes() == whole.held_bytes()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank_HC", [[[1, 2], [3, 4]], [[0, 3], [0, 0]], [[4, 4], [4, 3]], [[0, 0], [0, 0]]])
def test_the_bytes_held_are_the_bytes_predicted(
    normal: MakeTensor, bits: int, rank_HC: list[list[int]]
) -> None:
    ranks = np.array([[rank_HC, [[2, 1], [4, 2]]]])
    layer = layer_of(ranks, bits)
    layer.update(*keys_and_values(normal))
    assert LowRankCache([layer]).held_bytes() == predicted_bytes(ranks, TOKENS, 3, CHUNK, 4, bits)


def test_full_ranks_that_are_not_rounded_are_stored_plainly(normal: MakeTensor) -> None:
    key_BHTd, value_BHTd = keys_and_values(normal)
    full_HC, vector_HCcc = np.full((HEADS, 2), CHUNK), torch.eye(CHUNK).expand(HEADS, 2, CHUNK, CHUNK)
    plain = side_of(vector_HCcc, full_HC, 16, torch.bfloat16)
    assert plain == Plain(torch.bfloat16)
    assert isinstance(side_of(vector_HCcc, full_HC, 8, torch.bfloat16), Projected)
    layer = LowRankLayer(plain, plain, angles)
    for found, put in zip(layer.update(key_BHTd, value_BHTd), (key_BHTd, value_BHTd), strict=True):
        assert torch.equal(found, put.bfloat16().float())
    assert layer.held_bytes() == predicted_bytes(np.full(SHAPE, CHUNK), TOKENS, 3, CHUNK, 2)
    assert layer.held_bytes() == 2 * 3 * HEADS * TOKENS * HEAD * 2


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_sequences_are_chosen_repeated_and_cut_short(normal: MakeTensor, bits: int) -> None:
    key_BHTd, value_BHTd = keys_and_values(normal)
    ranks, new = uniform(SHAPE, 0.5, TOKENS, CHUNK), (normal(3, HEADS, 1, HEAD), normal(3, HEADS, 1, HEAD))
    order = torch.tensor([2, 0, 0])
    changed, straight = layer_of(ranks, bits), layer_of(ranks, bits)
    changed.update(key_BHTd, value_BHTd)
    changed.crop(-4)
    changed.reorder_cache(order)
    straight.update(key_BHTd[order][:, :, :-4], value_BHTd[order][:, :, :-4])
    for one, other in zip(changed.update(*new), straight.update(*new), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    changed.batch_repeat_interleave(2)
    changed.batch_select_indices(torch.tensor([0, 2, 5]))
    for one, other in zip(changed.update(*new), straight.update(*new), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_fewer_bits_lose_more_and_hold_less(normal: MakeTensor) -> None:
    key_BHTd, value_BHTd = keys_and_values(normal)
    lost, held = [], []
    for bits in (16, 8, 4):
        layer = layer_of(np.full(SHAPE, CHUNK), bits)
        lost.append((layer.update(key_BHTd, value_BHTd)[1] - value_BHTd).norm().item())
        held.append(layer.held_bytes())
    assert lost == sorted(lost) and lost[2] < 0.2 * value_BHTd.norm()
    assert held == sorted(held, reverse=True)


@given(st.integers(1, 64), st.integers(1, 2000), st.floats(0.01, 1))
def test_a_rank_is_the_highest_within_the_true_ratio(chunk: int, tokens: int, ratio: float) -> None:
    rank = rank_within(ratio, tokens, chunk)
    assert rank == 0 or true_ratio(rank, tokens, chunk) <= ratio + 1e-9
    assert rank == chunk or true_ratio(rank + 1, tokens, chunk) > ratio


def test_the_true_ratio_counts_the_basis() -> None:
    assert true_ratio(16, 512, 32) == pytest.approx(16 * (512 + 32) / (512 * 32))
    ranks = np.full((3, 2, 4, 2), 16)
    plain = ranks.size * 512 * 32 * 4
    assert predicted_bytes(ranks, 512, 1, 32, 4) / plain == pytest.approx(true_ratio(16, 512, 32))


@given(st.integers(0, 2**16), st.integers(0, 16))
def test_adaptive_ranks_leave_the_least_energy(seed: int, total: int) -> None:
    energy = np.sort(np.random.default_rng(seed).random((1, 2, 1, 2, 4)), axis=-1)[..., ::-1]
    ranks = adaptive(energy, total)
    assert ranks.sum() == total and (ranks <= 4).all()
    kept = sum(energy[place][:rank].sum() for place, rank in np.ndenumerate(ranks))
    assert kept == pytest.approx(np.sort(energy.ravel())[::-1][:total].sum())


def test_progressive_ranks_change_from_the_first_chunk_to_the_last() -> None:
    ranks = progressive((3, 2, 2, 4), 1.0, 0.25, 10**6, 16)
    assert (np.diff(ranks, axis=3) < 0).all() and (np.diff(ranks, axis=0) == 0).all()
    assert (np.diff(progressive((3, 2, 2, 1), 1.0, 0.25, 10**6, 16), axis=0) < 0).all()


def test_an_analysis_gives_the_rank_and_what_it_leaves(normal: MakeTensor) -> None:
    tensor_Tc = normal(100, 3) @ normal(3, 16, seed=1)
    assert optimal_rank_analysis(tensor_Tc, 0.5) == (6, pytest.approx(0, abs=1e-6))
    rank, left = optimal_rank_analysis(normal(100, 16), 0.5)
    assert rank == 6 and 0.5 < left < 0.9
    assert optimal_rank_analysis(torch.zeros(10, 4), 0.5)[1] == 0


def test_presets_rise_in_thrift_and_go_by_size() -> None:
    known = presets()
    assert list(known) == ["conservative", "balanced", "aggressive"]
    cost = [preset.ratio * preset.bits for preset in known.values()]
    assert cost == sorted(cost, reverse=True) and len(set(cost)) == 3
    assert (preset_for(10**8), preset_for(7 * 10**9)) == ("conservative", "balanced")


def test_a_map_by_hand_takes_the_first_glob_that_matches() -> None:
    ranks = manual(SHAPE, {"0.k.1.*": 1, "*.k.*": 2, "*": 3}, CHUNK)
    assert ranks[0].tolist() == [[[2, 2], [1, 1]], [[3, 3], [3, 3]]]


def test_what_a_cache_cannot_be_is_said() -> None:
    with pytest.raises(CacheError, match="chunks of 3 do not divide a head of 8; use one of 1, 2, 4, 8"):
        check_chunks(8, 3)
    with pytest.raises(CacheError, match="rank 5 does not fit a chunk of 4; use 0 to 4"):
        check_ranks(np.full(SHAPE, 5), CHUNK)
    with pytest.raises(CacheError, match=r"the map has no rank for chunk 0\.v\.0\.0; add one"):
        manual(SHAPE, {"*.k.*": 2}, CHUNK)
    with pytest.raises(CacheError, match="ratio 1.5 is no share of a cache"):
        uniform(SHAPE, 1.5, TOKENS, CHUNK)
