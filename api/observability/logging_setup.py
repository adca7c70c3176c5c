"""What operators see: JSON logs with request and job ids, Prometheus metrics. Never a key, a body or a query string."""

from __future__ import annotations

import logging
import re
import sys
from time import perf_counter
from typing import Any
from uuid import uuid4

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy.exc import OperationalError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.observability.tracing import annotate
from api.problems import ProblemError, database_away

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
JOB = re.compile(r"/v1/jobs/(?P<id>[0-9a-f-]{36})(/cancel|/events)?")
FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 1.0, 5.0)
SLOW_SECONDS = 1.0
log = structlog.stdlib.get_logger("bitrank")


def configure_logging(level: str = "info") -> None:
    """structlog and the standard library's loggers, one JSON object a line, on stderr."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("dbos").addHandler(logging.NullHandler())  # or the engine adds one that writes no JSON


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bitrank_http_requests", "Requests.", ("method", "route", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "bitrank_http_request_seconds",
            "Time to answer.",
            ("route",),
            buckets=FAST,
            registry=self.registry,
        )
        self.plan_seconds = Histogram(
            "bitrank_plan_seconds", "Time to solve and store a plan.", buckets=FAST, registry=self.registry
        )
        self.jobs = Gauge(
            "bitrank_jobs", "Jobs by kind and state.", ("kind", "state"), registry=self.registry
        )
        self.queue_depth = Gauge("bitrank_queue_depth", "Jobs that wait.", registry=self.registry)
        self.profile_seconds = Gauge(
            "bitrank_profile_seconds", "Mean time of the finished profile jobs.", registry=self.registry
        )
        self.prediction_ratio = Gauge(
            "bitrank_predicted_over_measured_kl",
            "Geometric mean over the evaluations of plans.",
            registry=self.registry,
        )
        self.event_streams = Gauge(
            "bitrank_event_streams", "Event streams being read.", registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Observation:
    """Middleware: a request id in and out, two metrics a request, 500 and a database that is away as problems.

    Reads that succeed quickly are counted, not logged.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        structlog.contextvars.bind_contextvars(request_id=request_id)
        annotate({"bitrank.request_id": request_id})
        started, status = perf_counter(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if (job := JOB.fullmatch(headers.get("location", scope["path"]))) is not None:
                    structlog.contextvars.bind_contextvars(job_id=job["id"])
                    annotate({"bitrank.job_id": job["id"]})
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except OperationalError as error:
            log.error("the database is away", reason=" ".join(str(error.orig).split()))
            if status == 0:
                await database_away().response()(scope, receive, observed)
        except Exception:
            log.exception("request failed")
            if status == 0:
                detail = f"the service failed; its log has more under the request id {request_id}"
                await ProblemError("internal", detail).response()(scope, receive, observed)
        finally:
            self._record(scope, status, perf_counter() - started)
            structlog.contextvars.clear_contextvars()

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS") else "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if status >= 400 or scope["method"] != "GET" or seconds > SLOW_SECONDS:
            log.info(
                "request", method=method, route=route, status=status, milliseconds=round(1e3 * seconds, 2)
            )
