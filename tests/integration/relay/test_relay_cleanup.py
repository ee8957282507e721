"""The outbox is emptied by whole partitions, and a row that commits late is never erased with them."""

from __future__ import annotations

from tests.integration.relay.lab import QUICK, World, check, make
from tests.waiting import until

RING = 1 << 17


async def test_partitions_are_emptied_behind_the_relay(lab: World) -> None:
    async with lab.relay(settings=QUICK):
        for ring in range(4):
            await _jump(lab, ring * RING)
            await lab.write(40)
            await lab.arrived()
        await _jump(lab, 4 * RING)
        async with lab.writing():  # ticks move only while something happens
            await until(lambda: _filled(lab, {4}), what="the partitions behind are emptied")
        assert check(lab.journal, await lab.arrived()) == 0
    dead = await lab.pool.fetch(
        "SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_user_tables WHERE relname ~ '^outbox_[0-7]$'"
    )
    assert dead[0][0] == 0


async def test_a_late_committer_at_a_low_position_is_not_erased(lab: World) -> None:
    async with lab.relay(settings=QUICK):
        await lab.write(20)
        async with lab.running("slow", commit=True):
            for ring in (1, 2, 3):
                await _jump(lab, ring * RING)
                await lab.write(20)
            await lab.passed()
            await lab.pool.fetch("SELECT soma.clean_outbox()")
            # Its snapshot's xmin holds every partition back: nothing that was left after it began may go.
            assert await _filled(lab, {0, 1, 2, 3})
        async with lab.writing():
            await until(lambda: _filled(lab, {3}), what="the rest is emptied once it was relayed")
        assert check(lab.journal, await lab.arrived()) == 0


async def test_nothing_is_erased_while_the_relay_is_down(lab: World) -> None:
    async with lab.relay(settings=QUICK):
        await lab.write(20)
        await lab.arrived()
    for ring in range(1, 4):
        await _jump(lab, ring * RING)
        await lab.write(20)
        await lab.pool.fetch("SELECT soma.clean_outbox()")
    assert await _filled(lab, {0, 1, 2, 3})
    async with lab.relay(settings=QUICK):
        assert check(lab.journal, await lab.arrived()) == 0


async def test_two_relays_are_both_waited_for(lab: World) -> None:
    other = lab.relay(name=f"{lab.name}.other")
    await other.start()
    await lab.write(20)
    await until(lambda: _all_relayed(other, 20), what="the other relay has relayed all")
    await other.stop()
    async with lab.relay(settings=QUICK):
        for ring in range(1, 4):
            await _jump(lab, ring * RING)
            await lab.write(20)
        await lab.passed()
        await lab.pool.fetch("SELECT soma.clean_outbox()")
        assert await _filled(lab, {1, 2, 3}) or await _filled(lab, {0, 1, 2, 3})


async def _all_relayed(relay: object, count: int) -> bool:
    return bool(relay.stats().relayed == count)  # type: ignore[attr-defined]


async def _jump(lab: World, position: int) -> None:
    """As if positions up to there had been used."""
    await lab.pool.fetch("SELECT setval('soma.event_position', greatest($1::bigint, 1), true)", position)
    lab.journal.committed += await lab.store.publish([make("jump", 0)])


async def _filled(lab: World, slots: set[int]) -> bool:
    found = {n for n in range(8) if (await lab.pool.fetch(f"SELECT EXISTS (SELECT FROM soma.outbox_{n})"))[0][0]}
    return found == slots
