"""A saga worker's figures for probes, Prometheus and OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from soma_common.health import Health, Metric
from soma_common.sagas.tally import STEPS, TURNS, SagaTally
from soma_common.sagas.worker import SagaWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaStats:
    """How a worker stands: what it counted, how many sagas it drives by name, its oldest attempt in seconds."""

    sagas: Sequence[str]
    tally: SagaTally
    driven: dict[str, int]
    oldest: float
    away: bool


def saga_stats(worker: SagaWorker) -> SagaStats:
    """Now."""
    driven = worker.driven()
    names = sorted({saga.name for saga in worker.sagas})
    return SagaStats(
        sagas=names, tally=worker.tally, driven={name: driven.get(name, 0) for name in names},
        oldest=worker.oldest(), away=worker.away,
    )  # fmt: skip


def saga_health(workers: Sequence[SagaStats]) -> Health:
    """Live always: a worker goes on by itself when the database is back; ready while none waits for it."""
    away = any(stats.away for stats in workers)
    details = {"driven": sum(sum(stats.driven.values()) for stats in workers), "away": away}
    return Health(True, {"sagas": details}, not away)


def saga_metrics(workers: Iterable[SagaStats]) -> Iterator[Metric]:
    """By the names of sagas; workers of one process are added up."""
    every = list(workers)
    names = sorted({name for stats in every for name in stats.sagas})
    for name in names:
        for what in STEPS:
            count = sum(stats.tally.steps[name, what] for stats in every)
            yield Metric(
                "soma_saga_steps_total", "counter", _STEPS, float(count), {"saga": name, "outcome": what.value}
            )
    for name in names:
        seconds = float(sum(stats.tally.seconds[name] for stats in every))
        yield Metric("soma_saga_step_seconds_total", "counter", "Seconds that attempts took.", seconds, {"saga": name})
    for name in names:
        for what in TURNS:
            count = sum(stats.tally.turns[name, what] for stats in every)
            yield Metric(
                "soma_saga_turns_total", "counter", _TURNS, float(count), {"saga": name, "outcome": what.value}
            )
    for name in names:
        driven = sum(stats.driven.get(name, 0) for stats in every)
        yield Metric("soma_saga_driven", "gauge", "Sagas that this process drives now.", float(driven), {"saga": name})
    if every:
        oldest = max(stats.oldest for stats in every)
        yield Metric(
            "soma_saga_oldest_attempt_seconds", "gauge", "How long the oldest attempt has been at work.", oldest
        )


_STEPS = "Attempts at steps and compensations, by what they came to."
_TURNS = "Sagas that turned, got stuck or ended."
