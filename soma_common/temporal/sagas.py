"""What a process needs to run sagas in Temporal's worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from soma_common.errors import MissingDependency, SagaDefinitionError
from soma_common.events.store import EventStore
from soma_common.postgres.threads import connecting
from soma_common.ranges import check_settings
from soma_common.sagas.models import Saga, check_sagas
from soma_common.temporal import effects

try:
    from soma_common.temporal.activities import Activities
    from soma_common.temporal.workflow import workflow_of
except ImportError as error:
    raise MissingDependency(
        "Sagas on Temporal need temporalio, which is not installed.", cure="pip install 'soma-common[temporal]'."
    ) from error


class TemporalSagas:
    """Sagas for Temporal: hand ``workflows`` and ``activities`` to its worker.

        sagas = TemporalSagas(soma.store, [place_order])
        worker = Worker(client, task_queue="shop", workflows=sagas.workflows, activities=sagas.activities)

    All sagas of a task queue belong into one of these. Several versions of a saga may stand side by side.

    Args:
        store: records what transactional steps publish; their effects are in its database.
        sagas: the definitions.
        heartbeat: seconds without a sign of life after which the worker that has a step is taken for dead.
        django: the alias of Django's database, for steps that are plain functions with a transaction; None: psycopg.

    Raises:
        SagaDefinitionError: two definitions have the same name and version, or one asks other services (``Ask``).
        MissingDependency: a step is a plain function with a transaction, and psycopg or Django is not installed.
    """

    def __init__(
        self, store: EventStore, sagas: Iterable[Saga], *, heartbeat: float = 10.0, django: str | None = None
    ) -> None:
        self.heartbeat = heartbeat
        check_settings(self, heartbeat=(0.1, 3600.0))
        known = check_sagas(sagas)
        for asking in (saga for saga in known if saga.asks):
            raise SagaDefinitionError(
                f"{asking!r} asks other services by events, which Temporal knows nothing of.",
                cure="run it by soma.saga_worker(), or call the service in a step.",
            )
        self._store, self._sagas = store, MappingProxyType({saga.key: saga for saga in known})
        connect = None if django is None else connecting(store.pool.settings, django)
        self._activities = Activities(store, self._sagas, connect)
        self.activities: Sequence[Any] = self._activities.all()
        self.workflows: Sequence[type] = [self._workflow(name) for name in dict.fromkeys(saga.name for saga in known)]

    def _workflow(self, name: str) -> type:
        versions = {saga.version: saga for saga in self._sagas.values() if saga.name == name}
        return workflow_of(MappingProxyType(versions), heartbeat=self.heartbeat)

    async def forget(self, older_than: timedelta) -> int:
        """Remove what is kept of transactional steps from before so long; how many there were.

        A step that Temporal had done twice, more than so long apart, would then take effect twice: choose more than a
        saga lasts.
        """
        return await effects.forget(self._store.pool, older_than)

    async def close(self) -> None:
        """End the threads of plain functions."""
        if self._activities.threads is not None:
            await self._activities.threads.close()
