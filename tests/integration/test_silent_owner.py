"""A process that is paused inside a transaction on its shards must not keep them for ever."""

from __future__ import annotations

import asyncio

from soma_common.errors import SomaError
from soma_common.postgres.cursor import BEGINNING
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards
from tests.core_support import until


async def test_shards_locked_by_a_silent_owner_are_taken_over(soma_database: str) -> None:
    async with Pool(soma_database) as theirs, Pool(soma_database) as ours:
        silent = Shards(theirs, "relay:x", "silent", lease=0.5)
        await silent.register(2)
        await silent.share()
        ended: list[BaseException] = []

        async def fall_silent() -> None:
            try:
                async with theirs.transaction(synchronous=True) as tx:
                    await silent.save(dict.fromkeys(silent.owned, BEGINNING), tx)
                    locked.set()
                    await asyncio.Event().wait()  # as if stopped: nothing more is sent
            except (SomaError, asyncio.CancelledError) as error:
                ended.append(error)

        locked = asyncio.Event()
        paused = asyncio.create_task(fall_silent())
        await locked.wait()
        heir = Shards(ours, "relay:x", "heir", lease=5.0)

        async def owns_all() -> bool:
            await heir.register(2)  # a new worker registers first: that must not wait for ever either
            await heir.share()
            return len(heir.owned) == 2

        await until(owns_all, within=30)
        paused.cancel()
        await asyncio.wait({paused})
        assert ended
