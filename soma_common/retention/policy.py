"""How long things are kept: by event type in the log, and by kind of row beside it. Nothing goes unless it is said."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from soma_common.errors import ConfigurationError

FOREVER: Final = None
LEAST: Final = timedelta(days=1)
_MOST: Final = timedelta(days=365_000)
_UNITS: Final = {"hour": 1, "hours": 1, "day": 24, "days": 24, "week": 168, "weeks": 168, "year": 8766, "years": 8766}
_DURATION = re.compile(r"^([0-9]{1,6}) *([a-z]+)\Z")
_PATTERN = re.compile(r"^[a-z][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*(\.\*)?\Z")
_MOST_PATTERN: Final = 200

Keep = timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """What is kept for how long; None is for ever, and the default of everything.

    Args:
        default: events whose type no entry of ``events`` names.
        events: by event type (``txn.started``) or prefix (``cognitive.*``); the longest match counts. An event's age
            counts from ``recorded_at``.
        inbox: what consumers have applied. Keep it longer than any record can be delivered again: than the retention
            of the topics they read, and than the backups from which they may be restored.
        idempotency_keys: keys that callers gave. Within this time a second publish is found out.
        letters: resolved and discarded dead letters, with their history.
        replays: replays that are done or cancelled; forced ones and rebuilds stay, as an audit.

    Raises:
        ConfigurationError: a pattern that no type can match, or a time under a day.
    """

    default: Keep = FOREVER
    events: Mapping[str, Keep] = field(default_factory=dict)
    inbox: Keep = FOREVER
    idempotency_keys: Keep = FOREVER
    letters: Keep = FOREVER
    replays: Keep = FOREVER

    def __post_init__(self) -> None:
        for pattern in self.events:
            if not isinstance(pattern, str) or len(pattern) > _MOST_PATTERN or not _PATTERN.fullmatch(pattern):
                raise ConfigurationError(
                    f"{pattern!r:.100} is no pattern of event types.",
                    cure="name a type (txn.started), or a prefix and a star (cognitive.*); use default for all others.",
                )
        for name, keep in (*self._beside(), ("default", self.default), *self.events.items()):
            _check(name, keep)

    def _beside(self) -> list[tuple[str, Keep]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("default", "events")]

    def keeps(self, event_type: str) -> Keep:
        """How long events of this type stay in the log."""
        if event_type in self.events:
            return self.events[event_type]
        words = event_type.split(".")
        for count in range(len(words) - 1, 0, -1):
            pattern = ".".join(words[:count]) + ".*"
            if pattern in self.events:
                return self.events[pattern]
        return self.default

    @property
    def archives(self) -> bool:
        """Whether events ever leave the log."""
        return self.default is not FOREVER or any(keep is not FOREVER for keep in self.events.values())

    @classmethod
    def load(cls, path: Path) -> tuple[RetentionPolicy, str | None]:
        """The policy of a TOML file, and where its archives go (None: not said).

        Raises:
            ConfigurationError: the file cannot be read, or has a name or value that is not known; says which.
        """
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigurationError(
                f"The policy {path} cannot be read: {error}.", cure="see docs/how-to/retention.md for an example."
            ) from error
        archive = given.pop("archive", None)
        if archive is not None and (not isinstance(archive, str) or not archive):
            raise ConfigurationError(
                f"archive is {archive!r:.80} in {path}.", cure="name a folder, or s3://bucket/path."
            )
        return cls.of(given), archive

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RetentionPolicy:
        """The policy of such a mapping: ``events`` with ``default`` and patterns, ``keep`` with the rest.

        Raises:
            ConfigurationError: see :meth:`load`.
        """
        _known("the policy", given, ("events", "keep"))
        events, keep = _table(given, "events"), _table(given, "keep")
        _known("[keep]", keep, [name for name, _ in cls()._beside()])
        times = {name: duration(name, text) for name, text in keep.items()}
        patterns = {name: duration(name, text) for name, text in events.items()}
        return cls(default=patterns.pop("default", FOREVER), events=patterns, **times)


def duration(name: str, text: Any) -> Keep:
    """``forever``, or a number of hours, days, weeks or years (of 365.25 days).

    Raises:
        ConfigurationError: anything else; ``name`` says where it stands.
    """
    if text == "forever":
        return FOREVER
    found = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if found is None or found[2] not in _UNITS:
        raise ConfigurationError(f"{name} is kept for {text!r:.80}.", cure="say forever, 90 days, 12 weeks or 7 years.")
    return timedelta(hours=int(found[1]) * _UNITS[found[2]])


def _check(name: str, keep: Keep) -> None:
    if keep is not None and (not isinstance(keep, timedelta) or not LEAST <= keep <= _MOST):
        raise ConfigurationError(
            f"{name:.100} is kept for {keep!r:.80}.", cure="a day is the least; None, or forever, keeps everything."
        )


def _table(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = given.get(name, {})
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{name} is {found!r:.80} in the policy.", cure=f"write a table: [{name}].")
    return found


def _known(where: str, given: Mapping[str, Any], names: Any) -> None:
    for name in given:
        if name not in names:
            raise ConfigurationError(f"{where} has {name!r:.80}.", cure=f"known are: {', '.join(names)}.")
