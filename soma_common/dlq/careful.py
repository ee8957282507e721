"""A re-drive of many letters that goes no faster than it may, and stops when the cause is not mended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from uuid import UUID

from soma_common.dlq import verbs
from soma_common.dlq.filters import LetterFilter, cursor_of
from soma_common.dlq.models import Status
from soma_common.errors import ValidationError
from soma_common.pacing import TokenBucket
from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks

_LOOK = 0.2  # seconds between two looks at what became of the letters
_PART = 1000  # letters of one look
_FIRST = 10  # letters of the first step: how long their sequences are is not known yet
_FAILED = (Status.DEAD, Status.RETRYING)
_UNDER_WAY = (Status.REDRIVING, Status.BLOCKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedriveRules:
    """How careful a re-drive is.

    Args:
        rate: letters per second, or None: as fast as they are done.
        window, failures: it stops when, of the last so many that ended, this share or more failed. A share above 1
            never stops it.
        ahead: about so many letters are asked for and not done yet, and tried before anything is known. A sequence is
            asked for whole, however long it is.
        patience: it stops when none of them ends for so many seconds: nobody seems to try them.
        wait: go on watching until the last one is done, not only until it is asked for.
    """

    rate: float | None = None
    window: int = 50
    failures: float = 0.5
    ahead: int = 200
    patience: float = 60.0
    wait: bool = False

    def __post_init__(self) -> None:
        given = (self.rate or 1, self.window, self.failures, self.ahead, self.patience)
        fits = (
            all(isinstance(value, int | float) for value in given)
            and (self.rate is None or 0 < self.rate <= 1e6)
            and 1 <= self.window <= 100_000
            and 0 < self.failures <= 2
            and 1 <= self.ahead <= 100_000
            and 0 < self.patience <= 86_400
        )
        if not fits:
            raise ValidationError(
                f"{self} cannot be followed.",
                cure="rate above 0, window and ahead 1 to 100,000, failures 0 to 2, patience up to 86,400 seconds.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Redrive:
    """How a re-drive stands.

    Args:
        marked: letters asked for: whole sequences, so there may be more than match.
        resolved, failed: what became of them; ``waiting``: not known yet. Letters that stand behind a failed one of
            their sequence are in none of these.
        cursor: where another re-drive would go on, past all that this one asked for.
        stopped: why it stopped by itself, or None.
        fingerprints: of the failures in the window, the most frequent first.
    """

    marked: int = 0
    resolved: int = 0
    failed: int = 0
    waiting: int = 0
    cursor: str | None = None
    stopped: str | None = None
    fingerprints: tuple[str, ...] = ()


class _Watch:
    """What becomes of the letters that were asked for; a part of them is looked at at a time."""

    def __init__(self, pool: Pool, rules: RedriveRules) -> None:
        self._pool, self._rules = pool, rules
        self._ended: deque[str | None] = deque(maxlen=rules.window)  # a fingerprint where one failed
        self.under_way: dict[UUID, None] = {}  # in the order in which they were asked for
        self.resolved = self.failed = 0
        self._moved = self._looked = time.monotonic()

    def add(self, letters: Sequence[UUID]) -> None:
        """These are asked for."""
        if not self.under_way:
            self._moved = time.monotonic()
        self.under_way.update(dict.fromkeys(UUID(int=letter.int) for letter in letters))

    async def look(self) -> None:
        """See which have ended. What stands behind a failure is not waited for."""
        self._looked = time.monotonic()
        before = len(self.under_way)
        part = list(islice(self.under_way, _PART))
        found = {UUID(int=row[0].int): row for row in await self._pool.fetch(blocks("dead_letters")["outcomes"], part)}
        for letter, (_, status, fingerprint, stands) in found.items():
            if status == Status.RESOLVED:
                self.resolved += 1
                self._ended.append(None)
            elif status in _FAILED:
                self.failed += 1
                self._ended.append(fingerprint or "unknown")
            elif status in _UNDER_WAY and not stands:
                continue
            del self.under_way[letter]
        for letter in part:
            if letter not in found:  # retention was quicker
                del self.under_way[letter]
        if len(self.under_way) < before:
            self._moved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another look."""
        return bool(self.under_way) and time.monotonic() - self._looked >= _LOOK

    def fingerprints(self) -> tuple[str, ...]:
        """Of the failures in the window, the most frequent first."""
        return tuple(name for name, _ in Counter(name for name in self._ended if name is not None).most_common(5))

    def verdict(self, *, full: bool) -> str | None:
        """Why it must stop. ``full``: nothing more can be asked for until something ends."""
        failed = sum(name is not None for name in self._ended)
        if len(self._ended) == self._rules.window and failed >= self._rules.failures * self._rules.window:
            return f"{failed} of the last {self._rules.window} letters failed again"
        if full and self.under_way and time.monotonic() - self._moved > self._rules.patience:
            return f"no letter ended for {self._rules.patience:g} s: is the consumer running?"
        return None


async def redrive(
    pool: Pool, wanted: LetterFilter, *, who: str, why: str | None = None, most: int | None = None,
    after: str | None = None, rules: RedriveRules | None = None,
) -> AsyncIterator[Redrive]:  # fmt: skip
    """Ask for another try of all dead and retrying letters that match, oldest first, watching what becomes of them.

    Yields how it stands after each step; the last one says whether it stopped by itself. Broken off at any point, what
    was asked for stays so; called again it goes on with the rest, and with ``after`` past those that failed again.

    Args:
        most: matching letters to take at most.
        after: the ``cursor`` of an earlier re-drive.
    """
    given = rules or RedriveRules()
    watch, bucket, resting = _Watch(pool, given), TokenBucket(given.rate, burst=max(1.0, (given.rate or 0) / 4)), 0.0
    state, place, left = Redrive(cursor=after), cursor_of(after), most
    over, asked = False, 0
    while True:
        if watch.due:
            await watch.look()
        room = given.ahead - len(watch.under_way)
        stopped = watch.verdict(full=over or room <= 0)
        rest = resting - time.monotonic()
        if stopped is None and not over and room > 0 and rest <= 0:
            limit = _limit(room, left, given.rate, state.marked / asked if asked else room / _FIRST)
            letters = await verbs.page_of_markable(pool, wanted, place, limit) if limit else []
            over = len(letters) < limit or not limit
            if letters:
                marked = await verbs.mark(pool, [letter.letter_id for letter in letters], who, why)
                watch.add(marked)
                asked += len(letters)
                place, left = letters[-1].place, None if left is None else left - len(letters)
                state = replace(state, marked=state.marked + len(marked), cursor=str(place))
                resting = time.monotonic() + bucket.take(len(marked))
                rest = resting - time.monotonic()
        state = replace(
            state, resolved=watch.resolved, failed=watch.failed, waiting=len(watch.under_way), stopped=stopped,
            fingerprints=watch.fingerprints(),
        )  # fmt: skip
        yield state
        if stopped is not None or (over and not (given.wait and watch.under_way)):
            return
        if over or room <= 0 or rest > 0:
            await asyncio.sleep(_LOOK if over or room <= 0 else min(_LOOK, rest))


def _limit(room: int, left: int | None, rate: float | None, length: float) -> int:
    """Letters of the next step: as many as there is room for with sequences of this length, and a second's worth."""
    a_second = float(verbs.BATCH) if rate is None else rate
    fitting = max(1, int(min(room, a_second) / max(1.0, length)))
    return min(verbs.BATCH, fitting, fitting if left is None else left)
