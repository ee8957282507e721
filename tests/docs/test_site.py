"""The site is built without a warning, every public name in it has a docstring, and its pages are all reachable."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MODULES = [
    name
    for page in sorted((DOCS / "reference" / "python").glob("*.md"))
    for name in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(), re.MULTILINE)
]
_HREF = re.compile(r'href="([^"#?:]+\.html)(#[^"]*)?"')
_ID = re.compile(r'id="([^"]+)"')
MUST_EXIST = (
    "tutorial/quickstart", "how-to/django", "how-to/fastapi", "how-to/adopt", "how-to/operate", "how-to/central-log",
    "explanation/exactly-once", "explanation/comparison", "explanation/glossary", "decisions/index",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, freshly built; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_there_and_every_link_leads_somewhere(site: Path) -> None:
    for page in MUST_EXIST:
        assert (site / f"{page}.html").is_file(), page
    texts = {page: page.read_text() for page in site.rglob("*.html")}
    ids = {page: set(_ID.findall(text)) for page, text in texts.items()}
    broken = []
    for page, text in texts.items():
        for target, anchor in _HREF.findall(text):
            there = (page.parent / target).resolve()
            if there not in texts or (anchor and anchor[1:] not in ids[there]):
                broken.append(f"{page.relative_to(site)}: {target}{anchor}")
    assert not broken


def test_the_reference_is_made_of_docstrings(site: Path) -> None:
    events = (site / "reference" / "python" / "events.html").read_text()
    assert 'id="soma_common.events.store.EventStore.publish"' in events
    assert "Record events" in events
    errors = (site / "reference" / "python" / "errors.html").read_text()
    assert "├──" in errors


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = import_module(name)
    assert module.__doc__
    assert [each for each in _public(module, name) if not inspect.getdoc(each[1])] == []


def _public(module: Any, name: str) -> list[tuple[str, Any]]:
    found = []
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            found.append((attribute, value))
        if inspect.isclass(value):
            found += [
                (f"{attribute}.{member}", inner)
                for member, inner in vars(value).items()
                if not member.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property))
            ]
    return found


def test_the_door_and_the_test_kit_are_in_the_reference() -> None:
    import soma_common
    from soma_common import testing

    homes = {f"soma_common.{home}" for home in soma_common._HOME.values()}
    homes |= {f"soma_common.testing.{home}" for home in testing._HOME.values()}
    assert homes <= set(MODULES) | {"soma_common.filtering"}
