"""Every error the library raises, in one tree.

Catch ``SomaError`` for all of them. The docstring of a class is its default message; ``cure`` says what to do.

    SomaError
    ├── ConfigurationError          a setting is missing, unknown or contradictory
    │   ├── MissingDependency       an optional extra is not installed
    │   └── SagaDefinitionError     a saga cannot run as it is defined
    ├── ValidationError             an event, key or query the library refuses
    │   ├── PayloadInvalid          the payload does not match its model, or is not JSON
    │   ├── EventTooLarge           payload, metadata or key above its limit
    │   ├── TenantRequired          a query without an explicit tenant
    │   └── UnhandledType           no handler takes this event type, and the consumer refuses such events
    ├── AppendError                 the append wrote nothing
    │   ├── WrongExpectedVersion    the stream is not at the version the caller expected
    │   ├── ClockAhead              the client's clock is too far ahead of the database's
    │   ├── IdempotencyKeyReused    one key for two different events
    │   ├── TransactionConflict     serialization failure or deadlock: retry the whole transaction
    │   └── CommitUnknown           the connection was lost at COMMIT and the outcome cannot be told
    ├── TransactionError            a transaction cannot be opened, used or committed as asked
    │   ├── TransactionDoomed       its COMMIT is refused: something in it failed, and the error was swallowed
    │   ├── TransactionElsewhere    it is used by another task or thread than the one that opened it
    │   └── TransactionEnded        it is used after its block
    ├── LogError                    the event log and its readers disagree
    │   ├── ClusterChanged          the database was restored or copied into another cluster
    │   ├── CursorLost              a cursor points at a tick this database does not have
    │   ├── EventsArchived          events that a reader wants were removed from the log
    │   ├── LogRewound              stored transaction ids are ahead of the cluster's
    │   ├── OffsetLost              the topic no longer has the offset where a consumer stands
    │   └── WrongIsolation          a diff was asked for outside READ COMMITTED
    ├── ServiceEnded                a service's loop ended although nobody asked it to
    ├── LeaseLost                   another worker owns the shard now
    │   └── DatabaseSetBack         the database was set back to an earlier moment
    ├── CodecError                  bytes that cannot be encoded or decoded
    │   ├── SchemaNotFound          no such schema id or subject
    │   │   └── UnknownSchemaId     not fetched yet: ensure() it, then decode again
    │   └── IncompatibleSchema      the registry refused a schema change
    ├── MigrationError              the schema cannot be upgraded
    ├── HandlerFailed               events failed; they are dead letters, or stop a replay
    ├── HandlerTimeout              a handler worked on an event for too long
    ├── PoisonEvent                 the process ended, again and again, while it worked on this event
    ├── DeadLetterError             a dead letter cannot be handled as asked
    │   ├── DeadLetterRefused       an event failed, and its letter could not be written
    │   ├── RedriveStopped          a re-drive stopped by itself: the cause is not mended
    │   ├── LetterNotFound          there is no such letter
    │   └── LetterChanged           it was settled, discarded or edited by somebody else
    ├── ReplayRefused               a replay cannot be done as it was asked for
    ├── SagaError                   a saga cannot be started or changed as asked, or ended otherwise
    │   ├── SagaNotFound            there is no such saga
    │   ├── WrongSagaState          it is not where this can be done to it
    │   ├── SagaKeyReused           one saga_key for two different inputs
    │   ├── SagaCompensated         it failed, and what it had done is undone
    │   ├── SagaStuck               it can go neither on nor back; a person must look
    │   ├── StepRefused             raise it in a step: it fails, and is not tried again
    │   └── OutcomeUnknown          raise it in a step: nobody knows whether it took effect
    ├── RetentionError              retention cannot be done as it was asked for
    │   ├── ArchiveCorrupt          an archive is not what its manifest or the database says
    │   └── ArchiveUnavailable      the folder or bucket of archives cannot be read or written
    └── InfrastructureError         something outside is away: retried, never blamed on an event
        ├── Stalled                 work waits, and what it waits for does not answer
        ├── DatabaseUnavailable
        ├── BrokerUnavailable
        ├── RegistryUnavailable
        ├── ServerUnavailable       a server the lane was asked for cannot be started
        └── EmbeddedPostgresError   the embedded database cannot be opened
"""

