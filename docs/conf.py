"""The documentation as a site: ``make site``. Warnings are errors there."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from django.conf import settings  # noqa: E402

from soma_common import __version__  # noqa: E402

settings.configure()  # what has to do with Django is looked at, too

project, author, release = "soma-common", "the soma-common authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "repository_links", "house_docstrings"]
root_doc = "index"
exclude_patterns = ["_build", "README.md", "conf.py"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme, html_title = "furo", f"soma-common {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_use_rtype = False
nitpicky = False  # of types of other libraries there are no pages here
suppress_warnings = ["config.cache"]
