"""What ``MODULE:NAME`` stands for."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from soma_common.errors import ConfigurationError


def load(name: str, what: str) -> Any:
    """The object of a module that can be imported from here.

    Raises:
        ConfigurationError: there is no such module or name.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        cure = "name it as package.module:NAME, importable from here."
        raise ConfigurationError(f"The {what} {name!r:.100} cannot be loaded: {error}.", cure=cure) from error
    finally:
        sys.path.pop(0)
