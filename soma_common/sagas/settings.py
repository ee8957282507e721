"""How a worker runs sagas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from soma_common.errors import ConfigurationError
from soma_common.ranges import check_settings


@dataclass(frozen=True, slots=True)
class SagaSettings:
    """How a worker runs sagas.

    Args:
        at_once: sagas that it has at once, those that wait for a second or less included.
        of_type: the same for sagas of these names.
        transactions: transactional steps at once; None: two less than its pool has connections.
        lease: seconds after which a worker that fell silent loses its sagas to others.
        poll: seconds at most between two looks for sagas that are due.
        grace: seconds in which a step that was cancelled must end; then it is left behind.
        patience: claims without progress after which a saga runs alone; after twice as many it is stuck.
    """

    at_once: int = 100
    of_type: Mapping[str, int] = field(default_factory=dict)
    transactions: int | None = None
    lease: float = 10.0
    poll: float = 0.1
    grace: float = 5.0
    patience: int = 3

    def __post_init__(self) -> None:
        check_settings(
            self, at_once=(1, 100_000), of_type=Mapping, lease=(0.5, 600.0), poll=(0.001, 60.0), grace=(0.0, 600.0),
            patience=(1, 1000),
        )  # fmt: skip
        if self.transactions is not None:
            check_settings(self, transactions=(1, 10_000))
        for name, most in self.of_type.items():
            if not isinstance(most, int) or isinstance(most, bool) or most < 1:
                raise ConfigurationError(f"SagaSettings: of_type[{name!r:.80}]={most!r:.80}.", cure="use 1 or more.")
