"""Apicurio Registry 3 over its REST API v3, and what is known of it when it is away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, Self

from soma_common.errors import (
    CodecError,
    IncompatibleSchema,
    RegistryUnavailable,
    SchemaNotFound,
)
from soma_common.schemas.address import RegistryAuth, check_id, check_url
from soma_common.schemas.avro import Schema, artifact_id, schema_text
from soma_common.schemas.compat import breaks, field_at
from soma_common.schemas.rest import Answer, Patience, Rest
from soma_common.schemas.table import SchemaRef, SchemaTable

logger = logging.getLogger(__name__)

# For so long a "no such id" is not asked again: hostile ids must not become a flood of requests.
ABSENT_SECONDS: Final = 10.0
MAX_ABSENT: Final = 10_000
_PATIENCE: Final = Patience()
_AT_ONCE: Final = 8
_IDS_PATH: Final = {"content": "contentIds", "global": "globalIds"}

EventKey = tuple[str, int]


class Registry:
    """The schemas of one group (a service) in Apicurio Registry, kept in memory and in a snapshot file.

    ``await resolve(schemas)`` once at start; from then on writing needs no request, and reading one per unknown
    writer schema. Implements the codec's ``SchemaIds``. Use it as an async context manager, in one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        group: str = "soma",
        auth: RegistryAuth | None = None,
        snapshot: Path | None = None,
        patience: Patience = _PATIENCE,
    ) -> None:
        self.url, self.group = check_url(url), check_id("group", group)
        self._rest, self._snapshot = Rest(self.url, auth, patience), snapshot
        self._table = SchemaTable()
        self._flights: dict[SchemaRef, asyncio.Task[Any]] = {}
        self._absent: dict[SchemaRef, float] = {}
        if snapshot is not None:
            self._table.load(snapshot, self._source)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        await self._rest.close()

    @property
    def _source(self) -> str:
        return f"{self.url} {self.group}"

    def id_of(self, event_type: str, version: int) -> int | None:
        """The content id that this event type and version is written with, or None."""
        return self._table.id_of(event_type, version)

    def schema_of(self, ref: SchemaRef) -> Any | None:
        """The schema behind an id, as far as known here."""
        return self._table.schema_of(ref)

    async def resolve(self, schemas: Mapping[EventKey, Schema], *, register: bool = True) -> None:
        """Learn the ids of these schemas; those the registry does not have are registered, unless told otherwise.

        When the registry is away and the snapshot knows every one of them, its ids are used and a warning is logged.

        Raises:
            RegistryUnavailable: the registry is away, and the snapshot lacks some of them.
            SchemaNotFound: ``register=False``, and the registry lacks one.
            IncompatibleSchema: the registry refuses one; nothing is known about the other new ones then.
        """
        texts = {key: schema_text(schema) for key, schema in schemas.items()}
        try:
            # One probe decides whether the registry is there, instead of every schema waiting for itself.
            self._rest.expect(await self._rest.send("GET", "/system/info"))
            await self._resolve_all(texts, register)
        except RegistryUnavailable as error:
            self._resolve_offline(texts, error)
        await self._save()

    async def fetch(self, ref: SchemaRef) -> Any:
        """The schema behind an id; many callers at once make one request.

        Raises:
            SchemaNotFound: the registry has no such id (remembered for 10 seconds).
            RegistryUnavailable: it is away.
        """
        known = self._table.schema_of(ref)
        if known is not None:
            return known
        if self._absent.get(ref, 0.0) > asyncio.get_running_loop().time():
            raise SchemaNotFound(f"{self.url} has no schema with {ref}.")
        return await self._single(ref, self._fetch(ref))

    async def register(self, event_type: str, version: int, schema: Schema) -> int:
        """Put a schema into the registry under the BACKWARD rule, or find it there; its content id.

        Raises:
            IncompatibleSchema: it cannot read what the latest one wrote; names the fields.
            RegistryUnavailable: the registry is away.
        """
        key, text = (event_type, version), schema_text(schema)
        await self._register(key, text)
        await self._save()
        return self._table.id_of(*key) or 0

    async def check(self, event_type: str, version: int, schema: Schema) -> bool:
        """Whether the registry has this very schema already; when not, that it would accept it (dryRun).

        Raises:
            IncompatibleSchema: it cannot read what the latest one wrote; names the fields.
            RegistryUnavailable: the registry is away.
        """
        key, text = (event_type, version), schema_text(schema)
        if await self._lookup(key, text) is not None:
            return True
        answer = await self._create(key, text, dry_run=True)
        found = await self._breaks(key, schema)
        self._accepted(key, answer, found, schema)
        # A registry without any rule accepts everything: our own reading of Avro's rules stands behind it.
        if found:
            raise _incompatible(key, found, [])
        return False

    async def set_global_rule(self, level: str = "BACKWARD") -> None:
        """Make a compatibility level the default of the whole registry."""
        body = {"ruleType": "COMPATIBILITY", "config": level}
        answer = await self._rest.send("POST", "/admin/rules", body)
        if answer.status == 409:
            answer = await self._rest.send("PUT", "/admin/rules/COMPATIBILITY", body)
        self._rest.expect(answer)

    async def _resolve_all(self, texts: Mapping[EventKey, str], register: bool) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)
        work = (self._resolve_one(key, text, register, gate) for key, text in texts.items())
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _resolve_one(self, key: EventKey, text: str, register: bool, gate: asyncio.Semaphore) -> None:
        async with gate:
            number = await self._lookup(key, text)
            if number is not None:
                self._learn(key, text, number)
            elif register:
                await self._register(key, text)
            else:
                raise SchemaNotFound(f"{self.url} lacks {_named(key)}.", cure="run `somastack schemas push`.")

    def _resolve_offline(self, texts: Mapping[EventKey, str], error: BaseException) -> None:
        missing = [_named(key) for key, text in texts.items() if self._table.content_id(text) is None]
        if missing:
            raise RegistryUnavailable(
                f"{error} No snapshot knows {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}.",
                cure="start the registry; later starts can use the snapshot.",
            ) from error
        for key, text in texts.items():
            self._table.bind(*key, self._table.content_id(text) or 0)
        logger.warning("The schema registry is away; the ids of the snapshot %s are used: %s", self._snapshot, error)

    async def _register(self, key: EventKey, text: str) -> None:
        ruled = await self._guard(key)
        answer = await self._create(key, text, dry_run=False)
        if answer.status not in (200, 201):
            schema = json.loads(text)
            self._accepted(key, answer, await self._breaks(key, schema), schema)
        number = self._content_id(answer, "version", "contentId")
        if not ruled:
            await self._guard(key)
        self._learn(key, text, number)

    async def _guard(self, key: EventKey) -> bool:
        """Set the BACKWARD rule on an artifact; False when the artifact is not there yet."""
        body = {"ruleType": "COMPATIBILITY", "config": "BACKWARD"}
        answer = await self._rest.send("POST", f"{self._artifacts}/{_path_id(key)}/rules", body)
        if answer.status not in (404, 409):
            self._rest.expect(answer)
        return answer.status != 404

    async def _create(self, key: EventKey, text: str, *, dry_run: bool) -> Answer:
        content = {"content": text, "contentType": "application/json"}
        body = {"artifactId": _path_id(key), "artifactType": "AVRO", "firstVersion": {"content": content}}
        # Content is compared as it is: the canonical form reorders fields, and another order is another binary format.
        query = f"?ifExists=FIND_OR_CREATE_VERSION&dryRun={str(dry_run).lower()}"
        answer = await self._rest.send("POST", f"{self._artifacts}{query}", body)
        # Two that create the same artifact at once: the loser finds it on the second try.
        return await self._rest.send("POST", f"{self._artifacts}{query}", body) if answer.status == 409 else answer

    async def _lookup(self, key: EventKey, text: str) -> int | None:
        """The content id of exactly this text under exactly this artifact."""
        query = f"?groupId={self.group}&artifactId={_path_id(key)}&artifactType=AVRO&limit=1"
        answer = await self._rest.send("POST", f"/search/versions{query}", text)
        self._rest.expect(answer)
        if answer.at("versions") == []:
            return None
        return self._content_id(answer, "versions", 0, "contentId")

    def _content_id(self, answer: Answer, *path: str | int) -> int:
        number = answer.at(*path)
        if not isinstance(number, int) or number < 1:
            raise self._rest.strange(answer)
        return number

    async def _breaks(self, key: EventKey, schema: Schema) -> list[str]:
        path = f"{self._artifacts}/{_path_id(key)}/versions/branch=latest/content"
        answer = await self._rest.send("GET", path)
        if answer.status != 200:
            return []
        try:
            return breaks(schema, answer.json())
        except (KeyError, TypeError, AttributeError) as error:
            raise CodecError(f"The latest {_named(key)} in the registry is not Avro: {error!r:.200}.") from error

    async def _fetch(self, ref: SchemaRef) -> Any:
        answer = await self._rest.send("GET", f"/ids/{_IDS_PATH[ref.kind]}/{ref.id}")
        if answer.status == 404 and answer.json().get("name"):
            if len(self._absent) >= MAX_ABSENT:
                self._absent.clear()
            self._absent[ref] = asyncio.get_running_loop().time() + ABSENT_SECONDS
            raise SchemaNotFound(f"{self.url} has no schema with {ref}.", cure="look at the record's producer.")
        self._rest.expect(answer)
        schema = answer.json()
        if not schema:
            raise CodecError(f"The schema with {ref} at {self.url} is not an Avro record.")
        self._table.learn(ref, answer.text)
        await self._save()
        return schema

    async def _single(self, ref: SchemaRef, work: Coroutine[Any, Any, Any]) -> Any:
        """One flight for all who ask for the same; a waiter that gives up does not stop it for the others."""
        flight = self._flights.get(ref)
        if flight is None:
            flight = self._flights[ref] = asyncio.create_task(work)
            flight.add_done_callback(lambda done: self._landed(ref, done))
        else:
            work.close()
        return await asyncio.shield(flight)

    def _landed(self, ref: SchemaRef, flight: asyncio.Task[Any]) -> None:
        self._flights.pop(ref, None)
        if not flight.cancelled() and flight.exception() is not None:
            logger.debug("The schema with %s was not fetched: %s", ref, flight.exception())

    def _learn(self, key: EventKey, text: str, number: int) -> None:
        before = self._table.content_id(text)
        if before is not None and before != number:
            logger.warning("%s had contentId %d in the snapshot and has %d now", _named(key), before, number)
        self._table.learn(SchemaRef("content", number), text)
        self._table.bind(*key, number)

    async def _save(self) -> None:
        if self._snapshot is None:
            return
        try:
            await asyncio.to_thread(self._table.save, self._snapshot, self._source)
        except OSError as error:
            logger.warning("The schema snapshot %s cannot be written: %s", self._snapshot, error)

    @property
    def _artifacts(self) -> str:
        return f"/groups/{self.group}/artifacts"

    def _accepted(self, key: EventKey, answer: Answer, found: list[str], schema: Schema) -> None:
        document = answer.json()
        if document.get("name") == "RuleViolationException":
            raise _incompatible(key, found, _causes(document, schema) or [str(document.get("title"))])
        self._rest.expect(answer)


def _path_id(key: EventKey) -> str:
    return check_id("artifact", artifact_id(*key))


def _named(key: EventKey) -> str:
    return f"{key[0]} v{key[1]}" if key[0] else artifact_id(*key)


def _causes(document: Mapping[str, Any], schema: Schema) -> list[str]:
    """The server's reasons with its JSON pointers turned into field paths."""
    causes = [cause for cause in document.get("causes") or [] if isinstance(cause, dict)]
    pairs = [(field_at(schema, str(cause.get("context", ""))), str(cause.get("description", ""))) for cause in causes]
    return [f"{path}: {why}" for path, why in pairs if path]


def _incompatible(key: EventKey, found: list[str], causes: list[str]) -> IncompatibleSchema:
    lines = found or causes
    fields = tuple(dict.fromkeys(line.split(": ", 1)[0] for line in [*found, *causes] if ": " in line))
    return IncompatibleSchema(
        f"{_named(key)} could not read events that are already written: {'; '.join(lines[:8])}.",
        fields=fields,
        cure="give new fields a default and keep the types, or raise the version and write an upcaster.",
    )
