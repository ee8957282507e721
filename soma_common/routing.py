"""Which topics the events of an application go to, and which its consumers read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from soma_common.config import check_topic
from soma_common.consumer.handlers import check_consumer
from soma_common.errors import ConfigurationError
from soma_common.events.models import Event
from soma_common.events.types import check_event_type
from soma_common.sagas.replies import COMMANDS, EVENTS, is_command

_OF_SAGAS = "saga."  # the event types of what sagas tell begin so
_BETWEEN = (COMMANDS, EVENTS)


class Routes:
    """Topics by event type and by consumer.

    Args:
        usual: where events go that nothing else is said of.
        topics: others by event type.
        reads: the topics of consumers that read others than the application's own.
    """

    def __init__(
        self, usual: str, topics: Mapping[str, str] | None, reads: Mapping[str, Sequence[str]] | None
    ) -> None:  # fmt: skip
        self._usual = usual
        self._topics = {check_event_type(kind): check_topic("topics", to) for kind, to in (topics or {}).items()}
        self._reads = {consumer: _read(consumer, names) for consumer, names in (reads or {}).items()}
        self._hears: dict[str, bool] = {}

    def hears_sagas(self, consumer: str, *, nothing_else: bool = False) -> None:
        """A consumer reads what sagas tell, beside its other topics or alone."""
        self._hears[consumer] = nothing_else

    def of(self, event: Event) -> str:
        """The topic of an event."""
        usual = self._usual
        if is_command(event):
            usual = COMMANDS
        elif event.event_type.startswith(_OF_SAGAS):
            usual = EVENTS
        return self._topics.get(event.event_type, usual)

    @property
    def own(self) -> list[str]:
        """The application's own topics."""
        return sorted({self._usual, *self._topics.values()})

    @property
    def needed(self) -> list[str]:
        """Its own, and those by which sagas and other services talk, where it takes part in that."""
        takes_part = bool(self._hears) or any(topic in _BETWEEN for topics in self._reads.values() for topic in topics)
        return sorted({*self.own, *(_BETWEEN if takes_part else ())})

    def read_by(self, consumer: str) -> list[str]:
        """The topics of a consumer."""
        if consumer not in self._hears:
            return sorted(self._reads.get(consumer, self.own))
        alone = self._hears[consumer] and consumer not in self._reads
        return sorted({EVENTS, *(() if alone else self._reads.get(consumer, self.own))})

    def strangers(self, consumers: Iterable[str]) -> set[str]:
        """Consumers for which topics were named, and which are none of these."""
        return self._reads.keys() - set(consumers)


def _read(consumer: str, topics: Sequence[str]) -> tuple[str, ...]:
    """The topics that a consumer reads; one text would be read as a topic per letter."""
    check_consumer(consumer)
    if isinstance(topics, str) or not topics:
        raise ConfigurationError(
            f"reads names {topics!r:.80} for consumer {consumer}.", cure="name its topics in a list of one at least."
        )
    return tuple(check_topic("reads", topic) for topic in topics)
