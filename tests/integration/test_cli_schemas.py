"""``somastack schemas`` against a real registry."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from soma_common.cli.schemas import schemas
from soma_common.testing.backends import RegistryHandle

MODELS = """
from datetime import datetime
from soma_common.events.payloads import Payload, PayloadModels

class Order(Payload, event_type="order.placed"):
    {fields}

MODELS = PayloadModels(Order)
LIST = [Order]
EMPTY = []
"""


class Shop:
    """A project folder with one module of models, and the commands run in it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.module, self.group = f"shop_{uuid4().hex[:8]}", f"cli-{uuid4().hex[:8]}"
        self.write("number: int")

    def write(self, fields: str) -> None:
        (self.folder / f"{self.module}.py").write_text(MODELS.format(fields=fields))
        sys.modules.pop(self.module, None)

    def run(self, *words: str, models: str | None = None, url: str | None = None) -> Result:
        options = ["--models", models or f"{self.module}:MODELS", "--group", self.group]
        environment = {"SOMASTACK_REGISTRY_URL": self.url if url is None else url}
        return CliRunner().invoke(schemas, [words[0], *options, *words[1:]], env=environment)


@pytest.fixture
def shop(tmp_path: Path, soma_registry: RegistryHandle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the module's text changes within one second
    made = Shop(tmp_path, soma_registry.url)
    yield made
    sys.modules.pop(made.module, None)


def test_push_writes_and_registers_and_check_is_content(shop: Shop) -> None:
    pushed = shop.run("push")
    assert pushed.exit_code == 0, pushed.output
    assert "wrote schemas/order.placed.v1.avsc" in pushed.output
    assert "order.placed.v1: contentId" in pushed.output
    checked = shop.run("check")
    assert checked.exit_code == 0, checked.output
    assert "order.placed.v1: registered" in checked.output
    assert "2 schemas are in order" in checked.output
    again = shop.run("push")
    assert (again.exit_code, "wrote" in again.output) == (0, False)


def test_write_asks_no_registry(shop: Shop) -> None:
    command = ["write", "--models", f"{shop.module}:MODELS"]
    first = CliRunner().invoke(schemas, command, env={"SOMASTACK_REGISTRY_URL": "http://127.0.0.1:1"})
    assert (first.exit_code, first.output.splitlines()[-1]) == (0, "2 written, 0 were in order")
    again = CliRunner().invoke(schemas, command)
    assert (again.exit_code, again.output) == (0, "0 written, 2 were in order\n")
    blocked = CliRunner().invoke(schemas, [*command, "--folder", f"{shop.module}.py"])
    assert blocked.exit_code == 2
    assert "The files cannot be written" in blocked.output


def test_check_before_push_finds_the_missing_files(shop: Shop) -> None:
    checked = shop.run("check")
    assert checked.exit_code == 1
    assert "order.placed.v1.avsc is missing" in checked.output
    assert "new, and would be accepted" in checked.output


def test_a_compatible_change_passes_and_a_breaking_one_is_named(shop: Shop) -> None:
    assert shop.run("push").exit_code == 0
    shop.write('number: int\n    note: str = ""')
    changed = shop.run("check")
    assert changed.exit_code == 1
    assert "differs from its model" in changed.output
    assert "order.placed.v1: new, and would be accepted" in changed.output
    assert shop.run("push").exit_code == 0
    shop.write("number: str")
    for command in ("check", "push"):
        broken = shop.run(command)
        assert broken.exit_code == 1, broken.output
        assert "payload.number: string cannot read long" in broken.output
        assert "Cure" in broken.output


def test_a_module_and_a_list_name_models_too(shop: Shop) -> None:
    for models in (shop.module, f"{shop.module}:LIST", f"{shop.module}:Order"):
        result = shop.run("push", models=models)
        assert result.exit_code == 0, result.output


def test_the_library_has_its_own_standard_models_in_order(shop: Shop) -> None:
    folder = Path(__file__).parents[2] / "schemas"
    result = shop.run("check", "--folder", str(folder), models="soma_common.events.standard:STANDARD_MODELS")
    assert result.exit_code == 0, result.output
    assert "16 schemas are in order" in result.output


@pytest.mark.parametrize("models", ["no.such.module", "soma_common.errors:NONE", ":x", "{module}:EMPTY", "json"])
def test_wrong_models_are_exit_code_2(shop: Shop, models: str) -> None:
    result = shop.run("check", models=models.format(module=shop.module))
    assert result.exit_code == 2, result.output
    assert "Error:" in result.output
    assert "Cure:" in result.output


@pytest.mark.parametrize("url", ["", "ftp://x", "http://127.0.0.1:1"])
def test_a_registry_that_is_not_there_is_exit_code_2(shop: Shop, url: str) -> None:
    result = shop.run("push", url=url)
    assert result.exit_code == 2, result.output
    assert "Cure:" in result.output


def test_files_only_needs_no_registry(shop: Shop) -> None:
    assert shop.run("push").exit_code == 0
    assert shop.run("check", "--files-only", url="http://127.0.0.1:1").exit_code == 0


def test_a_folder_that_cannot_be_written_is_exit_code_2(shop: Shop) -> None:
    (shop.folder / "schemas").write_text("a file")
    result = shop.run("push")
    assert result.exit_code == 2, result.output