from __future__ import annotations

import logging

# The library writes no log by itself, unless the application wants one. Here, since whatever may log imports this.
logging.getLogger("soma_common").addHandler(logging.NullHandler())


class SomaError(Exception):
    """Something went wrong in soma-common."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        self.cure = cure
        super().__init__(self.message if cure is None else f"{self.message} Cure: {cure}")


class ConfigurationError(SomaError):
    """A setting is missing, unknown or contradictory."""


class MissingDependency(ConfigurationError):
    """An optional part of soma-common is not installed."""


class SagaDefinitionError(ConfigurationError):
    """A saga cannot run as it is defined."""


class ValidationError(SomaError):
    """The library refuses this value."""


class PayloadInvalid(ValidationError):
    """The payload does not match its model, or cannot be written as JSON."""


class EventTooLarge(ValidationError):
    """A part of the event is above its size limit."""


class TenantRequired(ValidationError):
    """A query must name its tenant."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        super().__init__(message, cure=cure or "pass tenant_id=..., or tenant_id=ALL_TENANTS to see every tenant.")


class AppendError(SomaError):
    """The append wrote nothing."""


class WrongExpectedVersion(AppendError):
    """The stream is not at the expected version."""

    def __init__(self, stream: str, expected: str, actual: int) -> None:
        self.stream, self.expected, self.actual = stream, expected, actual
        super().__init__(
            f"Stream {stream} was expected at {expected} and is at version {actual}.",
            cure="read the stream again, decide again, and publish with the new version.",
        )


class ClockAhead(AppendError):
    """The clock of this machine is too far ahead of the database's."""


class IdempotencyKeyReused(AppendError):
    """An idempotency key was used before for a different event."""


class TransactionConflict(AppendError):
    """The transaction met a concurrent one (serialization failure or deadlock)."""


class CommitUnknown(AppendError):
    """The connection was lost at COMMIT and the outcome could not be found out."""


class TransactionError(SomaError):
    """A transaction cannot be opened, used or committed as asked."""


class TransactionDoomed(TransactionError):
    """The COMMIT of this transaction is refused: a part of it failed, and nobody let the error pass."""


class TransactionElsewhere(TransactionError):
    """A transaction belongs to the task or thread that opened it."""


class TransactionEnded(TransactionError):
    """The transaction has ended."""


class LogError(SomaError):
    """The event log and one of its readers disagree."""


class ClusterChanged(LogError):
    """This database was restored or copied into another PostgreSQL cluster."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        super().__init__(message, cure=cure or "run `somastack db repair` once, then go on.")


class CursorLost(LogError):
    """A reader's cursor names a tick that this database does not have."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        super().__init__(
            message, cure=cure or "go on from a tick of before the failover or restore: docs/how-to/restore.md."
        )


class EventsArchived(LogError):
    """Events that this reader wants are no longer in the log."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        super().__init__(
            message,
            cure=cure
            or "say `somastack retention accept READER`; a consumer gets what it missed by `somastack events replay "
            "--archive PLACE` when it has passed the rest: docs/how-to/retention.md.",
        )


class LogRewound(LogError):
    """Stored transaction ids are ahead of this cluster's: it was restored to an earlier moment."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        super().__init__(message, cure=cure or "run `somastack db repair` once, then go on.")


class OffsetLost(LogError):
    """The topic no longer has the offset where this consumer stands."""

    def __init__(self, message: str | None = None, *, cure: str | None = None) -> None:
        super().__init__(
            message,
            cure=cure
            or "find out which events are lost, then set next_offset of the partition in "
            "soma.consumer_offsets and restart the consumer.",
        )


