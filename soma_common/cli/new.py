"""``somastack new``: a starter project that runs, and passes its tests."""

from __future__ import annotations

import keyword
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

import click

from soma_common.cli.examples import examples
from soma_common.cli.release import release
from soma_common.errors import ConfigurationError
from soma_common.escaping import json_text, plain

_NAME: Final = re.compile(r"^[a-z][a-z0-9]*([-_][a-z0-9]+)*$")
_LONGEST: Final = 50  # characters
_TAKEN: Final = {"soma_common", "somastack", "tests", "pytest", "pydantic", "hypothesis", "pip"}
_SUFFIX: Final = ".tmpl"
_CALLED: Final = {
    "package": "{{package}}",
    "suite": "tests",
    "gitignore": ".gitignore",
}  # names with a meaning of their own


class _ProjectName(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        package = text.replace("-", "_")
        if not _NAME.fullmatch(text) or len(text) > _LONGEST:
            self.fail(f"{plain(text[:80])!r}: use lower-case letters, digits, - and _, at most {_LONGEST}.", param, ctx)
        if keyword.iskeyword(package) or package in sys.stdlib_module_names or package in _TAKEN:
            self.fail(f"{text!r} is the name of a module already; choose another.", param, ctx)
        return text


@click.command(epilog=examples(
    "somastack new shop", "a project in the folder shop",
    "somastack new shop --folder services/shop", "in another one, which must be empty or new",
))  # fmt: skip
@click.argument("name", type=_ProjectName())
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to.  [default: NAME]")
@click.option("--json", "as_json", is_flag=True, help="JSON in place of the next steps.")
def new(*, name: str, folder: Path | None, as_json: bool) -> None:
    """Make a project with settings, an event, a handler, a saga and tests that pass.

    Exit codes: 0 made, 1 the folder is not empty or cannot be made, 2 it cannot be called so.
    """
    target, package = (folder or Path(name)).absolute(), name.replace("-", "_")
    written = write(target, {"name": name, "package": package, "version": release()})
    if as_json:
        click.echo(json_text({"folder": str(target), "package": package, "files": written}, indent=True))
        return
    shown = os.path.relpath(target)
    click.echo(f"{plain(shown)}: {len(written)} files. Next:\n")
    click.echo(f"  cd {plain(shown)}\n  pip install -e '.[test]'\n  pytest\n  somastack up\n  python -m {package}")
    click.echo(f"  somastack worker {package}.app:soma --reload")


def write(target: Path, values: Mapping[str, str]) -> list[str]:
    """Write the project, whole or not at all; the names of its files.

    Raises:
        ConfigurationError: the folder has something in it, or cannot be written.
    """
    try:
        if target.exists() and any(target.iterdir()):
            raise ConfigurationError(f"{target} is not empty.", cure="name another --folder, or empty it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            names = _fill(fresh, values)
            fresh.chmod(0o755)
            fresh.replace(target)  # an empty folder gives way
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be made: {error.strerror}.", cure="name a --folder that you may write."
        ) from error
    return names


def _fill(folder: Path, values: Mapping[str, str]) -> list[str]:
    names = []
    for path, template in _templates(files("soma_common.cli").joinpath("templates", "project"), Path()):
        name = Path(*(_filled(part, values) for part in path.parts))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(_filled(template.read_text(encoding="utf-8"), values), encoding="utf-8")
        names.append(name.as_posix())
    return sorted(names)


def _templates(folder: Traversable, below: Path) -> Iterator[tuple[Path, Traversable]]:
    """Each template with the path of what is made of it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, below / _CALLED.get(entry.name, entry.name))
        elif entry.name.endswith(_SUFFIX):
            name = entry.name.removesuffix(_SUFFIX)
            yield below / _CALLED.get(name, name), entry


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], text)
