"""The commands of the service: `bitrank serve` and `bitrank keys`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from api.settings import Settings
    from api.storage.api_keys import KeyStore

RunServer = Callable[["Settings", tuple[Path, ...], int], None]
keys = typer.Typer(help="API keys: who may use a service that is not on loopback.", no_args_is_help=True)


def register(app: typer.Typer, run_server: RunServer) -> None:
    """Add the commands to the command line.

    `run_server` is given the settings, the profiles to register and the number of workers.
    """

    @app.command()
    def serve(
        host: Annotated[
            str, typer.Option(help="Address to listen at; any but loopback needs API keys.")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8000,
        data_dir: Annotated[
            Path | None, typer.Option(help="Folder of database and profiles; BITRANK_DATA_DIR if absent.")
        ] = None,
        profile: Annotated[
            list[Path] | None, typer.Option(help="Register a finished profile directory; may be repeated.")
        ] = None,
        workers: Annotated[int, typer.Option(min=0, help="Worker processes to run beside the server.")] = 1,
    ) -> None:
        """Answer plans over HTTP until interrupted, and work on jobs beside."""
        run_server(_settings(host, port, data_dir), tuple(profile or ()), workers)

    app.add_typer(keys, name="keys")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whom the key is for.")],
    scopes: Annotated[
        str, typer.Option(help="Of read, plan and compress, separated by commas.")
    ] = "read,plan",
    data_dir: Annotated[Path | None, typer.Option(help="As for serve.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Make an API key. It is shown once."""
    wanted = sorted({scope.strip() for scope in scopes.split(",")})
    id, key = _keys(data_dir).create(name, tuple(wanted))
    if json_output:
        return _print_json({"id": id, "name": name, "scopes": wanted, "key": key})
    print(key)
    print(f"key {id} for {name}, may {', '.join(wanted)}; it is not shown again", file=sys.stderr)


@keys.command("list")
def list_keys(
    data_dir: Annotated[Path | None, typer.Option(help="As for serve.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """The API keys there are, without the keys themselves."""
    rows = _keys(data_dir).list()
    if json_output:
        return _print_json(
            {
                "keys": [
                    {
                        "id": row.id,
                        "name": row.name,
                        "scopes": row.scopes,
                        "created_at": row.created_at.isoformat(),
                        "revoked_at": row.revoked_at and row.revoked_at.isoformat(),
                    }
                    for row in rows
                ]
            }
        )
    for row in rows:
        state = f"revoked {row.revoked_at:%Y-%m-%d %H:%M}" if row.revoked_at else "valid"
        print(f"{row.id}  {row.name:24} {','.join(row.scopes):24} {state}")


@keys.command("revoke")
def revoke_key(
    id: Annotated[str, typer.Argument(help="The key's id, from `bitrank keys list`.")],
    data_dir: Annotated[Path | None, typer.Option(help="As for serve.")] = None,
) -> None:
    """Make a key useless, within seconds."""
    _keys(data_dir).revoke(id)
    print(f"key {id} is revoked")


def _keys(data_dir: Path | None) -> KeyStore:
    from api.storage.api_keys import KeyStore
    from api.storage.database import open_database

    return KeyStore(open_database(_settings(data_dir=data_dir)))


def _settings(host: str = "127.0.0.1", port: int = 8000, data_dir: Path | None = None) -> Settings:
    from dataclasses import replace

    from api.settings import Settings

    found = replace(Settings.from_environment(), host=host, port=port)
    return found if data_dir is None else replace(found, data_dir=data_dir)


def _print_json(document: dict[str, object]) -> None:
    import json

    print(json.dumps(document, indent=1))
