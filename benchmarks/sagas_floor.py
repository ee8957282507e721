"""A process of the benchmark of sagas: the bare floor, what a worker asks of PostgreSQL and nothing else.

``same`` sends the very statements of our worker (blocks ``claim`` and ``record`` of ``sagas.sql``), with arguments that
are put together by hand; ``least`` sends the least that leaves the same rows: an UPDATE of the saga and an INSERT of
its journal in one statement, which names only the columns it needs.

Both are fair, since whoever keeps a saga safe does this much: a claim, fenced by an epoch, for up to ``at_once`` sagas;
each transactional step is BEGIN, the step's own INSERT, the record, COMMIT, on as many connections as our pool has;
each external step is called, and what it gave is recorded for up to 200 sagas in one commit, as our recorder does. Two
halves of the sagas take turns in that: while one waits for its commit, the other is at work.
Neither decides anything, decodes, encodes or checks a value, keeps a lease, tells time, notices an error, or has a task
per saga. Nothing here survives a failure.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg

from benchmarks.sagas_library import CONNECTIONS, EXTERNAL, INSERT, SAGAS, TRANSACTIONAL
from soma_common.garbage import calm_collector
from soma_common.postgres.bounded import begin_statement
from soma_common.postgres.bounds import Bound
from soma_common.sagas.models import Saga
from soma_common.sql.loader import blocks

SQL: Final = blocks("sagas")
LEASE, MOST, POLL = 60.0, 200, 0.002
BOUND: Final = Bound(35.0, 35.0)  # seconds: a step's usual time, and five more
Held = tuple[UUID, int, int]
"""A saga: its id, its epoch, the number it was started with."""

# What leaves the same rows with the least work; by whether it is the last step, and whether it is of many sagas.
_LEAST = """
WITH held AS (
    UPDATE soma.sagas s SET {change} FROM (SELECT $1::uuid[] AS ids, $2::bigint[] AS epochs) AS g
    WHERE s.saga_id = ANY (g.ids) AND s.epoch = ANY (g.epochs) AND s.owner = $3::uuid
    RETURNING s.saga_id, s.length, s.epoch)
INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, took, epoch, result)
SELECT h.saga_id, h.length - {behind}, e.step, e.what, e.attempt, now(), e.took, h.epoch, e.result::json
FROM held h, {entries}
"""
_DONE = "('{step}', 'done', 1, 0.001, '{result}'::text)"
_ENDED = "('', 'ended', 0, NULL, NULL)"
_COLUMNS = "AS e (step, what, attempt, took, result)"


class Floor:
    """One worker without a library."""

    def __init__(self, saga: Saga, way: str, at_once: int, connections: Sequence[Any]) -> None:
        self.saga, self.at_once = saga, at_once
        self.connections = connections
        self.steps = [part.name for part in saga.parts if hasattr(part, "name")]
        self.owner = uuid4()
        self.write = self._same if way == "same" else self._least
        self._begin = "BEGIN ISOLATION LEVEL READ COMMITTED" if way == "least" else begin_statement(BOUND, 18)
        self._ready: list[Held] = []
        self._claiming = asyncio.Lock()
        self._least_sql = [_least(step, last=step == self.steps[-1]) for step in self.steps]

    async def run(self) -> None:
        """For ever."""
        if self.saga is EXTERNAL:
            halves = min(self.at_once, 2)
            await asyncio.gather(*(self._external(c, self.at_once // halves) for c in self.connections[:halves]))
        else:
            await asyncio.gather(*(self._transactional(c) for c in self.connections[: self.at_once]))

    async def _transactional(self, connection: Any) -> None:
        while True:
            held = (await self._take(connection, 1))[0]
            for place in range(len(self.steps)):
                await connection.execute(self._begin)
                await connection.execute(INSERT, held[2], place + 1)
                await self.write(connection, [held], place, "null")
                await connection.execute("COMMIT;")

    async def _external(self, connection: Any, most: int) -> None:
        actions = [part.action for part in self.saga.parts if hasattr(part, "action")]
        inputs = self.saga.input
        while True:
            batch = await self._take(connection, most)
            orders = [inputs.validate_python({"number": held[2]}) for held in batch]
            for place, action in enumerate(actions):
                for order in orders:
                    await action(order)
                for first in range(0, len(batch), MOST):
                    await self.write(connection, batch[first : first + MOST], place, '"receipt 1000-1"')

    async def _take(self, connection: Any, most: int) -> list[Held]:
        """Claimed sagas, claimed as many at a time as there are to be at once."""
        async with self._claiming:
            while not self._ready:
                rows = await connection.fetch(SQL["claim"], self.owner, [self.saga.type_id], [self.at_once], LEASE)
                self._ready = [(row[0], row[5], int(row[11][10:-1])) for row in rows]  # {"number":…}
                if not rows:
                    await asyncio.sleep(POLL)
            taken, self._ready = self._ready[:most], self._ready[most:]
            return taken

    async def _same(self, connection: Any, held: Sequence[Held], place: int, result: str) -> None:
        """What the library sends: one saga by scalars, several by lists."""
        last, count = place == len(self.steps) - 1, len(held)
        saga = [
            place, "completed" if last else None, not last, None, 0, None, result if last else None, False, None,
            None, None,
        ]  # fmt: skip
        rows = [
            [self.steps[place], "done", 1, None, 0.001, result, None, None, None, None],
            *[["", "ended", 0, None, None, None, None, None, None, None]] * last,
        ]
        if count == 1:
            saga_id, epoch, _ = held[0]
            follows = (None, "ended" if last else None)
            sql, args = "record_one", [saga_id, epoch, *saga, self.owner, *rows[0], *follows]
        else:
            columns = [[each[0] for each in held], [each[1] for each in held], *([value] * count for value in saga)]
            columns.insert(3, [1 + last] * count)
            many = len(rows)
            entries = [
                [ordinal for ordinal in range(1, count + 1) for _ in rows], list(range(1, many + 1)) * count,
                *(list(column) * count for column in zip(*rows, strict=True)),
            ]  # fmt: skip
            sql, args = "record", [*columns, self.owner, *entries]
        seen = await connection.fetch(SQL[sql], *args)
        assert len(seen) == count

    async def _least(self, connection: Any, held: Sequence[Held], place: int, result: str) -> None:
        ids, epochs = [each[0] for each in held], list({each[1] for each in held})
        await connection.execute(self._least_sql[place], ids, epochs, self.owner)


def _least(step: str, *, last: bool) -> str:
    done = _DONE.format(step=step, result='"receipt 1000-1"')
    ended = "status = 'completed', owner = NULL, wake_at = NULL, ended_at = now(), result = '\"receipt\"'"
    return _LEAST.format(
        change=f"length = s.length + 2, {ended}" if last else "length = s.length + 1",
        behind="(e.what = 'done')::integer" if last else "0",
        entries=f"(VALUES {done}, {_ENDED}) {_COLUMNS}" if last else f"(VALUES {done}) {_COLUMNS}",
    )


async def _run(dsn: str, name: str, way: str, at_once: int) -> None:
    connections = [await asyncpg.connect(dsn) for _ in range(min(at_once, CONNECTIONS))]
    with calm_collector():
        print("ready", flush=True)
        await Floor(SAGAS[name], way, at_once, connections).run()


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dsn")
    parser.add_argument("name", choices=(TRANSACTIONAL.name, EXTERNAL.name))
    parser.add_argument("way", choices=("same", "least"))
    parser.add_argument("at_once", type=int)
    given = parser.parse_args()
    asyncio.run(_run(given.dsn, given.name, given.way, given.at_once))


if __name__ == "__main__":
    main()
