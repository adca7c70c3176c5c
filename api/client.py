"""A typed client of the service: plans, profiles, jobs and their events, with retries that are safe.

What lives here: HTTP. Every POST carries an Idempotency-Key, so that a retry of a request whose answer was lost is not
carried out twice; event streams go on after the last event seen.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from pydantic import TypeAdapter, ValidationError

from allocator.errors import BitrankError, BudgetSyntaxError, InfeasibleError, StrategyError
from allocator.plan import Plan
from api.schemas.documents import FidelityAnswer, FrontierAnswer, ProfilePage, SpectrumAnswer
from api.schemas.jobs import JobRecord, Page

RETRIED = (429, 502, 503, 504)
LONGEST_WAIT_SECONDS = 30.0
KINDS: dict[str, type[BitrankError]] = {"budget-syntax": BudgetSyntaxError, "strategy": StrategyError}
T = TypeVar("T")
Progress = Callable[[str, int, int], None]


class ServiceError(BitrankError):
    """The service refused or cannot be reached. `kind` is the last part of the problem's type, `status` 0 without."""

    def __init__(self, message: str, kind: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class Client:
    """A connection to one service. Use it in a `with` block, or `close` it.

    key: an API key, needed where the service is not on loopback. retries: how often a request is sent again after a
    lost connection, a 429 or a 502 to 504, waiting as long as the service asks or twice as long each time.
    """

    def __init__(
        self, url: str, key: str | None = None, retries: int = 5, timeout_seconds: float = 60.0
    ) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds)
        self._retries = retries

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def plan(
        self,
        model: str,
        budget: str | None,
        strategy: str = "optimal",
        constraints: dict[str, Any] | None = None,
        target: str | None = None,
        verify: bool = False,
        embeddings: bool = False,
    ) -> Plan | JobRecord:
        """The plan, or the job that profiles the model, plans, and measures the plan if that is asked for."""
        wanted = {
            "model": model,
            "budget": budget,
            "strategy": strategy,
            "constraints": constraints,
            "target": target,
            "verify": verify or None,
            "embeddings": embeddings or None,
        }
        answer = self._post("/v1/plans", {k: v for k, v in wanted.items() if v is not None})
        return _read(JobRecord, answer) if answer.status_code == 202 else _read(Plan, answer)

    def read_plan(self, plan_id: str) -> Plan:
        return _read(Plan, self._get(f"/v1/plans/{plan_id}"))

    def export(self, plan_id: str, format_name: str) -> str:
        """The plan as another tool reads it."""
        return self._get(f"/v1/plans/{plan_id}/export", {"format": format_name}).text

    def profiles(self, model: str | None = None, cursor: str | None = None) -> ProfilePage:
        given = {"model": model, "cursor": cursor}
        return _read(
            ProfilePage, self._get("/v1/profiles", {k: v for k, v in given.items() if v is not None})
        )

    def frontier(self, profile_id: str, embeddings: bool = False) -> FrontierAnswer:
        given = {"embeddings": "true"} if embeddings else {}
        return _read(FrontierAnswer, self._get(f"/v1/profiles/{profile_id}/frontier", given))

    def fidelity(self, profile_id: str) -> FidelityAnswer:
        return _read(FidelityAnswer, self._get(f"/v1/profiles/{profile_id}/fidelity"))

    def spectrum(self, profile_id: str) -> SpectrumAnswer:
        return _read(SpectrumAnswer, self._get(f"/v1/profiles/{profile_id}/spectrum"))

    def submit(self, kind: str, request: dict[str, Any]) -> JobRecord:
        """Queue a job; `kind` is profiles, batches, compressions or evaluations."""
        return _read(JobRecord, self._post(f"/v1/{kind}", request))

    def job(self, job_id: str) -> JobRecord:
        return _read(JobRecord, self._get(f"/v1/jobs/{job_id}"))

    def jobs(self, cursor: str | None = None, state: str | None = None) -> Page:
        given = {"cursor": cursor, "state": state}
        return _read(Page, self._get("/v1/jobs", {k: v for k, v in given.items() if v is not None}))

    def cancel(self, job_id: str) -> JobRecord:
        return _read(JobRecord, self._post(f"/v1/jobs/{job_id}/cancel", None))

    def events(self, job_id: str, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Sequence number, kind and data of every event, to the end of the job; lost connections are resumed."""
        failures = 0
        while True:
            try:
                for sequence, kind, data in self._stream(job_id, after):
                    after, failures = sequence, 0
                    yield sequence, kind, data
                if self.job(job_id).is_finished:
                    return
            except httpx.TransportError as error:
                failures += 1
                if failures > self._retries:
                    raise _unreachable(self._http.base_url, error) from error
                time.sleep(_pause(failures, None))

    def wait(self, job_id: str, progress: Progress | None = None) -> JobRecord:
        """The job once it is finished; `progress` is told stage, done and total on the way."""
        for _, kind, data in self.events(job_id):
            if kind == "progress" and progress is not None:
                progress(str(data["stage"]), int(data["done"]), int(data["total"]))
        return self.job(job_id)

    def _stream(self, job_id: str, after: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
        headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            if answer.status_code != 200:
                answer.read()
                raise _refusal(answer)
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields and "id" in fields:
                    yield int(fields["id"]), fields.get("event", "message"), json.loads(fields["data"])
                    fields = {}

    def _get(self, path: str, query: dict[str, Any] | None = None) -> httpx.Response:
        return self._send(self._http.build_request("GET", path, params=query))

    def _post(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        headers = {"Idempotency-Key": uuid4().hex}
        return self._send(self._http.build_request("POST", path, json=body, headers=headers))

    def _send(self, request: httpx.Request) -> httpx.Response:
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                answer = self._http.send(request)
            except httpx.TransportError as error:
                if last:
                    raise _unreachable(self._http.base_url, error) from error
                time.sleep(_pause(attempt, None))
                continue
            if answer.is_success:
                return answer
            if last or not _worth_retrying(answer):
                raise _refusal(answer)
            time.sleep(_pause(attempt, answer.headers.get("retry-after")))
        raise AssertionError("unreachable")


def plan_on_server(
    url: str,
    key: str | None,
    model: str,
    budget: str | None,
    strategy: str,
    progress: Progress,
    target: str | None = None,
    verify: bool = False,
    embeddings: bool = False,
) -> Plan:
    """A plan from a remote service, profiled there first if need be. What `bitrank plan --server` calls.

    Raises `InfeasibleError`, `BudgetSyntaxError`, `StrategyError` as planning here does, else `ServiceError`.
    """
    with Client(url, key) as client:
        answer = client.plan(model, budget, strategy, target=target, verify=verify, embeddings=embeddings)
        if isinstance(answer, Plan):
            return answer
        job = client.wait(answer.id, progress)
        if job.state == "done" and job.result is not None:
            return client.read_plan(str(job.result["plan_id"]))
        problem = job.error or {"detail": f"job {job.id} was {job.state}"}
        raise _error_of(problem, 0)


def _worth_retrying(answer: httpx.Response) -> bool:
    """Also a 409 with Retry-After: the first sending of this very request is still under way."""
    return answer.status_code in RETRIED or (answer.status_code == 409 and "retry-after" in answer.headers)


def _pause(attempt: int, retry_after: str | None) -> float:
    if retry_after is not None and retry_after.isdigit():
        return min(LONGEST_WAIT_SECONDS, float(retry_after))
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT_SECONDS, 0.25 * float(2**attempt))


def _read(model: type[T], answer: httpx.Response) -> T:
    try:
        return TypeAdapter(model).validate_json(answer.content)
    except ValidationError as error:
        raise ServiceError(
            f"{answer.request.url} answered in an unknown form; is it a bitrank service of this version?"
        ) from error


def _refusal(answer: httpx.Response) -> BitrankError:
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    return _error_of(
        {"detail": f"{answer.request.url} answered {answer.status_code}"} | problem, answer.status_code
    )


def _error_of(problem: dict[str, Any], status: int) -> BitrankError:
    kind, detail = str(problem.get("type", "")).rpartition(":")[2], str(problem["detail"])
    if kind == "infeasible" and "smallest_bytes" in problem:
        return InfeasibleError(detail, int(problem["smallest_bytes"]))
    if kind in KINDS:
        return KINDS[kind](detail)
    return ServiceError(detail, kind, status)


def _unreachable(url: httpx.URL, error: Exception) -> ServiceError:
    return ServiceError(
        f"cannot reach {url} ({error or type(error).__name__}); check the address and that it runs"
    )
