"""Another value for a letter: written, compared and checked before it counts."""

from __future__ import annotations

from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from starlette.responses import Response

from soma_common.console.letters import alone, can_edit, edited_record, event_of, letter_of, own
from soma_common.console.security import Refused
from soma_common.console.values import as_json, compared, is_text
from soma_common.console.web import Ask, Page
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import FullLetter
from soma_common.errors import SomaError, ValidationError
from soma_common.escaping import json_escaped
from soma_common.events.codec import JsonCodec
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import to_json
from soma_common.events.upcasting import typed

_SEQUENCE: Final = 50
_SAME: Final = (
    "event_id",
    "tenant_id",
    "aggregate_type",
    "aggregate_id",
    "event_type",
    "idempotency_key",
    "service_id",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``sign``: good, doubt or bad."""

    sign: str
    text: str


async def edit(ask: Ask) -> Response:
    """The value of a letter, to be changed."""
    letter = await _editable(ask)
    text, coding = await written(ask, letter)
    return ask.page("letter_edit.html", one=letter.letter, text=text, coding=coding, why="")


async def check(ask: Ask) -> Response:
    """A dry run: what an edit changes, whether it fits, and what would be tried. Nothing is changed."""
    letter = await _editable(ask)
    value, raw = _value(ask, letter)
    before, _ = await written(ask, letter, edited=False)
    after = as_json(value) or value.decode("utf-8", "replace")
    checks, known = await checked(ask, letter, value, raw=raw), letter.letter
    sequence = await ask.backend.fetch("sequence", known.letter_id, _SEQUENCE)
    return ask.page(
        "letter_check.html", one=known, checks=checks, lines=compared(before, after), same=before == after,
        text=_again(ask), coding=ask.form.get("coding", "text"), raw=raw,
        good=not any(each.sign == "bad" for each in checks), sequence=own(ask, sequence),
        can=await _handler(ask).retry_event(known.letter_id, dry_run=True),
    )  # fmt: skip


async def save(ask: Ask) -> Response:
    """Keep an edit, and (where that is asked for) ask for another try with it."""
    reason, letter = ask.reason(), await _editable(ask)
    value, raw = _value(ask, letter)
    bad = [each.text for each in await checked(ask, letter, value, raw=raw) if each.sign == "bad"]
    if bad:
        raise ValidationError(bad[0], cure="go back and mend the value.")
    if str(letter.letter.revision) != ask.form.get("revision"):
        raise Refused(409, "Somebody changed this letter meanwhile.", "look at it again, then edit it.")
    again = ask.form.get("then") == "retry"
    if again:
        await alone(ask, letter)
    revision = await _handler(ask).edit(letter, value, why=reason, raw=raw)
    ask.did("letter edited", letter=str(letter.letter.letter_id), reason=reason, revision=revision)
    said = f"The edit is kept as revision {revision}."
    if again:
        done = await _handler(ask).retry_event(letter.letter.letter_id, why=reason)
        ask.did("letter retried", letter=str(letter.letter.letter_id), reason=reason, done=done)
        said += " Another try is asked for." if done else " Another try was asked for before."
    return ask.back(f"/letters/{letter.letter.letter_id}", said)


async def written(ask: Ask, letter: FullLetter, *, edited: bool = True) -> tuple[str, str]:
    """A letter's value as text that can be changed, and how it is coded: what is no text is base64."""
    value = (letter.value if edited else letter.record.value) or b""
    text = as_json(value)
    if text is not None:
        return text, "text"
    with suppress(UnicodeDecodeError):
        if is_text(value.decode("utf-8")):
            return value.decode("utf-8"), "text"
    event, _ = await event_of(ask, letter)
    if event is not None:  # a frame of Avro: its consumer takes the envelope as JSON too
        return as_json(envelope(event)) or "", "text"
    return b64encode(value).decode(), "base64"


def envelope(event: RecordedEvent) -> bytes:
    """An event as the JSON envelope."""
    return JsonCodec().encode(event, to_json("The payload", event.payload, 16 * 1024 * 1024))


async def checked(ask: Ask, letter: FullLetter, value: bytes, *, raw: bool) -> list[Check]:
    """What is known of a new value before it counts."""
    try:
        await _handler(ask).edit(letter, value, raw=raw, dry_run=True)
        found = [Check("good", f"The library takes it: {len(value):,} bytes, and the original stays.")]
    except SomaError as error:
        return [Check("bad", f"The library refuses it: {error.message} {error.cure or ''}")]
    before, _ = await event_of(ask, letter)
    try:
        after = await ask.backend.event_in(edited_record(letter, value))
    except SomaError as error:
        sign = "doubt" if ask.person.tenants is None else "bad"
        return [*found, Check(sign, f"It is no event: {error.message}")]
    found.append(Check("good", f"It is an event: {after.event_type}, version {after.schema_version} of its schema."))
    return [*found, *_identity(ask, letter, before, after), _payload(ask, after)]


def _identity(ask: Ask, letter: FullLetter, before: RecordedEvent | None, after: RecordedEvent) -> list[Check]:
    """What makes an event this one should stay; of its tenant, nobody who may not see all may change it."""
    if ask.person.tenants is not None and after.tenant_id != letter.letter.event.tenant_id:
        return [Check("bad", "It would be another tenant's event.")]
    if before is None:
        return [Check("doubt", "The original cannot be read: whether it is the same event is not known.")]
    changed = [name for name in _SAME if getattr(before, name) != getattr(after, name)]
    if changed:
        return [Check("doubt", f"It is another event now: {', '.join(changed)} changed.")]
    return [Check("good", "It is the same event: id, tenant, stream and key are as they were.")]


def _payload(ask: Ask, event: RecordedEvent) -> Check:
    models = ask.backend.models
    if models is None:
        return Check("doubt", "Its payload was not checked: start the console with --app to have it checked.")
    try:
        fits = typed(event, *models)
    except SomaError as error:
        return Check("bad", f"Its payload does not fit its schema: {error.message}")
    if isinstance(fits.payload, dict):
        return Check("doubt", f"The application has no model for {event.event_type}: the payload was not checked.")
    return Check("good", f"Its payload fits {type(fits.payload).__name__}.")


async def _editable(ask: Ask) -> FullLetter:
    letter = await letter_of(ask)
    if not can_edit(letter):
        raise Refused(
            409, "This letter cannot be edited.", "settled letters, and those of sagas and relays, stay as they are."
        )
    return letter


def _value(ask: Ask, letter: FullLetter) -> tuple[bytes, bool]:
    """The bytes that were written, and whether they are meant as they are."""
    text, raw = ask.form.get("value", ""), ask.form.get("raw") == "yes"
    if ask.form.get("coding") == "base64":
        try:
            return b64decode(text, validate=False), raw
        except ValueError as error:
            raise ValidationError("This is no base64.", cure="write the bytes as base64.") from error
    return text.replace("\r\n", "\n").encode(), raw  # as it was before the form


def _again(ask: Ask) -> str:
    """What was written, for writing on: line ends as they were, and JSON as a page shows it."""
    text = ask.form.get("value", "").replace("\r\n", "\n")
    return json_escaped(text) if as_json(text.encode()) is not None else text


def _handler(ask: Ask) -> DLQHandler:
    return ask.backend.letters(ask.person.who)


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/letters/{letter}/edit", "GET", edit),
    ("/letters/{letter}/check", "POST", check),
    ("/letters/{letter}/edit", "POST", save),
)
