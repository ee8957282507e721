"""Dead letters: kinds of failures, lists, one letter with all that is kept of it, and what people do with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from starlette.responses import Response

from soma_common.console.security import Refused
from soma_common.console.values import Shown, download, shown_bytes
from soma_common.console.web import Ask, Page
from soma_common.dlq.filters import LetterFilter
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import OF_RELAY, OF_SAGA, OPEN, FullLetter, Status
from soma_common.errors import LetterNotFound, SomaError, ValidationError
from soma_common.events.models import RecordedEvent

BOUND: Final = 10_001  # letters that are counted
_KINDS: Final = 300  # that are found and counted
_SHOWN: Final = 100  # of these, the largest
_COUNTED: Final = 100_000  # letters that the counts of all kinds look at together
_PAGE: Final = 50
_SEQUENCE: Final = 50
FIELDS: Final = ("consumer", "stage", "fingerprint", "event_type", "event_id", "trace_id", "error_type")


def wanted(ask: Ask) -> LetterFilter:
    """The filter in what was asked for; without a status: open letters."""
    statuses = ask.words("status")
    chosen = None if "all" in statuses else statuses or [status.value for status in OPEN]
    return LetterFilter(
        tenant_id=ask.tenant, statuses=chosen, since=ask.moment("since"), until=ask.moment("until"),
        **{name: ask.word(name) for name in FIELDS},
    )  # fmt: skip


def asked(ask: Ask) -> dict[str, Any]:
    """What was asked for, for links to the same letters."""
    return {name: ask.word(name) for name in (*FIELDS, "since", "until")} | {"status": ask.words("status")}


async def kinds(ask: Ask) -> Response:
    """The first page: what kinds of failures there are, and the newest letters."""
    groups = await ask.backend.of_tenant("kinds", ask.tenant, _KINDS, _COUNTED)
    bound = _COUNTED // max(1, len(groups))
    counts = await ask.backend.of_tenant("letters", ask.tenant, BOUND)
    return ask.page(
        "letters.html", groups=sorted(groups, key=lambda row: -row[3])[:_SHOWN], bound=bound, counts=counts, most=BOUND,
        more=max(0, len(groups) - _SHOWN), full=len(groups) == _KINDS,
    )  # fmt: skip


async def found(ask: Ask) -> Response:
    """Letters of a filter, page by page."""
    given, oldest = wanted(ask), ask.word("order") == "oldest"
    page = await ask.backend.letters("").list_dlq_events(
        given, ask.word("cursor"), limit=_PAGE, newest_first=not oldest
    )
    names = [row[0] for row in await ask.backend.fetch("consumer_names")]
    return ask.page(
        "letters_found.html", page=page, wanted=asked(ask), consumers=names, statuses=list(Status), oldest=oldest,
        paged=ask.word("cursor") is not None,
    )  # fmt: skip


async def one(ask: Ask) -> Response:
    """One letter."""
    letter = await letter_of(ask)
    handler, known = ask.backend.letters(ask.person.who), letter.letter
    event, why = await event_of(ask, letter)
    rows = await ask.backend.fetch("sequence", known.letter_id, _SEQUENCE)
    return ask.page(
        "letter.html", letter=letter, one=known, event=event, why=why, raw=shown_bytes(letter.record.value),
        edited=shown_bytes(letter.edited_value),
        headers=[(name, _header(text)) for name, text in letter.record.headers],
        history=await handler.history(known.letter_id), sequence=own(ask, rows),
        most=_SEQUENCE, is_open=known.status in OPEN, can_edit=can_edit(letter),
        of_saga=known.partition == OF_SAGA, key=shown_bytes(letter.record.key), shown_bytes=shown_bytes,
    )  # fmt: skip


async def value(ask: Ask) -> Response:
    """The bytes of a letter, whole."""
    letter = await letter_of(ask)
    edited = ask.word("what") == "edited"
    return download(
        (letter.edited_value if edited else letter.record.value) or b"", f"letter-{letter.letter.letter_id}"
    )


async def retry(ask: Ask) -> Response:
    """Ask for another try of a letter's sequence."""
    reason, letter = ask.reason(), await letter_of(ask)
    await alone(ask, letter)
    done = await ask.backend.letters(ask.person.who).retry_event(letter.letter.letter_id, why=reason)
    ask.did("letter retried", letter=str(letter.letter.letter_id), reason=reason, done=done)
    said = "Another try is asked for." if done else "Nothing to do: it was asked for before, or the letter is settled."
    return ask.back(f"/letters/{letter.letter.letter_id}", said)


async def discard(ask: Ask) -> Response:
    """Give a letter up."""
    reason, letter = ask.reason(), await letter_of(ask)
    done = await ask.backend.letters(ask.person.who).discard(letter.letter.letter_id, reason)
    ask.did("letter discarded", letter=str(letter.letter.letter_id), reason=reason, done=done)
    said = "The letter is given up. What stands behind it goes on." if done else "It was given up before."
    return ask.back(f"/letters/{letter.letter.letter_id}", said)


async def letter_of(ask: Ask) -> FullLetter:
    """The letter of the path, if it is one of a tenant that may be seen.

    Raises:
        Refused: there is none, or it is somebody else's: nobody is told which.
    """
    none = Refused(404, "There is no such letter.", "check its id, and whose it is.")
    try:
        letter = await DLQHandler(ask.backend.pool, who=ask.person.who).show(ask.path("letter"))
    except (ValidationError, LetterNotFound) as error:
        raise none from error
    ask.must_see(letter.letter.event.tenant_id, none)
    return letter


async def alone(ask: Ask, letter: FullLetter) -> None:
    """That a retry, which takes the whole sequence, would touch no other tenant's letters, where that matters.

    Raises:
        Refused: it would.
    """
    if ask.person.tenants is None:
        return
    rows = await ask.backend.fetch("strangers", letter.letter.letter_id, letter.letter.event.tenant_id)
    if rows[0][0]:
        raise Refused(
            403, "In the sequence of this letter stand letters of other tenants.", "ask somebody who may see them."
        )


async def event_of(ask: Ask, letter: FullLetter) -> tuple[RecordedEvent | None, str]:
    """The event in what a try works with; or why there is none to be seen."""
    if letter.letter.partition == OF_SAGA:
        return None, "The letter of a saga holds what the saga was started with."
    record = letter.record if letter.edited_value is None else edited_record(letter)
    try:
        return await ask.backend.event_in(record), ""
    except SomaError as error:
        return None, error.message


def edited_record(letter: FullLetter, value: bytes | None = None) -> Any:
    """The record with another value: the one of its edit, or this."""
    return replace(letter.record, value=letter.value if value is None else value)


def can_edit(letter: FullLetter) -> bool:
    """Whether the library would take another value for it."""
    return letter.letter.status in OPEN and letter.letter.partition not in (OF_RELAY, OF_SAGA)


def own(ask: Ask, rows: list[Any]) -> list[Any]:
    """Of a sequence, the letters that this person may see."""
    return [row for row in rows if ask.person.may_see(row[5])]


def _header(value: bytes | None) -> str:
    shown = Shown.of(value)
    return shown.text if len(shown.text) <= 2000 else f"{shown.text[:2000]}…"


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/letters", "GET", kinds),
    ("/letters/found", "GET", found),
    ("/letters/{letter}", "GET", one),
    ("/letters/{letter}/value", "GET", value),
    ("/letters/{letter}/retry", "POST", retry),
    ("/letters/{letter}/discard", "POST", discard),
)
