"""Error curves of a profile as answers: JSON models, and the same rows as CSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from io import BytesIO, StringIO
from math import exp
from typing import TYPE_CHECKING, Any

from api.problems import ProblemError
from api.schemas.documents import Interval, LayerCurve, PredictedError
from api.schemas.report import CurveFit, MeasuredError

if TYPE_CHECKING:
    from profiler.documents.profile import Profile

GROUP_SIZE = 64
COLUMNS = (
    "layer",
    "kind",
    "bits",
    "rank",
    "group_size",
    "factor_bits",
    "error",
    "error_low",
    "error_high",
    "kl_nats",
    "heads",
    "rotated",
)


def layer_curves(
    profile: Profile, pattern: str, bits: Sequence[float], ranks: Sequence[int], most_points: int
) -> list[LayerCurve]:
    """The curves of the layers that match a glob; predictions at every pair of `bits` and `ranks`.

    Without `bits` those of the grid, without `ranks` those of the grid. Raises `ProblemError` (unknown-layer).
    """
    names = [name for name in profile.document.layers if fnmatchcase(name, pattern)]
    if not names:
        example = next(iter(profile.document.layers))
        raise ProblemError("unknown-layer", f"no layer matches {pattern!r}; names look like {example!r}")
    wanted_bits = sorted(set(bits)) or [float(b) for b in profile.document.grid.bits]
    wanted_ranks = sorted(set(ranks)) or sorted(profile.document.grid.ranks)
    if len(names) * len(wanted_bits) * len(wanted_ranks) > most_points:
        raise ProblemError(
            "invalid-request",
            f"this asks for more than {most_points:,} points; name fewer layers, bits or ranks",
        )
    return [_curve(profile, name, wanted_bits, wanted_ranks) for name in names]


def _curve(profile: Profile, name: str, bits: Sequence[float], ranks: Sequence[int]) -> LayerCurve:
    record = profile.document.layers[name]
    return LayerCurve(
        layer=name,
        block=record.block,
        projection=record.projection,
        fit=CurveFit(**{k: v for k, v in asdict(record.fit).items() if k in CurveFit.model_fields}),
        measured=[
            MeasuredError(**asdict(m.option), error=m.error)
            for m in profile.measurements[name]
            if not m.half_width
        ],
        predicted=_predicted(profile, name, bits, ranks),
    )


def _predicted(
    profile: Profile, name: str, bits: Sequence[float], ranks: Sequence[int]
) -> list[PredictedError]:
    """By the closed form where the profile has it for an option, by the smooth fit elsewhere."""
    fit = profile.document.layers[name].fit
    closed: dict[tuple[float, int], tuple[float, float]] = {
        (m.option.bits, m.option.rank): (m.error, exp(m.half_width))
        for m in profile.measurements[name]
        if m.half_width and m.option.group_size == GROUP_SIZE
    }

    def at(width: float, rank: int) -> PredictedError:
        error, ratio = closed.get((width, rank)) or (fit.error(width, rank, GROUP_SIZE), fit.worst_ratio)
        return PredictedError(
            bits=width,
            rank=rank,
            group_size=GROUP_SIZE,
            error=error,
            interval=Interval(low=error / ratio, high=error * ratio),
            kl_nats=error * profile.price(name, width),
        )

    return [at(width, rank) for rank in ranks for width in bits]


def curve_rows(profile: Profile, curves: Sequence[LayerCurve]) -> list[tuple[Any, ...]]:
    """One row of `COLUMNS` per measured and predicted point; a measured point is its own interval."""
    rows: list[tuple[Any, ...]] = []
    for curve in curves:
        for m in curve.measured:
            option = (float(m.bits), m.rank, m.group_size, m.factor_bits)
            kl_nats = m.error * profile.price(curve.layer, m.bits)
            kinds = (m.heads, m.rotated)
            rows.append((curve.layer, "measured", *option, m.error, m.error, m.error, kl_nats, *kinds))
        for p in curve.predicted:
            option = (p.bits, int(p.rank), p.group_size, 0)
            interval = (p.interval.low, p.interval.high)
            rows.append((curve.layer, "predicted", *option, p.error, *interval, p.kl_nats, 1, False))
    return rows


def as_csv(rows: Sequence[tuple[Any, ...]]) -> bytes:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[tuple[Any, ...]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns = zip(COLUMNS, zip(*rows, strict=True), strict=True)
    buffer = BytesIO()
    parquet.write_table(pa.table({name: list(values) for name, values in columns}), buffer)
    return buffer.getvalue()
