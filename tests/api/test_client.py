"""The Python client against a real server process, and against connections that break."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from road import Road
from service_process import ServiceProcess

from allocator.errors import BudgetSyntaxError, InfeasibleError
from allocator.plan import Plan
from api.client import Client, ServiceError, plan_on_server
from api.schemas.jobs import JobRecord
from api.services.usecases import plan_budget
from profiler.documents.profile import load_profile

pytestmark = pytest.mark.alone


@pytest.fixture
def remote(service: ServiceProcess) -> Iterator[Client]:
    with Client(service.url, retries=2) as opened:
        yield opened


class BrokenOnce:
    """A loopback port that drops its first connection after reading, and hands the others on to the service."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            far = socket.create_connection(("127.0.0.1", self._service.port))
            if self.connections == 1:
                far.sendall(near.recv(65_536))
                far.recv(65_536)
                near.close()
                far.close()
                continue
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                target.sendall(data)
        except OSError:
            pass
        target.close()

    def close(self) -> None:
        self._listener.close()


def test_a_plan_from_a_server_is_the_plan_made_here(service: ServiceProcess, road: Road) -> None:
    made = plan_on_server(service.url, None, "model", "3.2bpw", "optimal", lambda *_: None)
    assert made == plan_budget(load_profile(road.profile), "3.2bpw")


def test_errors_of_planning_are_the_ones_planning_here_raises(remote: Client) -> None:
    with pytest.raises(InfeasibleError) as refused:
        remote.plan("model", "1KB")
    assert isinstance(remote.plan("model", f"{refused.value.smallest_bytes}B"), Plan)
    with pytest.raises(BudgetSyntaxError):
        remote.plan("model", "many")


def test_a_plan_is_exported(remote: Client, plan_id: str) -> None:
    assert remote.export(plan_id, "pattern-overrides").startswith("pattern_overrides:\n")


def test_a_refusal_names_its_kind(remote: Client) -> None:
    with pytest.raises(ServiceError) as refused:
        remote.job("none")
    assert (refused.value.kind, refused.value.status) == ("unknown-job", 404)


def test_a_job_is_submitted_followed_and_cancelled(remote: Client) -> None:
    job = remote.plan("demo", "3bpw")
    assert isinstance(job, JobRecord)
    threading.Timer(0.5, remote.cancel, (job.id,)).start()
    assert [kind for _, kind, _ in remote.events(job.id)] == ["queued", "cancelled"]
    assert remote.wait(job.id).state == "cancelled"
    assert job.id in {listed.id for listed in remote.jobs(state="cancelled").jobs}


def test_a_post_whose_answer_is_lost_is_carried_out_once(service: ServiceProcess) -> None:
    broken = BrokenOnce(service)
    with Client(service.url) as direct, Client(broken.url) as client:
        before = {job.id for job in direct.jobs().jobs}
        job = client.submit("profiles", {"model": "demo"})
        made = {listed.id for listed in direct.jobs().jobs} - before
        direct.cancel(job.id)
    broken.close()
    assert broken.connections >= 2
    assert made == {job.id}


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}", retries=0) as client,
        pytest.raises(ServiceError, match="cannot reach"),
    ):
        client.profiles()


def test_fidelity_and_spectra_come_as_types(remote: Client, road: Road) -> None:
    profile = load_profile(road.profile)
    fidelity, spectra = remote.fidelity(profile.sha256), remote.spectrum(profile.sha256)
    assert fidelity.measured is not None
    assert fidelity.measured.digest == fidelity.measured.content_sha256
    assert list(spectra.spectrum.layers) == list(profile.document.layers)
