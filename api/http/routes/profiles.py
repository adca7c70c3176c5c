"""/v1/profiles: make, list and read profiles, their curves, frontier, fidelity and spectra."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Path, Query
from pydantic import BaseModel
from starlette.responses import Response

from api.http.middleware.auth import requires
from api.http.routes.negotiation import IDEMPOTENT, NOT_MODIFIED, IfNoneMatch, accepted, tagged
from api.http.routes.submission import ACCEPTED, NewJobId, job_accepted
from api.http.service import Service, ServiceOf
from api.problems import responses
from api.schemas.documents import (
    EMBEDDINGS,
    PROFILE_ID,
    CurvesAnswer,
    FidelityAnswer,
    FrontierAnswer,
    ModelName,
    ProfileAnswer,
    ProfileLayer,
    ProfilePage,
    ProfileRequest,
    ProfileSummary,
    SpectrumAnswer,
    TablesAnswer,
)
from api.schemas.report import OptimalPoint, UniformPoint
from api.services.blocks import block_losses, spectra
from api.services.curves import as_csv, as_parquet, curve_rows, layer_curves
from api.storage.api_keys import Principal
from api.storage.database import ProfileRow

if TYPE_CHECKING:
    from profiler.documents.profile import Profile

JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
router = APIRouter(prefix="/v1/profiles", tags=["profiles"])
ProfileId = Annotated[str, Path(pattern=PROFILE_ID, description="A profile's id, its sha256.")]
Reader = Annotated[Principal, Depends(requires("read"))]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=200)]
BitsList = Annotated[
    list[Annotated[float, Query(ge=0, le=16, allow_inf_nan=False)]],
    Query(max_length=64, description="Bits to predict at; may be fractional."),
]
RankList = Annotated[
    list[Annotated[int, Query(ge=0, le=65_536)]], Query(max_length=64, description="Ranks to predict at.")
]
TABLES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The curves, or one row a point.",
        "content": {
            CSV: {"schema": {"type": "string"}},
            PARQUET: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
FOUND = {**NOT_MODIFIED, **responses("unknown-profile")}


@router.get("", responses=responses())
def list_profiles(
    service: ServiceOf,
    reader: Reader,
    model: Annotated[ModelName | None, Query()] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> ProfilePage:
    """The profiles there are, newest first, and the models that may be profiled."""
    rows, following = service.profiles.list(model, cursor, limit)
    return ProfilePage(
        profiles=[_summary(row) for row in rows], next_cursor=following, models=service.catalogue.names()
    )


@router.post(
    "",
    status_code=202,
    dependencies=[IDEMPOTENT],
    responses={**ACCEPTED, **responses("unknown-model", "too-large", "queue-full", "conflict")},
)
def submit_profile(
    request: Annotated[ProfileRequest, Body()],
    service: ServiceOf,
    owner: Annotated[Principal, Depends(requires("plan"))],
    job_id: NewJobId,
) -> Response:
    """Measure a model as a job; its result names the profile."""
    service.catalogue.resolve(request.model)
    return job_accepted(service.jobs.submit("profile", request.model_dump(mode="json"), owner.id, job_id))


@router.get("/{profile_id}", response_model=ProfileAnswer, responses=FOUND)
def read_profile(
    profile_id: ProfileId, service: ServiceOf, reader: Reader, if_none_match: IfNoneMatch = None
) -> Response:
    """What was measured of a model, and how."""
    return _answer(_profile(service, profile_id), profile_id, "profile", if_none_match)


@router.get(
    "/{profile_id}/curves",
    response_model=CurvesAnswer,
    responses={**TABLES, **FOUND, **responses("unknown-layer", "not-acceptable")},
)
def read_curves(
    profile_id: ProfileId,
    service: ServiceOf,
    reader: Reader,
    layer: Annotated[str, Query(min_length=1, max_length=200, description="Layers by glob.")] = "*",
    bits: BitsList = [],  # noqa: B006
    rank: RankList = [],  # noqa: B006
    accept: Annotated[str | None, Header(max_length=1024, include_in_schema=False)] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Fitted parameters, measured points and predictions at any (bits, rank), as JSON, CSV or Parquet by Accept."""
    media_type = accepted(accept, (JSON, CSV, PARQUET))
    profile = service.profiles.load(profile_id)
    curves = layer_curves(profile, layer, bits, rank, service.settings.max_curve_points)
    part = f"curves {media_type} {layer} {bits} {rank}"
    if media_type == JSON:
        return _answer(CurvesAnswer(profile=profile_id, curves=curves), profile_id, part, if_none_match)
    rows = curve_rows(profile, curves)
    content = as_csv(rows) if media_type == CSV else as_parquet(rows)
    return tagged(content, media_type, _etag(profile_id, part), if_none_match)


