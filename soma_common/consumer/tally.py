"""What a consumer counts."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(slots=True)
class Tally:
    """What became of events since the consumer started.

    Args:
        applied: by handlers.
        skipped: for want of a handler.
        repeated: known already.
        blocked: written behind a dead letter of their sequence.
        retried: failures after which an event was tried again in its lane.
        parked: events that became letters with automatic tries; ``dead``: without.
        refused: of them, those whose type no handler takes.
        redriven: letters that were applied after all.
        published: new events recorded by handlers.
        transactions: batches, failed ones included.
        conflicts: batches that met another transaction.
        timeouts: handlers that took too long.
        stalls: how often the worker hung up and began anew, because nothing answered.
        alerts: calls of ``on_dead_letter`` that ended well; ``alerts_lost``: that did not.
    """

    applied: int = 0
    skipped: int = 0
    repeated: int = 0
    blocked: int = 0
    retried: int = 0
    parked: int = 0
    dead: int = 0
    refused: int = 0
    redriven: int = 0
    published: int = 0
    transactions: int = 0
    conflicts: int = 0
    timeouts: int = 0
    stalls: int = 0
    alerts: int = 0
    alerts_lost: int = 0

    @property
    def settled(self) -> int:
        """Events for which nothing is left to do."""
        return self.applied + self.skipped + self.repeated + self.blocked + self.parked + self.dead

    @property
    def activity(self) -> int:
        """Rises with everything that is done, also when it fails."""
        return self.settled + self.redriven + self.retried + self.transactions

    def copy(self) -> Tally:
        """As it stands now."""
        return replace(self)
