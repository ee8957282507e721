from soma_common.postgres.pool import Pool
from soma_common.sagas.store import *
from soma_common.sagas.journal import *
from soma_common.sagas.models import Saga
from soma_common.sagas import store as st

async def a(order: int) -> int: return order
async def b(x: int, order: int=0) -> str: return "b"

async def test_it(soma_database):
    async with Pool(soma_database) as pool:
        s = Saga("s", int, a)
        store = SagaStore(pool)
        type_id, _ = await store.register(s)
        assert await store.register(s) == (type_id, s.fingerprint)
        starts = [Start(saga=s, type_id=type_id, input=b"1", tenant_id="t", correlation_id="c", trace=TraceContext.new(), saga_key=k) for k in ("a", "b", None)]
        async with pool.connection() as c:
            assert len(await st.start(c, starts)) == 3
            assert len(await st.start(c, starts[:2])) == 0
        got = await store.claim({type_id: 2}, lease=5, patience=3)
        assert len(got) == 2
        print(got[0])
        seen = await store.record([Record(saga=g, entries=[Entry(what=What.DONE, step="a", attempt=1, result=b"1"), Entry(what=What.ENDED)], status=SagaStatus.COMPLETED, kept=False, result=b"1") for g in got])
        assert len(seen) == 2
        assert await store.record([Record(saga=got[0])]) == {}
        js = await store.journals([g.saga_id for g in got])
        assert len(js[got[0].saga_id]) == 2
        got = await store.claim({type_id: 2}, lease=5, patience=3)
        assert len(got) == 1
        again = await store.take_again(got[0], lease=5)
        assert again.epoch == 2
        assert await store.hold(got, lease=5) == {}
        assert len(await store.hold([again], lease=-5)) == 1
        over = await store.take_over([type_id], 10, lease=5, patience=3)
        assert over[0].epoch == 3
