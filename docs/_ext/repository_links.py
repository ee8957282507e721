"""Links from pages to files of the repository that are not pages: they lead to a copy beside the site."""

from __future__ import annotations

import html
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
_PAGE = '<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><pre>{text}</pre>\n'


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("doctree-read", _resolve)
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _resolve(app: Sphinx, doctree: nodes.document) -> None:
    page = Path(app.env.doc2path(app.env.docname))
    for link in [*doctree.findall(addnodes.pending_xref), *doctree.findall(addnodes.download_reference)]:
        target = _inside(page, str(link.get("reftarget", "")))
        if target is None:
            continue
        depth = len(Path(app.env.docname).parts) - 1
        uri = "../" * depth + f"repository/{target.relative_to(ROOT).as_posix()}.html"
        link.replace_self(nodes.reference("", "", *link.children, refuri=uri))
        wanted = getattr(app.env, "repository_files", set())
        app.env.repository_files = wanted | {target}  # type: ignore[attr-defined]


def _inside(page: Path, target: str) -> Path | None:
    """The file or folder of the repository that a link means, where that is no page."""
    path = urlsplit(target).path
    if not path or target.startswith(("http:", "https:", "mailto:", "#")):
        return None
    found = (page.parent / path).resolve()
    if not found.exists():  # Sphinx leaves the ending of a page out
        found = found.with_name(f"{found.name}.md")
    if found.is_dir() and (found / "README.md").is_file():
        found = found / "README.md"
    is_page = found.suffix == ".md" and found.is_relative_to(ROOT / "docs")
    return found if found.exists() and found.is_relative_to(ROOT) and not is_page else None


def _copy(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name not in ("html", "dirhtml"):
        return
    for target in sorted(getattr(app.env, "repository_files", set())):
        name = target.relative_to(ROOT)
        place = Path(app.outdir) / "repository" / f"{name}.html"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_PAGE.format(title=html.escape(str(name)), text=html.escape(_text(target))), encoding="utf-8")


def _text(target: Path) -> str:
    if target.is_dir():
        return "\n".join(sorted(f"{each.name}{'/' * each.is_dir()}" for each in target.iterdir() if each.name[0] not in "._"))
    return target.read_text(encoding="utf-8")
