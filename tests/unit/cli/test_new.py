"""``somastack new``: names, folders, and that a project is there whole or not at all."""

from __future__ import annotations

import ast
import os
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from soma_common.cli import new as command
from soma_common.errors import ConfigurationError

VALUES = {"name": "my-shop", "package": "my_shop", "version": "1.2.3"}


def test_what_it_makes_is_whole(tmp_path: Path) -> None:
    written = command.write(tmp_path / "x", VALUES)
    assert {"pyproject.toml", ".gitignore", "my_shop/app.py", "my_shop/tables.sql", "tests/test_sales.py"} <= set(
        written
    )
    assert (
        sorted(path.relative_to(tmp_path / "x").as_posix() for path in (tmp_path / "x").rglob("*") if path.is_file())
        == written
    )
    for name in written:
        text = (tmp_path / "x" / name).read_text()
        assert "{{" not in text
        if name.endswith(".py"):
            ast.parse(text)
            assert ast.get_docstring(ast.parse(text))
    project = tomllib.loads((tmp_path / "x" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "my-shop"
    assert project["dependencies"] == ["soma-common[standalone]>=1.2.3"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-x",
        "Shop",
        "1shop",
        "a b",
        "a/b",
        "../a",
        "a\nb",
        "a\x1b[31m",
        "ä",
        "class",
        "json",
        "tests",
        "soma-common",
        "a--b",
        "a" * 51,
        "a.b",
        "\u202ea",
        "a-",
        "x" * 10_000,
    ],
)
def test_names_that_cannot_be_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command.new, ["--", name])
    assert done.exit_code == 2
    assert "\x1b" not in done.output
    assert os.listdir() == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("1")
    with pytest.raises(ConfigurationError, match="not empty"):
        command.write(tmp_path / "x", VALUES)
    assert os.listdir(tmp_path / "x") == ["mine"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        command.write(tmp_path / "file", VALUES)
    with pytest.raises(ConfigurationError, match="cannot be made"):
        command.write(tmp_path / "file" / "below", VALUES)


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert command.write(tmp_path / "x", VALUES)


def test_a_project_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_fill", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        command.write(tmp_path / "x", VALUES)
    assert os.listdir(tmp_path) == []
