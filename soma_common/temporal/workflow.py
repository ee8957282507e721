"""The workflow: one class for each saga, all alike.

It does without Temporal's sandbox, which guards against authors' code in workflows: there is none here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import NAMESPACE_OID, UUID, uuid5

from temporalio import workflow
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from soma_common.errors import SagaDefinitionError, SagaError
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.models import Saga
from soma_common.temporal import verbs
from soma_common.temporal.calls import Calls
from soma_common.temporal.driving import Drive
from soma_common.temporal.messages import Report, Start, Verb, plain
from soma_common.temporal.needs import work_at


class SagaWorkflow:
    """A saga as a workflow. Subclasses name the saga."""

    versions: ClassVar[Mapping[int, Saga]]
    heartbeat: ClassVar[float]

    @workflow.init
    def __init__(self, start: Start) -> None:
        self._wrong: SagaDefinitionError | None = None
        try:
            saga = definition_of(self.versions, start)
        except SagaDefinitionError as error:  # raised when it runs: Temporal expects no error here
            self._wrong = error
            return
        self._calls = Calls(saga, start, _saga_id(start), self.heartbeat)
        self._driven = Drive(saga, start, self._calls)

    @property
    def _drive(self) -> Drive:
        if self._wrong is not None:
            raise self._wrong
        return self._driven

    async def drive(self) -> Any:
        """The saga, to its end."""
        return await self._drive.run()

    @workflow.signal(dynamic=True)
    def on_signal(self, name: str, args: Sequence[RawValue]) -> None:
        """What a Signal of the saga waits for. One that cannot be read is dropped: it must not stop the saga."""
        drive = self._drive
        try:
            value = workflow.payload_converter().from_payload(args[0].payload) if args else None
            payload = json.dumps(value)
        except Exception as error:  # whatever somebody else's bytes cause
            workflow.logger.warning("A signal %s is dropped: %s", name, error)
            return
        drive.signal(name, payload)

    @workflow.query
    def journal(self) -> dict[str, Any]:
        """Where it stands: ``status``, ``stuck`` (the step), ``entries``."""
        drive = self._drive
        return {
            "saga_id": str(self._calls.saga_id), "version": drive.saga.version, "status": drive.status.value,
            "stuck": drive.stuck, "entries": [plain(entry) for entry in drive.entries],
        }  # fmt: skip

    @workflow.update
    def retry(self, verb: Verb) -> None:
        """Try the step again, or its compensation, at which the saga is stuck."""
        self._decide(verbs.RETRY, verb)

    @retry.validator
    def check_retry(self, verb: Verb) -> None:
        """Refuse it where it does not fit."""
        self._stuck_at(verbs.RETRY, verb)

    @workflow.update
    def skip(self, verb: Verb) -> None:
        """Go on without the step, or leave it as it is when going back."""
        self._decide(verbs.SKIP, verb)

    @skip.validator
    def check_skip(self, verb: Verb) -> None:
        """Refuse it where it does not fit."""
        self._stuck_at(verbs.SKIP, verb)

    @workflow.update
    async def resolve(self, verb: Verb) -> None:
        """Say whether the step happened, and what it gave; or, going back, that it is undone."""
        drive, result = self._drive, None
        if verb.happened and not drive.journal.turned:
            work = work_at(drive.saga, self._stuck_at(verbs.RESOLVE, verb), undo=False)
            answer = await self._calls.check(work, json.dumps(verb.result))
            if isinstance(answer, Report):
                raise ApplicationError(answer.error, type=answer.error_type)
            result = answer.result
        self._decide(verbs.RESOLVE, verb, result)

    @resolve.validator
    def check_resolve(self, verb: Verb) -> None:
        """Refuse it where it does not fit."""
        self._stuck_at(verbs.RESOLVE, verb)

    @workflow.update
    def compensate(self, verb: Verb) -> None:
        """Turn around: undo what was done."""
        self._drive.note(Entry(what=What.COMPENSATE, who=verb.who, why=verb.why))
        self._drive.turn(f"{verb.who}: {verb.why}")

    @compensate.validator
    def check_compensate(self, verb: Verb) -> None:
        """Refuse it where it does not fit."""
        drive = self._drive
        try:
            verbs.check_compensate(verb, drive.journal, drive.stuck, behind_pivot=drive.behind_pivot)
        except SagaError as error:
            raise _refusal(error) from error

    def _stuck_at(self, kind: str, verb: Verb) -> str:
        try:
            drive = self._drive
            return verbs.at_stuck(kind, verb, drive.saga, drive.journal, drive.stuck)
        except SagaError as error:
            raise _refusal(error) from error

    def _decide(self, kind: str, verb: Verb, result: str | None = None) -> None:
        path = self._stuck_at(kind, verb)
        self._drive.unstick(verbs.decided(kind, verb, path, self._drive.journal, result))


def workflow_of(versions: Mapping[int, Saga], *, heartbeat: float) -> type[SagaWorkflow]:
    """The workflow class of a saga, with all versions of it that this worker has."""
    name = next(iter(versions.values())).name

    async def run(self: SagaWorkflow, start: Start) -> Any:
        return await self.drive()

    del run.__annotations__["self"]  # Temporal would take it for an argument
    run.__qualname__ = f"{SagaWorkflow.__name__}.run"  # Temporal wants to see a method of this class
    members = {"run": workflow.run(run), "versions": versions, "heartbeat": heartbeat, "__doc__": f"The saga {name}."}
    made = type(SagaWorkflow.__name__, (SagaWorkflow,), members)
    return workflow.defn(name=name, sandboxed=False)(made)


def definition_of(versions: Mapping[int, Saga], start: Start) -> Saga:
    """The definition a saga was started with.

    Raises:
        SagaDefinitionError: this worker does not have it. The workflow waits until one has.
    """
    version = max(versions) if start.version is None else start.version
    saga = versions.get(version)
    if saga is None:
        known = ", ".join(map(str, versions))
        raise SagaDefinitionError(
            f"This worker has version {known} of the saga, not {version}.", cure="deploy one that has it."
        )
    if start.fingerprint not in (None, saga.fingerprint):
        raise SagaDefinitionError(
            f"{saga!r} has other steps here ({saga.fingerprint}) than where it was started ({start.fingerprint}).",
            cure="deploy the definition it was started with beside the new one, and give the new one a higher version.",
        )
    return saga


def _saga_id(start: Start) -> UUID:
    """That which the starter chose, or one of its own for each execution: a workflow's id may be used again."""
    if start.saga_id is not None:
        return UUID(start.saga_id)
    info = workflow.info()
    return uuid5(NAMESPACE_OID, f"{info.workflow_id}/{info.first_execution_run_id}")


def _refusal(error: SagaError) -> ApplicationError:
    return ApplicationError(str(error), type=type(error).__name__)
