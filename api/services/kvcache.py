"""Low-rank key-value caches of one model, measured side by side or planned with its weights: use-cases like those of
`usecases.py`.

What lives here: picking tokens, ranks by strategy, and figures; the plan of weights and cache under one budget.
Calibration and measuring are the profiler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from allocator.errors import StrategyError

if TYPE_CHECKING:
    from torch import Tensor

    from allocator.plan import Plan
    from compressor.kvcache.ranks import CoefficientBits, Ranks
    from profiler.documents.profile import Profile
    from profiler.evaluation.divergence import EmptyCache
    from profiler.kvcache.profile import CacheProfile
    from profiler.kvcache.study import CacheFigures, KeysAndValues
    from profiler.model.layers import LoadedModel
    from profiler.statistics.calibration import Progress

STRATEGIES = ("uniform", "progressive", "adaptive", "manual")
CALIBRATION_TOKENS = 8_192


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """ratio and bits: those of `preset` where None; start and end are the ratios of `progressive`, 1.2 and 0.8 times
    the ratio where None."""

    strategies: tuple[str, ...] = STRATEGIES[:3]
    preset: str | None = None
    ratio: float | None = None
    bits: CoefficientBits | None = None
    chunk_size: int | None = None
    context: int | None = None
    start_ratio: float | None = None
    end_ratio: float | None = None
    ranks: Path | None = None
    text: Path | None = None
    calibration: tuple[Path, ...] = ()
    tokens: int = 4_096
    device: str = "cpu"


def measure_caches(model: str, settings: CacheSettings, progress: Progress) -> list[CacheFigures]:
    """One row for each strategy. Raises `CacheError`, `StrategyError`, `CalibrationError`."""
    from compressor.kvcache.ranks import predicted_bytes
    from profiler.kvcache.study import (
        CacheFigures,
        cache_kl,
        decode_speed,
        keys_and_values,
        plain_bytes,
        plain_speed,
        reference_logits,
    )
    from profiler.model.checkpoint import find_model
    from profiler.model.layers import load_model

    for name in settings.strategies:
        if name not in STRATEGIES:
            raise StrategyError(f"cache strategy {name!r} is unknown; use one of {', '.join(STRATEGIES)}")
    loaded = load_model(find_model(model), settings.device)
    context, chunk_size = _context(loaded, settings.context), _chunk_size(loaded, settings.chunk_size)
    ratio, bits = _share(loaded, settings)
    measured_NT = _windows(_measured_tokens(loaded, settings, model), context)
    calibration_NT = _tokens(loaded, settings.calibration, CALIBRATION_TOKENS, 0)
    found = keys_and_values(loaded, calibration_NT, chunk_size, progress)
    speed = plain_speed(loaded, measured_NT[0])
    rows: list[CacheFigures] = []
    with TemporaryDirectory(prefix="bitrank-kvcache-") as folder:
        reference = reference_logits(loaded, measured_NT, Path(folder))
        for name in settings.strategies:
            ranks = _ranks(name, loaded, found, settings, ratio, context, calibration_NT, progress)
            cache = found.cache(ranks, bits)
            decoded = decode_speed(loaded, measured_NT[0], cache)
            kl_N = cache_kl(loaded, reference, measured_NT, partial(found.cache, ranks, bits))
            progress("measuring caches", len(rows) + 1, len(settings.strategies))
            rows.append(
                CacheFigures(
                    name,
                    context,
                    float(ranks.mean()),
                    cache.held_bytes(),
                    predicted_bytes(ranks, context, 1, found.chunk_size, found.dtype.itemsize, bits),
                    cache.held_bytes() / plain_bytes(found, context),
                    float(kl_N.mean()),
                    float(kl_N.std(ddof=1) / len(kl_N) ** 0.5) if len(kl_N) > 1 else float("nan"),
                    decoded,
                    speed,
                )
            )
    return rows


def plan_jointly(
    profile: Profile, budget: str, context: int, batch: int, progress: Progress, device: str = "cpu"
) -> Plan:
    """The plan of least predicted KL for the weights and the cache of `batch` sequences of `context` tokens together.

    The first time, the cache is measured and kept beside the profile. Raises `CacheError`, `CompanionError`,
    `PlanError` for other weights, and what `parse_joint_budget` and `joint_bytes` raise.
    """
    from allocator.kv_cache import joint_plan, parse_joint_budget
    from api.services.usecases import with_warnings

    parsed = parse_joint_budget(budget)
    menu = cache_profile(profile, context, progress, device).menu(context, batch)
    return with_warnings(joint_plan(profile.planner, menu, parsed), profile)


def cache_profile(profile: Profile, context: int, progress: Progress, device: str = "cpu") -> CacheProfile:
    """What the cache of the profiled model can be, measured if it was not yet."""
    from allocator.errors import PlanError
    from profiler.kvcache.profile import load_cache_profile, measure_cache_profile
    from profiler.model.checkpoint import find_model, weights_sha256
    from profiler.model.layers import load_model

    ref = find_model(profile.document.model.id)
    _check_context(ref.id, _longest(ref.path), context)
    if found := load_cache_profile(profile):
        return found
    if weights_sha256(ref) != profile.document.model.weights_sha256:
        raise PlanError(f"the weights of {ref.id} are not those of {profile.path}; profile this model again")
    loaded = load_model(ref, device)
    return measure_cache_profile(profile, loaded, _chunk_size(loaded, None), progress)


def files_of_cache(plan: Plan, profile: Profile) -> dict[str, bytes]:
    """What a checkpoint carries of the plan's cache, by name; nothing where the plan has none."""
    from allocator.errors import PlanError
    from compressor.kvcache.layout import FILE, layout_file
    from profiler.kvcache.profile import load_cache_profile

    if plan.cache is None:
        return {}
    found = load_cache_profile(profile)
    if found is None or found.document.arrays_sha256 != plan.cache.bases_sha256:
        raise PlanError(
            f"{profile.path} does not have the bases that the plan's cache was made with; plan with --context again"
        )
    return {FILE: layout_file(plan.cache, found.bases)}


