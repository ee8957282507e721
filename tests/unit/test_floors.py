"""The house: every module stands on a floor that import-linter checks, and no imports run in a circle."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
# The door imports from every floor, lazily.
DOOR = "soma_common"


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("soma_common")


def floors() -> list[list[str]]:
    """The layers of .importlinter, top first."""
    parser = ConfigParser()
    parser.read(ROOT / ".importlinter")
    lines = parser["importlinter:contract:floors"]["layers"].split("\n")
    return [[name.strip() for name in line.split(":")] for line in lines if line.strip()]


def test_every_module_stands_on_a_floor(graph: grimp.ImportGraph) -> None:
    placed = [name for floor in floors() for name in floor]
    packages = {module for module in graph.modules if graph.find_children(module)}
    homeless = {
        module
        for module in graph.modules - packages - {DOOR}
        if not any(module == name or module.startswith(f"{name}.") for name in placed)
    }
    assert homeless == set()
    assert len(placed) == len(set(placed))


def test_no_imports_run_in_a_circle(graph: grimp.ImportGraph) -> None:
    left = {module: set(graph.find_modules_directly_imported_by(module)) - {DOOR} for module in graph.modules}
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in free}
    assert left == {}


def test_packages_hold_a_docstring_and_nothing_else() -> None:
    kit = ROOT / "soma_common" / "testing" / "__init__.py"  # the door of the test kit
    for init in set((ROOT / "soma_common").glob("*/__init__.py")) - {kit}:
        assert len(init.read_text().strip().splitlines()) == 1, init


def test_nobody_inside_uses_the_door(graph: grimp.ImportGraph) -> None:
    inside = set(graph.find_modules_that_directly_import(DOOR))
    assert inside <= {"soma_common.cli.main"}  # for the version
