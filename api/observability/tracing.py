"""OpenTelemetry traces, for who installs the extra `otel` and sets OTEL_EXPORTER_OTLP_ENDPOINT; otherwise nothing.

What lives here: the spans of requests and of tasks, sent to that endpoint over HTTP. All tasks of a job, on whatever
machine, are one trace, whose id is the job's id; the request that submitted it names the job in `bitrank.job_id`.
Every other setting is OpenTelemetry's own (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

if TYPE_CHECKING:
    from fastapi import FastAPI

log = structlog.stdlib.get_logger("bitrank")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp", "opentelemetry.instrumentation.fastapi")
UNTRACED = "healthz,readyz,metrics"
FLUSH_MILLISECONDS = 2_000
_provider: list[Any] = []
"""The provider of this process, once tracing was started."""


def start_tracing(service_name: str) -> None:
    """Send this process's spans to the endpoint, if there is one. Says so in the log if the extra is missing."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    if not _is_installed():
        log.warning(
            "no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set, but not installed; pip install 'bitrank[otel]'"
        )
        return
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", service_name)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _provider.append(provider)


def flush_traces() -> None:
    """Send what is waiting, before a process ends at once."""
    for provider in _provider:
        provider.force_flush(FLUSH_MILLISECONDS)


def trace_requests(app: FastAPI) -> None:
    """A span for every request but the probes', if tracing was started."""
    if _provider:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(app, excluded_urls=UNTRACED, exclude_spans=["receive", "send"])


def annotate(attributes: Mapping[str, str]) -> None:
    """Note something on the span under way, if there is one."""
    if _provider:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(dict(attributes))


@contextmanager
def task_span(job_id: str, task: str, worker: str) -> Iterator[None]:
    """A span around a task, in the trace of its job. An exception marks it as failed."""
    if not _provider:
        yield
        return
    from opentelemetry import trace

    attributes = {"bitrank.job_id": job_id, "bitrank.task": task, "bitrank.worker": worker}
    tracer = trace.get_tracer("bitrank")
    with tracer.start_as_current_span(f"task {task}", _trace_of(job_id), attributes=attributes):
        yield


def _trace_of(job_id: str) -> Any:
    from opentelemetry import trace

    number = UUID(job_id).int
    parent = trace.SpanContext(number, number & 0xFFFF_FFFF_FFFF_FFFF, True, trace.TraceFlags(1))
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))


def _is_installed() -> bool:
    try:
        return all(find_spec(name) is not None for name in NEEDED)
    except ModuleNotFoundError:
        return False
