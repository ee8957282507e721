"""``somastack schemas``: the Avro schemas of the application's payload models, as files and in the registry."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from soma_common.cli.telling import complain, warn
from soma_common.errors import ConfigurationError, IncompatibleSchema, SomaError
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.schemas.address import RegistryAuth
from soma_common.schemas.avro import Schema, artifact_id, event_schemas
from soma_common.schemas.files import differences, write
from soma_common.schemas.registry import Registry

STANDARD = "soma_common.events.standard:STANDARD_MODELS"

Schemas = dict[tuple[str, int], Schema]


@click.group()
def schemas() -> None:
    """Avro schemas: check, write and push. Exit codes: 0 well, 1 a difference or a refusal, 2 it could not be tried."""


def _models(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which schemas, and where their files are."""
    options = [
        click.option(
            "--models", default=STANDARD, show_default=True, metavar="MODULE:NAME", help="PayloadModels, or a module."
        ),
        click.option("--folder", type=click.Path(path_type=Path), default=Path("schemas"), show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what asks a registry."""
    options = [
        click.option("--registry", envvar="SOMASTACK_REGISTRY_URL", metavar="URL", show_envvar=True),
        click.option(  # applications register under their service's name, too
            "--group",
            envvar="SOMA_SERVICE_ID",
            default="soma",
            show_default=True,
            show_envvar=True,
            help="The registry's group: one per service.",
        ),
        click.option(
            "--token", envvar="SOMASTACK_REGISTRY_TOKEN", metavar="TOKEN", show_envvar=True, help="Bearer token."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return _models(command)


@schemas.command()
@_shared
@click.option("--files-only", is_flag=True, help="Compare files and models only; ask no registry.")
def check(models: str, folder: Path, registry: str | None, group: str, token: str | None, files_only: bool) -> None:
    """Do files equal the models, and would the registry take them (dry run, BACKWARD)?"""
    with _Exits():
        found = event_schemas(load_models(models).values())
        problems = _file_problems(folder, found)
        if not files_only:
            problems += asyncio.run(_check(_registry(registry, group, token), found))
    if problems:
        sys.exit(1)
    click.echo(f"{len(found)} schemas are in order")


@schemas.command("write")
@_models
def write_files(models: str, folder: Path) -> None:
    """Write the files; ask no registry. They belong into version control."""
    with _Exits():
        found = event_schemas(load_models(models).values())
        written = write(folder, found)
        for path in written:
            click.echo(f"wrote {path}")
        click.echo(f"{len(written)} written, {len(found) - len(written)} were in order")


@schemas.command()
@_shared
def push(models: str, folder: Path, registry: str | None, group: str, token: str | None) -> None:
    """Write the files, and register the schemas under the BACKWARD rule."""
    with _Exits():
        found = event_schemas(load_models(models).values())
        client = _registry(registry, group, token)
        for path in write(folder, found):
            click.echo(f"wrote {path}")
        asyncio.run(_push(client, found))


def load_models(name: str) -> PayloadModels:
    """The models that ``module:NAME`` stands for: a PayloadModels, or all payload classes of a module or a list.

    Raises:
        ConfigurationError: there is no such module or name, or no payload model in it.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
        found = getattr(module, attribute) if attribute else vars(module).values()
    except (ImportError, AttributeError, ValueError) as error:
        cure = "name it as package.module:NAME, importable from here."
        raise ConfigurationError(f"The models {name!r:.100} cannot be loaded: {error}.", cure=cure) from error
    finally:
        sys.path.pop(0)
    if isinstance(found, PayloadModels):
        return found
    classes = [each for each in _members(found) if isinstance(each, type) and issubclass(each, Payload)]
    models = [each for each in classes if hasattr(each, "event_type")]
    if not models:
        raise ConfigurationError(f"{name!r:.100} holds no payload models.", cure="name a PayloadModels.")
    return PayloadModels(*dict.fromkeys(models))


def _members(found: Any) -> list[Any]:
    if isinstance(found, type):
        return [found]
    try:
        return list(found)
    except TypeError:
        return list(vars(found).values()) if hasattr(found, "__dict__") else []


def _file_problems(folder: Path, found: Schemas) -> list[str]:
    try:
        problems = differences(folder, found)
    except OSError as error:
        raise ConfigurationError(f"The folder {folder} cannot be read: {error}.") from error
    for line in problems:
        warn(f"{folder}: {line}")
    return problems


def _registry(url: str | None, group: str, token: str | None) -> Registry:
    if not url:
        raise ConfigurationError("No registry is named.", cure="set SOMASTACK_REGISTRY_URL, or pass --registry.")
    return Registry(url, group=group, auth=RegistryAuth(token=token) if token else None)


async def _check(registry: Registry, found: Schemas) -> list[str]:
    problems = []
    async with registry:
        for key, schema in found.items():
            try:
                known = await registry.check(*key, schema)
            except IncompatibleSchema as error:
                problems.append(str(error))
                warn(str(error))
            else:
                click.echo(f"{artifact_id(*key)}: {'registered' if known else 'new, and would be accepted'}")
    return problems


async def _push(registry: Registry, found: Schemas) -> None:
    async with registry:
        for key, schema in found.items():
            number = await registry.register(*key, schema)
            click.echo(f"{artifact_id(*key)}: contentId {number}")


class _Exits:
    """Errors as one line on stderr, and the exit code that says which kind it was."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            error = ConfigurationError(f"The files cannot be written: {error}.")
        if isinstance(error, SomaError):
            complain(error)
            sys.exit(1 if isinstance(error, IncompatibleSchema) else 2)
