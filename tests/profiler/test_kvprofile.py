"""What a key-value cache can be, measured once beside a profile, and what is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allocator.kv_cache import planned_cache
from allocator.plan import PlanCache
from compressor.kvcache.layout import DTYPE, FILE, layout_file, load_layout
from compressor.kvcache.ranks import CacheError, Ranks
from profiler.documents.profile import Profile, load_profile
from profiler.documents.sidecar import CompanionError
from profiler.evaluation.divergence import compare, live_logits
from profiler.kvcache.profile import (
    ARRAYS,
    CacheProfile,
    group_error,
    load_cache_profile,
    measure_cache_profile,
)
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.statistics.calibration import silent

CHUNK, CONTEXT, BATCH = 8, 48, 3


@pytest.fixture(scope="module")
def own(tiny_profile: Callable[[str], Profile], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A copy that files may be put beside."""
    path = tmp_path_factory.mktemp("own") / "profile"
    shutil.copytree(tiny_profile("llama").path, path)
    return load_profile(path)


@pytest.fixture(scope="module")
def found(own: Profile) -> CacheProfile:
    return measure_cache_profile(own, load_model(find_model(own.document.model.id)), CHUNK, silent)


def planned(found: CacheProfile, total: float) -> PlanCache:
    """A mixed cache: each group the cheapest option of about `total` of its plain bytes."""
    menu = found.menu(CONTEXT, BATCH)
    each = total * menu.plain_bytes / len(menu.groups)
    choice = [int(np.where(g.total_bytes <= each, g.cost, np.inf).argmin()) for g in menu.groups]
    return planned_cache(menu, np.array(choice))


def test_it_is_measured_once_and_read_again(
    own: Profile, found: CacheProfile, tiny_llama: LoadedModel
) -> None:
    again = load_cache_profile(own)
    assert again is not None and again.document == found.document
    before = (own.path / ARRAYS).read_bytes()
    measure_cache_profile(own, tiny_llama, CHUNK, silent)
    assert (own.path / ARRAYS).read_bytes() == before


def test_damage_is_found(own: Profile, found: CacheProfile, tmp_path: Path) -> None:
    copy = tmp_path / "profile"
    shutil.copytree(own.path, copy)
    (copy / ARRAYS).write_bytes((copy / ARRAYS).read_bytes()[:-1])
    with pytest.raises(CompanionError, match="delete both and plan again"):
        load_cache_profile(replace(own, path=copy))
    (copy / ARRAYS).unlink()
    with pytest.raises(CompanionError, match="cannot read"):
        load_cache_profile(replace(own, path=copy))


def test_the_error_foretold_is_the_error_made(found: CacheProfile) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TC = torch.randn(20_000, CHUNK, generator=generator) * torch.arange(CHUNK, 0, -1)
    energy = x_TC.square().mean(0).double().numpy()[None, None]
    largest = x_TC.square().cummax(dim=1).values.mean(0).double().numpy()[None, None]
    for rank, bits in ((3, 8), (5, 4), (8, 4), (6, 16)):
        ranks: Ranks = np.array([[rank]])
        top = 2 ** (bits - 1) - 1
        step_T1 = x_TC[:, :rank].abs().amax(1, keepdim=True) / top
        kept = x_TC[:, :rank] if bits == 16 else (x_TC[:, :rank] / step_T1).round() * step_T1
        made = (x_TC[:, :rank] - kept).square().sum(1).mean() + x_TC[:, rank:].square().sum(1).mean()
        assert group_error(energy, largest, ranks, bits) == pytest.approx(made.item(), rel=0.06)


def test_more_rank_costs_less_and_a_plain_group_nothing(found: CacheProfile) -> None:
    menu = found.menu(CONTEXT, BATCH)
    for group in menu.groups:
        for bits in (16, 8, 4):
            by_rank = [
                cost for option, cost in zip(group.options, group.cost, strict=True) if option.bits == bits
            ]
            assert (np.diff(by_rank) <= (0 if bits == 16 else 0.05 * by_rank[0])).all()
        free = np.flatnonzero(group.cost == 0)
        assert [group.options[k].bits for k in free] == [16]
        assert group.total_bytes[free[0]] == menu.plain_bytes // len(menu.groups)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 1.0])
def test_a_checkpoint_carries_the_cache_and_it_holds_the_planned_bytes(
    found: CacheProfile, tiny_llama: LoadedModel, tmp_path: Path, share: float
) -> None:
    cache = planned(found, share)
    (tmp_path / FILE).write_bytes(layout_file(cache, found.bases))
    assert layout_file(cache, found.bases) == (tmp_path / FILE).read_bytes()
    held = load_layout(tmp_path, tiny_llama.model).empty()
    tokens_NT = torch.randint(128, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tiny_llama.model(tokens_NT, past_key_values=held, use_cache=True)
    assert held.held_bytes() == cache.total_bytes


def test_a_plain_cache_loses_what_two_bytes_a_number_lose(
    found: CacheProfile, tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    kl = []
    tokens_NT = torch.randint(128, (4, CONTEXT), generator=torch.Generator().manual_seed(1))
    for share in (1.0, 0.5, 0.25):
        (tmp_path / FILE).write_bytes(layout_file(planned(found, share), found.bases))
        empty = load_layout(tmp_path, tiny_llama.model).empty
        kl.append(
            compare(tiny_llama.model, live_logits(tiny_llama), tokens_NT, cache=empty)[:, 0].mean().item()
        )
    assert kl == sorted(kl) and kl[0] < 1e-3 < kl[2]


def test_a_cache_of_another_model_or_a_damaged_one_is_refused(
    found: CacheProfile, tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match="has no kv_cache.bases; plan with --context"):
        load_layout(tmp_path, tiny_llama.model)
    cache = planned(found, 0.4)
    fewer = cache.model_copy(update={"groups": dict(list(cache.groups.items())[:2])})
    (tmp_path / FILE).write_bytes(layout_file(fewer, found.bases))
    with pytest.raises(CacheError, match="is of a model of 1 layers, this one has 2"):
        load_layout(tmp_path, tiny_llama.model)
    data = layout_file(cache, found.bases)
    (tmp_path / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheError, match="is damaged"):
        load_layout(tmp_path, tiny_llama.model)
    (tmp_path / FILE).write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(CacheError, match="has version 9, this code reads up to 1"):
        load_layout(tmp_path, tiny_llama.model)
    assert DTYPE.itemsize == 2
