import asyncio, time
from dataclasses import dataclass
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.store import *
from soma_common.sagas.models import *
from soma_common.sagas import store as st
from soma_common.sagas.worker import SagaWorker
from soma_common.tx import Tx
from soma_common.errors import StepRefused
from soma_common.retry import Backoff

@dataclass
class Order: id:int; fail:bool=False
@dataclass
class Hold: id:int

async def free(order: Order, hold: Hold, tx: Tx) -> None:
    await tx.conn.execute("DELETE FROM hold WHERE id=$1", hold.id)
@with_compensation(free)
async def reserve(order: Order, tx: Tx) -> Hold:
    await tx.conn.execute("INSERT INTO hold VALUES ($1)", order.id)
    return Hold(order.id)
async def pay(order: Order, hold: Hold) -> str:
    if order.fail: raise StepRefused("no money")
    return "paid"
async def ship(order: Order, tx: Tx) -> int:
    await tx.conn.execute("INSERT INTO shipped VALUES ($1)", order.id)
    return order.id
place = Saga("place", Order, reserve, pay, ship)

async def test_it(soma_database):
    async with Pool(PoolSettings(soma_database, size=20)) as pool:
        async with pool.connection() as c:
            await c.execute("create table hold(id int); create table shipped(id int)")
        store = SagaStore(pool)
        type_id, _ = await store.register(place)
        N=1000
        starts = [Start(saga=place, type_id=type_id, input=b'{"id":%d,"fail":%s}' % (n, b"true" if n%5==0 else b"false"), tenant_id="t", correlation_id="c", trace=TraceContext.new()) for n in range(N)]
        async with pool.connection() as c:
            assert len(await st.start(c, starts)) == N
        t=time.time()
        async with SagaWorker(pool, [place], None, at_once=50) as w:
            while True:
                r = await pool.fetch("select status, count(*), min(error) from soma.sagas group by 1")
                if sum(x[1] for x in r if x[0] in ("completed","compensated")) == N: break
                assert time.time()-t < 40, r
                await asyncio.sleep(0.02)
        dt=time.time()-t
        print(r, dt, N/dt, "sagas/s", N*2.7/dt)
        print(await pool.fetch("select count(*) from hold"), await pool.fetch("select count(*) from shipped"))
        rows = await pool.fetch("select saga_id,number,step,what,attempt,result::text,error_type,error,why,took from soma.saga_steps order by 1,2 limit 12")
        for x in rows: print(tuple(x)[1:])
