"""The image and the compose files agree with the code: nothing here can build them, so everything named is checked."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fastapi.routing import APIRoute

from api.http.routes.health import router
from api.main import app
from api.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "bitrank"}


def instructions(name: str) -> list[str]:
    """The arguments of every such instruction of the Dockerfile."""
    return re.findall(rf"^\s*{name}\s+(.+)$", DOCKERFILE, re.MULTILINE)


def variables() -> dict[str, str]:
    """Everything the image and the compose files set for our processes."""
    found = dict(pair.split("=", 1) for pair in instructions("ENV")[-1].split())
    for service in OURS.values():
        found |= service["environment"]
    return found


def project() -> dict[str, Any]:
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return document["project"]


def test_everything_that_is_copied_exists_and_is_let_through() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [part for line in instructions("COPY") if "--from" not in line for part in line.split()[:-1]]
    assert {"allocator", "compressor", "profiler", "api", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


def test_every_extra_that_is_installed_is_declared() -> None:
    settled = dict(line.split("=", 1) for line in instructions("ARG"))
    overridden = GPU["services"]["worker"]["build"]["args"]
    asked = {*settled["EXTRAS"].split(","), *overridden["EXTRAS"].split(",")}
    assert asked <= set(project()["optional-dependencies"])


def test_build_arguments_are_declared() -> None:
    declared = {line.partition("=")[0] for line in instructions("ARG")}
    assert set(GPU["services"]["worker"]["build"]["args"]) <= declared


@pytest.mark.parametrize(
    "arguments",
    [
        json.loads(instructions("CMD")[-1]),
        *(service["command"] for service in OURS.values()),
        *(service["command"] for service in GPU["services"].values()),
    ],
    ids=" ".join,
)
def test_every_command_is_one_of_the_command_line(arguments: list[str]) -> None:
    assert json.loads(instructions("ENTRYPOINT")[0]) == list(project()["scripts"])
    name, *options = arguments
    group = typer.main.get_command(app)
    subcommand = group.commands[name]  # type: ignore[attr-defined]
    assert subcommand.make_context(name, list(options)).params


def test_every_variable_is_a_setting() -> None:
    known = {PREFIX + field.name.upper() for field in fields(Settings)}
    given = {name.removesuffix("_FILE") for name in variables() if name.startswith(PREFIX)}
    assert given and given <= known


def test_the_variables_are_readable_and_hold_no_secret(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    environment = {
        name: str(tmp_path / "password") if name.endswith("_FILE") else value
        for name, value in variables().items()
    }
    assert "secret" in Settings.from_environment(environment).url
    assert "secret" not in " ".join(environment.values())
    for name, value in COMPOSE["services"]["database"]["environment"].items():
        assert "PASSWORD" not in name or (name.endswith("_FILE") and value.startswith("/run/secrets/"))


def test_the_health_check_asks_an_address_that_exists() -> None:
    (check,) = instructions("HEALTHCHECK")
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    assert asked is not None
    assert asked[2] in {route.path for route in router.routes if isinstance(route, APIRoute)}
    assert instructions("EXPOSE") == [asked[1]]
    assert COMPOSE["services"]["server"]["ports"] == [f"127.0.0.1:{asked[1]}:{asked[1]}"]


def test_the_image_runs_as_nobody_special_and_writes_only_to_its_volume_and_tmp() -> None:
    assert instructions("USER") == ["10001"]
    assert instructions("VOLUME") == ["/data"] == instructions("WORKDIR")[-1:]
    for service in OURS.values():
        assert service["read_only"] and service["tmpfs"] == ["/tmp"] and service["cap_drop"] == ["ALL"]
        assert [volume for volume in service["volumes"] if not volume.endswith(":ro")] == ["data:/data"]


def test_what_the_services_refer_to_is_declared() -> None:
    assert set(GPU["services"]) <= set(COMPOSE["services"])
    for service in COMPOSE["services"].values():
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        named = {volume.partition(":")[0] for volume in service["volumes"] if volume[0] not in "./$"}
        assert named <= set(COMPOSE["volumes"])
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "test" in COMPOSE["services"][other]["healthcheck"]
