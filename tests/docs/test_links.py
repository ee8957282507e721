"""Links lead somewhere, tests that pages name exist, and the house is drawn as it is checked."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def prose(page: Path) -> str:
    """A page without its fences."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index() -> None:
    index = {(ROOT / "docs" / link).resolve() for link in _LINK.findall((ROOT / "docs/README.md").read_text())}
    listed_elsewhere = {"decisions", "python"}  # by their own index
    missing = [page for page in PAGES[1:] if page not in index and not listed_elsewhere & set(page.parts)]
    assert [page.name for page in missing if page.name not in ("README.md", "index.md")] == []


def test_the_tests_that_pages_name_exist() -> None:
    known = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {name for page in PAGES for name in re.findall(r"`(test(?:_[a-z0-9]+){3,})`", prose(page))}
    assert len(named) > 20
    assert named <= known


def test_the_floors_are_drawn_as_they_are_checked() -> None:
    checked = re.search(r"type = layers\nlayers =\n((?:    .*\n)+)", (ROOT / ".importlinter").read_text())
    assert checked is not None
    layers = [set(re.findall(r"soma_common\.([\w.]+)", line)) for line in checked[1].splitlines()]
    rows = re.findall(r"^\| \d \| [^|]* \| (.*) \|$", (ROOT / "docs/explanation/house.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"`([\w.]+)`", row)) for row in rows] == layers