@router.get(
    "/{profile_id}/frontier",
    response_model=FrontierAnswer,
    responses={**FOUND, **responses("unknown-profile", "unusable")},
)
def read_frontier(
    profile_id: ProfileId,
    service: ServiceOf,
    reader: Reader,
    embeddings: Annotated[bool, Query(description=EMBEDDINGS)] = False,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The least predicted loss at every size, and the uniform settings beside it."""
    from api.services.usecases import frontier_points, uniform_points

    profile = service.profiles.load(profile_id).offered(embeddings)
    answer = FrontierAnswer(
        profile=profile_id,
        optimal=[OptimalPoint(**asdict(point)) for point in frontier_points(profile)],
        uniform=[
            UniformPoint(
                label=point.strategy,
                total_bytes=point.total_bytes,
                bits_per_weight=point.bits_per_weight,
                kl_nats=point.kl_nats,
            )
            for point in uniform_points(profile)
        ],
    )
    return _answer(answer, profile_id, f"frontier {embeddings}", if_none_match)


@router.get(
    "/{profile_id}/fidelity",
    response_model=FidelityAnswer,
    responses={**FOUND, **responses("unknown-profile", "unusable")},
)
def read_fidelity(
    profile_id: ProfileId, service: ServiceOf, reader: Reader, if_none_match: IfNoneMatch = None
) -> Response:
    """What each block's compression alone loses, with intervals: measured, or predicted where it was not."""
    answer = block_losses(service.profiles.load(profile_id))
    part = "fidelity" if answer.measured is None else f"fidelity {answer.measured.content_sha256}"
    return _answer(answer, profile_id, part, if_none_match)


@router.get(
    "/{profile_id}/spectrum",
    response_model=SpectrumAnswer,
    responses={**FOUND, **responses("unknown-profile", "not-measured", "unusable")},
)
def read_spectrum(
    profile_id: ProfileId, service: ServiceOf, reader: Reader, if_none_match: IfNoneMatch = None
) -> Response:
    """How the energy of every matrix and head spreads, and what is lost as rank falls."""
    answer = spectra(service.profiles.load(profile_id))
    cliff = "" if answer.cliff is None else answer.cliff.content_sha256
    part = f"spectrum {answer.spectrum.content_sha256} {cliff}"
    return _answer(answer, profile_id, part, if_none_match)


def _answer(answer: BaseModel, profile_id: str, part: str, if_none_match: str | None) -> Response:
    return tagged(answer.model_dump_json().encode(), JSON, _etag(profile_id, part), if_none_match)


def _etag(profile_id: str, part: str) -> str:
    return f'"{sha256(f"{profile_id} {part}".encode()).hexdigest()[:32]}"'


def _summary(row: ProfileRow) -> ProfileSummary:
    return ProfileSummary(**{name: getattr(row, name) for name in ProfileSummary.model_fields})


def _profile(service: Service, profile_id: str) -> ProfileAnswer:
    summary = _summary(service.profiles.row(profile_id))
    profile = service.profiles.load(profile_id)
    document, menu = profile.document, profile.menu
    return ProfileAnswer(
        **summary.model_dump(),
        architecture=document.architecture,
        calibration=document.calibration.source,
        calibration_tokens=document.calibration.windows * document.calibration.window_tokens,
        compressible_weights=menu.compressible_weights,
        kept_bytes=menu.kept_bytes,
        gain=document.gain.mean,
        interval_factors=profile.interval_factors,
        layers=[
            ProfileLayer(
                name=layer.name,
                block=record.block,
                projection=record.projection,
                rows=layer.rows,
                columns=layer.columns,
                original_bytes=layer.original_bytes,
                sensitivity=profile.sensitivity(layer.name),
                option_count=len(layer.options),
                r_squared=record.fit.r_squared,
            )
            for layer, record in zip(menu.layers, document.layers.values(), strict=True)
        ],
        tables=described_tables(profile),
    )


def described_tables(profile: Profile) -> TablesAnswer | None:
    """What a plan with embeddings counts; None where tables were not measured or cannot be read."""
    from profiler.documents.profile import ProfileError
    from profiler.documents.sidecar import CompanionError

    try:
        offered = profile.with_tables
    except (ProfileError, CompanionError):
        return None
    menu = offered.menu
    return TablesAnswer(
        names=list(offered.tables),
        compressible_weights=menu.compressible_weights,
        kept_bytes=menu.kept_bytes,
    )
