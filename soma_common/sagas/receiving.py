"""Hands the replies of other services to the sagas that wait for them."""

from __future__ import annotations

import logging
from typing import Final

from soma_common.consumer.handlers import HandlerContext
from soma_common.errors import SagaNotFound, ValidationError, WrongSagaState
from soma_common.events.models import RecordedEvent
from soma_common.events.standard import SagaStepCompleted, SagaStepFailed
from soma_common.sagas import asking
from soma_common.sagas.orchestrator import carried_out
from soma_common.sagas.replies import name_of

log = logging.getLogger(__name__)

CONSUMER: Final = "sagas"
"""The consumer of replies: it has a position of its own."""

REPLIES: Final = (SagaStepCompleted, SagaStepFailed)


async def receive(event: RecordedEvent, ctx: HandlerContext) -> None:
    """A handler: leave a reply for its saga, in the consumer's transaction.

    The first reply to a step counts. One to a saga of another service, or to one that has ended, changes nothing.
    """
    payload = event.payload
    if isinstance(payload, SagaStepFailed):
        told = {"error_type": payload.error_type, "error": payload.error}
    else:
        told = {"result": payload.result}
    name = name_of(payload.step)
    question = asking.signal(payload.saga_id, name, told, signal_id=name, who=event.service_id)
    try:
        await carried_out(question, ctx.tx)
    except SagaNotFound:
        log.debug("A reply is for a saga of another service: %s", payload.saga_id)
    except (WrongSagaState, ValidationError) as error:
        log.info("A reply to %s came too late or cannot be kept: %s", payload.step, error)
