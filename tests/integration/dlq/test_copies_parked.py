"""Copies of letters that Kafka does not take are parked like other rows, whatever their keys are."""

from __future__ import annotations

import os
from uuid import uuid4

from soma_common.dlq.mirror import Copied, Mirror, MirrorSettings
from soma_common.dlq.models import Known, RawRecord, Status
from soma_common.sql.loader import blocks
from tests.dlq_support import Desk, failure


async def test_a_copy_whose_key_is_longer_than_an_index_entry_can_be_parked(desk: Desk) -> None:
    """A record's key has no limit. A relay that cannot park a row stands still, with all rows behind it."""
    record = RawRecord(topic="t", partition=0, offset=1, key=os.urandom(20_000), value=b"v")
    copied = Copied(
        letter_id=uuid4(), consumer="billing", status=Status.DEAD, record=record, event=Known(), failure=failure(),
        attempts=1,
    )  # fmt: skip
    async with desk.pool.transaction() as tx:
        await Mirror(MirrorSettings()).write(tx, copied)
    ((shard, position),) = await desk.pool.fetch("SELECT shard, position FROM soma.outbox")
    await desk.pool.fetch(blocks("outbox")["park"], "relay:r", [shard], [position], ["no such topic"])
    assert [row[0] for row in await desk.pool.fetch("SELECT status FROM soma.dead_letters")] == ["dead"]
