"""The whole shop in a process of its own, which tests kill: python -m tests.integration.sagas.shop_process."""

from __future__ import annotations

import asyncio
import os

from soma_common.app import Soma
from tests.integration.sagas.shop import AT_ONCE, MODELS, standalone, whole


async def _main() -> None:
    soma = Soma(standalone(os.environ["SHOP_DSN"]), models=MODELS, choreographies=[whole()], settings=AT_ONCE)
    asyncio.get_running_loop().call_soon(lambda: print("ready", flush=True))
    await soma.run()


if __name__ == "__main__":
    asyncio.run(_main())
