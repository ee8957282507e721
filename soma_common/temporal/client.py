"""Starts sagas on Temporal, waits for them, and asks things of them. Needs neither a database nor a worker."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final
from urllib.parse import quote

from soma_common.errors import MissingDependency, SagaCompensated, SagaKeyReused, SagaStuck, WrongSagaState
from soma_common.sagas.models import Saga
from soma_common.sagas.starting import begin
from soma_common.tracing.tracer import TransactionTracer

try:
    from temporalio.client import (
        Client,
        WorkflowFailureError,
        WorkflowHandle,
        WorkflowUpdateFailedError,
    )
    from temporalio.common import WorkflowIDReusePolicy
    from temporalio.exceptions import ApplicationError, CancelledError, WorkflowAlreadyStartedError
except ImportError as error:
    raise MissingDependency(
        "Sagas on Temporal need temporalio, which is not installed.", cure="pip install 'soma-common[temporal]'."
    ) from error

from soma_common.temporal.messages import Start, Verb, check_size

_MEMO: Final = "soma_input"  # the digest of what it was started with


async def start(
    client: Client,
    saga: Saga,
    given: Any,
    *,
    task_queue: str,
    tenant_id: str,
    saga_key: str | None = None,
    correlation_id: str | None = None,
    **options: Any,
) -> WorkflowHandle[Any, Any]:
    """Start a saga; the handle of its workflow.

    With a ``saga_key``, a second start gives the first one's handle, for as long as Temporal remembers it.

    Args:
        given: what the saga is started with, of its input's type.
        options: further arguments of ``client.start_workflow``.

    Raises:
        ValidationError: a name that cannot be, or the input is not of the saga's type, or too large.
        SagaKeyReused: the key was used with another input.
    """
    begun = begin(
        saga, given, tenant_id=tenant_id, saga_key=saga_key, correlation_id=correlation_id,
        trace=TransactionTracer().current(),
    )  # fmt: skip
    text = begun.input.decode()
    check_size(f"The input of {saga.name}", text)
    message = Start(
        input=json.loads(text), version=saga.version, fingerprint=saga.fingerprint, saga_id=str(begun.saga_id),
        tenant_id=tenant_id, correlation_id=begun.correlation_id,
        traceparent=begun.trace.traceparent, tracestate=begun.trace.tracestate,
    )  # fmt: skip
    digest = hashlib.sha256(begun.input).hexdigest()
    workflow_id = _workflow_id(saga, tenant_id, saga_key or str(begun.saga_id))
    try:
        return await client.start_workflow(
            saga.name, message, id=workflow_id, task_queue=task_queue, memo={_MEMO: digest},
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE, **options,
        )  # fmt: skip
    except WorkflowAlreadyStartedError as error:
        handle = client.get_workflow_handle(workflow_id, run_id=error.run_id)
        memo = await (await handle.describe()).memo()
        if memo.get(_MEMO) != digest:
            raise SagaKeyReused(
                f"Saga {saga.name} was started with key {saga_key!r:.100} for another input.", cure="use another key."
            ) from error
        return handle


async def result(handle: WorkflowHandle[Any, Any], saga: Saga) -> Any:
    """What a saga gave, as a value of its last step's type; waits for it.

    Raises:
        SagaCompensated: it failed or was cancelled, and what it had done is undone.
        SagaStuck: its workflow ended otherwise; somebody terminated it.
    """
    try:
        value = await handle.result()
    except WorkflowFailureError as error:
        cause = error.cause
        if isinstance(cause, ApplicationError) and cause.type == SagaCompensated.__name__:
            raise SagaCompensated(cause.message) from error
        if isinstance(cause, CancelledError):
            raise SagaCompensated("The workflow was cancelled; what it had done is undone.") from error
        raise SagaStuck(
            f"The workflow ended, and what it had done is not undone: {cause or error}.", cure="look into its history."
        ) from error
    if saga.returns is None:
        return None
    return saga.results[saga.returns].validate_json(json.dumps(value))


async def journal(handle: WorkflowHandle[Any, Any]) -> dict[str, Any]:
    """Where a saga stands: ``saga_id``, ``version``, ``status``, ``stuck`` (the step) and its ``entries``."""
    found: dict[str, Any] = await handle.query("journal")
    return found


async def retry(handle: WorkflowHandle[Any, Any], *, who: str, why: str, step: str = "") -> None:
    """Try the step again, or its compensation, at which a saga is stuck.

    Raises:
        WrongSagaState: it is not stuck there.
    """
    await _say(handle, "retry", Verb(who=who, why=why, step=step))


async def skip(handle: WorkflowHandle[Any, Any], *, who: str, why: str, step: str = "") -> None:
    """Go on without the step at which a saga is stuck; going back: leave its effect as it is.

    Raises:
        WrongSagaState: it is not stuck there.
    """
    await _say(handle, "skip", Verb(who=who, why=why, step=step))


async def resolve(
    handle: WorkflowHandle[Any, Any], *, happened: bool, who: str, why: str, result: Any = None, step: str = ""
) -> None:
    """Say whether the step happened at which a saga is stuck, and what it gave, as JSON has it.

    Going back, ``happened`` says that the step is undone.

    Raises:
        WrongSagaState: it is not stuck there, or the result is not of the step's type.
    """
    await _say(handle, "resolve", Verb(who=who, why=why, step=step, happened=happened, result=result))


async def compensate(handle: WorkflowHandle[Any, Any], *, who: str, why: str) -> None:
    """Turn a saga around: undo what it did.

    Raises:
        WrongSagaState: it goes back already, or is behind its pivot.
    """
    await _say(handle, "compensate", Verb(who=who, why=why))


async def _say(handle: WorkflowHandle[Any, Any], update: str, verb: Verb) -> None:
    try:
        await handle.execute_update(update, verb)
    except WorkflowUpdateFailedError as error:
        cause = error.cause
        raise WrongSagaState(cause.message if isinstance(cause, ApplicationError) else str(cause)) from error


def _workflow_id(saga: Saga, tenant_id: str, key: str) -> str:
    """Different parts give different ids."""
    return "/".join(quote(part, safe="") for part in (saga.name, tenant_id, key))
