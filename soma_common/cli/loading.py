"""What ``MODULE:NAME`` stands for."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from soma_common.errors import ConfigurationError


def load(name: str, what: str) -> Any:
    """The object of a module that can be imported from here.

    Raises:
        ConfigurationError: there is no such module or name.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        cure = "name it as package.module:NAME, importable from here."
        raise ConfigurationError(f"The {what} {name!r:.100} cannot be loaded: {error}.", cure=cure) from error
    finally:
        if here in sys.path:  # the module may have changed it
            sys.path.remove(here)


_ASSIGNED: Final = re.compile(r"^(\w+)(?:\s*:[^=]+)?\s*=\s*(?:\w+\.)*Soma\b", re.MULTILINE)
_LARGEST: Final = 1_000_000  # bytes of a module that is read for its names
_MOST: Final = 500


def complete_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Modules below the folder we are in, and the applications that they seem to make; nothing is imported."""
    module, colon, _ = incomplete.partition(":")
    if colon:
        path = Path.cwd().joinpath(*module.split(".")).with_suffix(".py")
        found = _ASSIGNED.findall(_text(path)) if path.is_file() else []
        return [CompletionItem(f"{module}:{name}") for name in found if f"{module}:{name}".startswith(incomplete)]
    names = (f"{_dotted(path)}:{name}" for path in _modules() for name in _ASSIGNED.findall(_text(path)))
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]


def _modules() -> list[Path]:
    here = Path.cwd()
    paths = [*here.glob("*.py"), *here.glob("[a-zA-Z]*/*.py"), *here.glob("[a-zA-Z]*/[a-zA-Z]*/*.py")]
    return [path for path in paths[:_MOST] if all(part.isidentifier() for part in _dotted(path).split("."))]


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(Path.cwd()).with_suffix("").parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST else ""
    except (OSError, UnicodeDecodeError):
        return ""
