"""The HTTP application: routes, middleware and error handling put together. `bitrank serve` runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from api.http.middleware.auth import Authentication
from api.http.middleware.headers import SecurityHeaders
from api.http.middleware.idempotency import Idempotency
from api.http.middleware.limits import BodyLimit, HostCheck
from api.http.routes import batches, compressions, evaluations, jobs, page, plans, preview, profiles
from api.http.routes import health as probes
from api.http.service import Service
from api.observability.logging_setup import Observation
from api.problems import MEDIA_TYPE, Problem, install_handlers

DESCRIPTION = """Plans how many bits and how much rank every weight matrix of a language model deserves.

Errors are problem documents (RFC 9457) with a stable `type`. KL is in nats per token; errors are relative squared
output errors. On loopback no key is needed; elsewhere send `Authorization: Bearer KEY`."""


def make_app(service: Service) -> FastAPI:
    """The application over an opened service, which it closes at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    settings = service.settings
    app = FastAPI(
        title="bitrank",
        version=version("bitrank"),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(Observation, metrics=service.metrics),
            Middleware(SecurityHeaders),
            Middleware(HostCheck, settings=settings),
            Middleware(BodyLimit, settings=settings),
            Middleware(Authentication, settings=settings, keys=service.keys),
            Middleware(Idempotency, settings=settings, database=service.database),
        ],
    )
    app.state.service = service
    install_handlers(app)
    for routes in (plans, profiles, preview, batches, compressions, evaluations, jobs, probes, page):
        app.include_router(routes.router)
    app.mount("/static", StaticFiles(directory=page.WEB))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with its 422 replaced by ours."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        schemas = document["components"]["schemas"]
        schemas["Problem"] = Problem.model_json_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        answer = {"schema": {"$ref": "#/components/schemas/Problem"}}
        for operations in document["paths"].values():
            for operation in operations.values():
                if "422" in operation["responses"]:
                    operation["responses"]["422"] = {
                        "description": "The request cannot be carried out.",
                        "content": {MEDIA_TYPE: answer},
                    }
        app.openapi_schema = document
    return app.openapi_schema
