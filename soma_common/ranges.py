"""One check for settings objects: numbers within their bounds, parts of the right kind."""

from __future__ import annotations

from soma_common.errors import ConfigurationError


def check_settings(settings: object, /, **wanted: tuple[float, float] | type) -> None:
    """That these fields are numbers from the one bound to the other, or of the type.

    Bounds that are whole numbers ask for whole numbers. Neither a bool nor NaN is a number here.

    Raises:
        ConfigurationError: one is not; the message names it, the cure its bounds.
    """
    kind = type(settings).__name__
    for name, bounds in wanted.items():
        value = getattr(settings, name)
        if isinstance(bounds, type):
            if not isinstance(value, bounds):
                raise ConfigurationError(f"{kind}: {name}={value!r:.80}.", cure=f"pass a {bounds.__name__}.")
            continue
        least, most = bounds
        whole = isinstance(least, int)
        number = not isinstance(value, bool) and isinstance(value, int if whole else int | float)
        if not number or not least <= value <= most:
            what = "a whole number" if whole else "a number"
            raise ConfigurationError(f"{kind}: {name}={value!r:.80}.", cure=f"use {what} from {least:g} to {most:g}.")
