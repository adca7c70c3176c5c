"""The server process: opens the service, warms it up and runs uvicorn on it."""

from __future__ import annotations

import gc
import os
import socket
import threading
from functools import partial
from pathlib import Path

import uvicorn

from allocator.errors import BitrankError
from api.http.app import make_app
from api.http.connections import Bounds, Connection
from api.http.service import Service
from api.observability.logging_setup import configure_logging, log
from api.observability.tracing import start_tracing, trace_requests
from api.settings import Settings

BACKLOG = 2_048
KEEP_ALIVE_SECONDS = 30


class ServerError(BitrankError):
    """The server cannot start; the message says why and what to do."""


def run_server(settings: Settings, profiles: tuple[Path, ...] = (), workers: int = 1) -> None:
    """Serve until interrupted, with `workers` worker processes beside.

    Raises `ServerError` when the address is taken or keys are missing.
    """
    configure_logging(settings.log_level)
    start_tracing("bitrank-server")
    service = Service.open(settings)
    if settings.needs_keys and not service.keys.any_valid():
        raise ServerError(
            f"{settings.host} is reachable from other machines and there is no API key;"
            " make one with `bitrank keys create NAME`, or serve on 127.0.0.1"
        )
    for directory in profiles:
        service.profiles.register(directory)
    listener = listen(settings)
    os.environ["BITRANK_DATA_DIR"] = str(settings.data_dir)
    service.jobs.launch(workers)
    host, port = listener.getsockname()[:2]
    log.info("serving", address=f"http://{host}:{port}")
    threading.Thread(target=_warm, args=(service,), name="warm", daemon=True).start()
    app = make_app(service)
    trace_requests(app)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        http=partial(Connection, Bounds(settings)),  # type: ignore[arg-type]
        ws="none",
    )
    uvicorn.Server(config).run([listener])


def _warm(service: Service) -> None:
    """Load what the first requests need. It is there to stay, so the garbage collector passes it over from then on:
    a full collection would stop every request for 90 ms."""
    service.profiles.warm()
    gc.freeze()


def listen(settings: Settings) -> socket.socket:
    """A listening socket at the settings' address; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ServerError(
            f"cannot listen at {settings.host}:{settings.port} ({error.strerror}); choose another --port"
        ) from error
    listener.listen(BACKLOG)
    return listener
