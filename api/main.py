"""The console script: the command line, and the server behind `bitrank serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from api.cli import serve
from api.cli.main import app, run

if TYPE_CHECKING:
    from api.settings import Settings


def main() -> None:
    """Run `bitrank …`."""
    run()


def _run_server(settings: Settings, profiles: tuple[Path, ...], workers: int) -> None:
    from api.http.server import run_server

    run_server(settings, profiles, workers)


serve.register(app, _run_server)

if __name__ == "__main__":
    main()
