"""A contract test: what a service writes others can read, and what it handles it can read itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soma_common.errors import ConfigurationError
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.schemas.avro import event_schemas, schema_text
from soma_common.schemas.compat import breaks
from soma_common.schemas.files import EventKey, file_name

if TYPE_CHECKING:
    from soma_common.app import Soma

Folder = Path | str


def assert_compatible(soma: Soma, *, schemas: Folder = "schemas", consumes: Sequence[Folder] = ()) -> None:
    """The schemas, the payload models, the upcasters and the handlers of a service match.

    Four rules, each broken one a line of the error:

    1. The files in ``schemas`` are those of the models, and no model changed so that it cannot read what was written
       under its file: such a change is a new version.
    2. Every older version that a file or a model tells of has upcasters up to the newest model.
    3. A handler that names a model names the newest one of its type, and the application knows it.
    4. A handler of an event that another service records (its files are in a folder of ``consumes``) can read what that
       service writes.

    Args:
        soma: the application; it need not be open.
        schemas: the folder of its Avro files, as ``somastack schemas write`` makes them. They belong into version
            control: they are what is compared with.
        consumes: the like folders of services whose events it handles.

    Raises:
        AssertionError: lists everything that is wrong.
        ConfigurationError: a folder is not there, or a file in it is no schema.
    """
    problems = [
        *_files(_folder(schemas), soma.models),
        *_chains(soma, _folder(schemas)),
        *_handled(soma),
        *_foreign(soma, [_folder(each) for each in consumes]),
    ]
    if problems:
        raise AssertionError("\n".join([f"{len(problems)} things do not match:", *(f"  {each}" for each in problems)]))


def _folder(given: Folder) -> Path:
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigurationError(
            f"There is no folder {folder} with schemas.",
            cure="make it: `somastack schemas write --models MODULE:NAME`.",
        )
    return folder


def _files(folder: Path, models: PayloadModels) -> Iterator[str]:
    wanted = event_schemas(models.values())
    for key, schema in wanted.items():
        path = folder / file_name(key)
        if not path.exists():
            yield f"{path.name} is missing; `somastack schemas write` writes it"
        elif path.read_text(encoding="utf-8", errors="replace") != schema_text(schema, pretty=True):
            broken = _breaks(schema, path)
            yield from (f"{path.name}: {each}; make it a new version, with an upcaster to it" for each in broken)
            if not broken:
                yield f"{path.name} differs from its model; `somastack schemas write` writes it"
    for event_type, version in sorted(set(_keys(folder)) - set(wanted)):
        newest = models.latest(event_type)
        if newest is None or version > newest:  # of an older version the model may be gone: upcasters read it
            yield f"{file_name((event_type, version))} belongs to no model; remove it"


def _chains(soma: Soma, folder: Path) -> Iterator[str]:
    for event_type in sorted({name for name, _ in soma.models}):
        newest = soma.models.latest(event_type) or 1
        known = {version for name, version in (*soma.models, *_keys(folder)) if name == event_type}
        for version in sorted(known):
            end = _upcast_to(soma.upcasters, event_type, version)
            if end != newest and version <= newest:  # of newer ones the files are told already
                yield f"{event_type} v{version} is upcast to v{end}, and its newest model is v{newest}; add upcasters"


def _upcast_to(upcasters: Mapping[EventKey, Any], event_type: str, version: int) -> int:
    while (event_type, version) in upcasters:
        version += 1
    return version


def _handled(soma: Soma) -> Iterator[str]:
    for consumer, model, name in _handlers(soma):
        key = (model.event_type, model.schema_version)
        if soma.models.get(key) is not model:
            yield f"{consumer}: {name} takes {model.__name__}, which the application does not know; add it to models"
        elif model.schema_version != soma.models.latest(model.event_type):
            newest = soma.models.latest(model.event_type)
            yield f"{consumer}: {name} takes {model.event_type} v{model.schema_version}, and the newest is v{newest}"


def _foreign(soma: Soma, folders: Sequence[Path]) -> Iterator[str]:
    """What others write must be readable: by the model of that version, or of an older one without a newer of ours."""
    models = dict.fromkeys(model for _, model, _ in _handlers(soma))
    own = event_schemas(models)
    for folder in folders:
        for key in sorted(_keys(folder)):
            event_type, version = key
            newest = soma.models.latest(event_type)
            if newest is None or not any(model.event_type == event_type for model in models):
                continue
            path = folder / file_name(key)
            if version > newest:
                yield f"{path}: it writes {event_type} v{version}, and the newest model here is v{newest}"
            elif key in own:
                yield from (f"{path}: {broken}" for broken in _breaks(own[key], path))


def _handlers(soma: Soma) -> Iterator[tuple[str, type[Payload], str]]:
    """Consumer, model and name of every handler that names a model."""
    for consumer, handlers in soma.declared.items():
        for event_type in sorted(handlers.types):
            for handler in handlers.of(event_type):
                if handler.model is not None:
                    yield consumer, handler.model, getattr(handler.handle, "__qualname__", repr(handler.handle))


def _keys(folder: Path) -> Iterable[EventKey]:
    """The event types and versions of the files in a folder."""
    for path in folder.glob("*.v*.avsc"):
        event_type, _, version = path.stem.rpartition(".v")
        if version.isdecimal():
            yield event_type, int(version)


def _breaks(model_schema: Any, path: Path) -> list[str]:
    """Where a model cannot read what was written under a file."""
    try:
        return breaks(model_schema, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is no schema: {type(error).__name__}: {error}.", cure="take it from version control."
        ) from error
