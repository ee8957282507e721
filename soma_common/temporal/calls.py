"""How a workflow has things done by activities, and what their failures mean."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, FailureError
from temporalio.exceptions import TimeoutError as TimedOut

from soma_common.errors import EventTooLarge
from soma_common.sagas.journal import Journal
from soma_common.sagas.machine import Work
from soma_common.sagas.models import Saga
from soma_common.temporal import names
from soma_common.temporal.messages import Answer, Ask, Report, Start, check_size
from soma_common.temporal.needs import needed, needs_input

# Seconds beyond a step's own timeout, which ends it in the worker, where its outcome is known: it may wait there for a
# connection. That a worker died is noticed by its heartbeats.
_GRACE: Final = 60.0
_SHORT: Final = timedelta(seconds=10)
# Temporal tries again what could not be tried (the database is away, the worker is stopping or does not have the step
# yet), for as long as it takes. What failed, and what nobody knows the outcome of, comes back here.
_AWAY: Final = RetryPolicy(
    initial_interval=timedelta(seconds=0.2), maximum_interval=timedelta(seconds=30),
    non_retryable_error_types=["TemporalTimeout:StartToClose", "TemporalTimeout:Heartbeat"],
)  # fmt: skip
_ALWAYS: Final = RetryPolicy(initial_interval=timedelta(seconds=0.2), maximum_interval=timedelta(seconds=30))


class Calls:
    """The activities of one saga. ``heartbeat``: seconds without a sign of life after which a worker has died."""

    def __init__(self, saga: Saga, start: Start, saga_id: UUID, heartbeat: float) -> None:
        self.saga_id = saga_id
        self._saga, self._start = saga, start
        self._heartbeat = timedelta(seconds=heartbeat)
        self._input = json.dumps(start.input, separators=(",", ":"))

    async def attempt(self, work: Work, number: int, journal: Journal) -> Answer | Report:
        """One attempt of a step. That of a transactional one is always known: where nothing was heard of it, it is
        found out, and can no longer take effect later."""
        part = work.part
        try:
            ask = self._ask(work, journal, number)
        except EventTooLarge as error:
            return Report(error_type="EventTooLarge", error=str(error), final=True)
        timeout = part.undo.timeout_seconds if work.undo else part.timeout_seconds
        name = names.of_step(work.saga, part.name, undo=work.undo)
        try:
            answer: Answer = await workflow.execute_activity(
                name, ask, result_type=Answer, start_to_close_timeout=timedelta(seconds=timeout + _GRACE),
                heartbeat_timeout=self._heartbeat, retry_policy=_AWAY, summary=f"{work.path}, attempt {number}",
            )  # fmt: skip
            return answer
        except ActivityError as error:
            report = report_of(error)
        call = work.saga.undos[part.name] if work.undo else work.saga.calls[part.name]
        if not call.transactional:
            return report
        return await self._settle(ask, report) if report.lost else replace(report, unknown=False)

    async def rule(self, work: Work, journal: Journal) -> Answer | Report:
        """Ask a rule. Its answer stays in the history."""
        try:
            ask = self._ask(work, journal, 1)
        except EventTooLarge as error:
            return Report(error_type="EventTooLarge", error=str(error), final=True)
        return await self._locally(names.of_step(work.saga, work.part.name), ask)

    async def check(self, work: Work, payload: str) -> Answer | Report:
        """Whether a value that came from outside is what the step gives."""
        return await self._locally(names.of_check(self._saga), replace(self._bare(work, 1), payload=payload))

    async def _settle(self, ask: Ask, report: Report) -> Answer | Report:
        answer: Answer = await workflow.execute_activity(
            names.of_settling(self._saga), replace(ask, input=None, results={}), result_type=Answer,
            start_to_close_timeout=_SHORT, heartbeat_timeout=self._heartbeat, retry_policy=_ALWAYS,
            summary=f"was {ask.step} done?",
        )  # fmt: skip
        return replace(report, unknown=False, lost=False) if answer.result is None else answer

    async def _locally(self, name: str, ask: Ask) -> Answer | Report:
        try:
            answer: Answer = await workflow.execute_local_activity(
                name, ask, result_type=Answer, start_to_close_timeout=_SHORT, retry_policy=_ALWAYS
            )
            return answer
        except FailureError as error:
            return report_of(error)

    def _ask(self, work: Work, journal: Journal, number: int) -> Ask:
        """What an activity needs to know: its function's arguments, and no more."""
        part = work.part
        call = work.saga.undos[part.name] if work.undo else work.saga.calls[part.name]
        ask = replace(
            self._bare(work, number),
            input=self._input if needs_input(call, work) else None,
            results=needed(call, work, journal),
        )
        check_size(f"What {work.path} is called with", ask.input, *ask.results.values())
        return ask

    def _bare(self, work: Work, number: int) -> Ask:
        start = self._start
        return Ask(
            saga=self._saga.name, version=self._saga.version, step=work.path, attempt=number, undo=work.undo,
            saga_id=str(self.saga_id), tenant_id=start.tenant_id,
            correlation_id=start.correlation_id or str(self.saga_id),
            traceparent=start.traceparent, tracestate=start.tracestate,
        )  # fmt: skip


def report_of(error: FailureError) -> Report:
    """What the failure of an activity says (of a local one, Temporal gives the cause itself). What is no report of ours
    says that nobody knows."""
    cause: Any = error.cause if isinstance(error, ActivityError) else error
    if isinstance(cause, ApplicationError) and cause.details and isinstance(cause.details[0], dict):
        return Report(**cause.details[0])
    if isinstance(cause, TimedOut):
        return Report(error_type="TimeoutError", error="Nothing was heard of it in time.", unknown=True, lost=True)
    kind = getattr(cause, "type", None) or type(cause).__name__
    return Report(error_type=kind, error=str(cause), unknown=True, lost=True)