class WrongIsolation(LogError):
    """Readers of the log work in READ COMMITTED only."""


class ServiceEnded(SomaError):
    """A service's loop ended although nobody asked it to."""


class LeaseLost(SomaError):
    """Another worker owns this shard now."""


class DatabaseSetBack(LeaseLost):
    """The database was set back to an earlier moment, by a restore or a lagging standby."""


class CodecError(SomaError):
    """These bytes cannot be encoded or decoded."""


class SchemaNotFound(CodecError):
    """The schema registry knows no such schema."""


class UnknownSchemaId(SchemaNotFound):
    """This schema id is not known yet; ``kind`` is "content" or "global", ``id`` is None for the generic schema."""

    def __init__(self, kind: str, number: int | None) -> None:
        self.kind, self.id = kind, number
        if number is None:
            super().__init__("The generic event schema has no id.", cure="await registry.resolve(schemas) at start.")
        else:
            super().__init__(f"The schema with {kind}Id {number} is not known here.", cure="await codec.ensure(value).")


class IncompatibleSchema(CodecError):
    """The schema registry refused an incompatible change; ``fields`` are the paths that break it."""

    def __init__(self, message: str | None = None, *, fields: tuple[str, ...] = (), cure: str | None = None) -> None:
        self.fields = fields
        super().__init__(message, cure=cure)


class MigrationError(SomaError):
    """The database schema cannot be upgraded."""


class HandlerFailed(SomaError):
    """Events failed in a handler."""


class UnhandledType(ValidationError):
    """No handler takes this event type, and the consumer refuses such events."""


class HandlerTimeout(SomaError):
    """A handler worked on an event for too long."""


class PoisonEvent(SomaError):
    """The process ended, again and again, while it worked on this event."""


class DeadLetterError(SomaError):
    """A dead letter cannot be handled as asked."""


class DeadLetterRefused(DeadLetterError):
    """An event failed, and its letter could not be written: it stays where it is."""


class RedriveStopped(DeadLetterError):
    """A re-drive of many letters stopped by itself."""


class LetterNotFound(DeadLetterError):
    """There is no such dead letter."""


class LetterChanged(DeadLetterError):
    """The dead letter was settled, discarded or edited by somebody else."""


class ReplayRefused(SomaError):
    """This replay cannot be done as it was asked for."""


class SagaError(SomaError):
    """A saga cannot be handled as asked."""


class SagaNotFound(SagaError):
    """There is no such saga."""


class WrongSagaState(SagaError):
    """The saga is not in a state in which this can be done to it."""


class SagaKeyReused(SagaError):
    """A saga_key was used before for another input."""


class SagaCompensated(SagaError):
    """The saga failed, and what it had done is undone."""


class SagaStuck(SagaError):
    """The saga can go neither on nor back: a person must look at it."""


class StepRefused(SagaError):
    """The step failed, and would fail again."""


class OutcomeUnknown(SagaError):
    """Nobody knows whether the step took effect."""


class RetentionError(SomaError):
    """Retention cannot be done as it was asked for."""


class ArchiveCorrupt(RetentionError):
    """An archive is not what its manifest or the database says."""


class ArchiveUnavailable(RetentionError):
    """The folder or bucket of archives cannot be read or written."""


class InfrastructureError(SomaError):
    """Something outside the library is away."""


class Stalled(InfrastructureError):
    """Work waits, and what it waits for does not answer."""


class DatabaseUnavailable(InfrastructureError):
    """PostgreSQL cannot be reached."""


class BrokerUnavailable(InfrastructureError):
    """Kafka cannot be reached."""


class RegistryUnavailable(InfrastructureError):
    """The schema registry cannot be reached."""


class ServerUnavailable(InfrastructureError):
    """A server that was asked for cannot be started."""


class EmbeddedPostgresError(InfrastructureError):
    """The embedded PostgreSQL cannot be opened."""