def cache_of(loaded: LoadedModel) -> EmptyCache | None:
    """Empty caches of the kind that a checkpoint was planned with; None where it is of weights alone."""
    from compressor.kvcache.layout import FILE, load_layout

    return load_layout(loaded.ref.path, loaded.model).empty if (loaded.ref.path / FILE).exists() else None


def _longest(path: Path) -> int | None:
    """Tokens that a model's configuration allows."""
    import json

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return None if found is None else int(found)


def _check_context(model: str, longest: int | None, context: int) -> None:
    from compressor.kvcache.ranks import CacheError

    if context < 32 or (longest is not None and context > longest):
        bounds = "at least 32" if longest is None else f"32 to {longest}"
        raise CacheError(f"a context of {context} tokens is not one of {model}; use {bounds}")


def _ranks(
    name: str,
    loaded: LoadedModel,
    found: KeysAndValues,
    settings: CacheSettings,
    ratio: float,
    context: int,
    calibration_NT: Tensor,
    progress: Progress,
) -> Ranks:
    from compressor.kvcache import ranks as kvranks
    from profiler.kvcache.study import PROBE_WINDOWS, adaptive_ranks, reference_logits, sensitivities

    shape, size = found.shape, found.chunk_size
    if name == "manual":
        return kvranks.manual(shape, _rank_map(settings.ranks), size)
    if name == "progressive":
        start = min(1.0, 1.2 * ratio) if settings.start_ratio is None else settings.start_ratio
        end = 0.8 * ratio if settings.end_ratio is None else settings.end_ratio
        return kvranks.progressive(shape, start, end, context, size)
    even = kvranks.uniform(shape, ratio, context, size)
    if name == "uniform":
        return even
    probes_NT = calibration_NT[:PROBE_WINDOWS]
    with TemporaryDirectory(prefix="bitrank-kvcache-") as folder:
        reference = reference_logits(loaded, probes_NT, Path(folder))
        weight_LK = sensitivities(loaded, found, reference, probes_NT, progress)
    return adaptive_ranks(found, weight_LK, int(even.sum()))


def _rank_map(path: Path | None) -> dict[str, int]:
    import yaml  # type: ignore[import-untyped]
    from pydantic import TypeAdapter, ValidationError

    if path is None:
        raise StrategyError("cache strategy 'manual' needs ranks; give a YAML file with --ranks")
    try:
        return TypeAdapter(dict[str, int]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StrategyError(
            f"cannot read ranks from {path} ({reason}); write lines like '*.k.*.*: 12'"
        ) from error


def _context(loaded: LoadedModel, context: int | None) -> int:
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if context is not None:
        _check_context(loaded.ref.id, longest, context)
    return context or loaded.window


def _share(loaded: LoadedModel, settings: CacheSettings) -> tuple[float, Any]:
    from compressor.kvcache.ranks import preset_for, presets

    known = presets()
    name = settings.preset or preset_for(sum(layer.weights for layer in loaded.layers))
    if name not in known:
        raise StrategyError(f"preset {name!r} is unknown; use one of {', '.join(known)}")
    ratio = known[name].ratio if settings.ratio is None else settings.ratio
    return ratio, settings.bits or known[name].bits


def _chunk_size(loaded: LoadedModel, given: int | None) -> int:
    """Half a head if none is given, so that its parts can have ranks of their own."""
    from compressor.kvcache.ranks import check_chunks

    config = loaded.model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    chunk_size = given if given is not None else int(head // 2 if head % 2 == 0 else head)
    check_chunks(head, chunk_size)
    return chunk_size


def _measured_tokens(loaded: LoadedModel, settings: CacheSettings, model: str) -> Tensor:
    from profiler.model.checkpoint import DEMO, DEMO_PATH

    text = DEMO_PATH / "evaluation.txt" if settings.text is None and model == DEMO else settings.text
    return _tokens(loaded, () if text is None else (text,), settings.tokens, 1)


def _tokens(loaded: LoadedModel, texts: Sequence[Path], count: int, seed: int) -> Tensor:
    """Of the texts, mixed evenly; without any, sampled from the model."""
    from profiler.statistics.calibration import sample_tokens, text_tokens

    return text_tokens(loaded, texts, count) if texts else sample_tokens(loaded, count, seed)


def _windows(tokens_NT: Tensor, context: int) -> Tensor:
    from compressor.kvcache.ranks import CacheError

    flat = tokens_NT.flatten()
    if len(flat) < context:
        raise CacheError(f"{len(flat)} tokens do not fill a context of {context}; give more text or --tokens")
    return flat[: len(flat) // context * context].view(-1, context)


def summary(rows: Sequence[CacheFigures]) -> str:
    """How adaptive ranks do beside uniform ones, in one sentence; empty where either was not measured."""
    by_name = {row.strategy: row for row in rows}
    if not {"uniform", "adaptive"} <= by_name.keys():
        return ""
    share = by_name["adaptive"].kl_nats / by_name["uniform"].kl_nats
    return f"adaptive loses {share:.3f} of what uniform loses at the same bytes"
