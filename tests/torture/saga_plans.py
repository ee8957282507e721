"""What each saga of a torture run is: drawn from the seed and its number, the same for who starts it, who runs it and who
judges it. The rules of what must become of it are here once more, without the library's machine. No I/O."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

TENANT = "bank"
CUSTOMERS = 400
POT, CLEARING, STOCK, RESERVED = 1000, 2000, 3000, 4000  # a hundred accounts each, so that few sagas meet in one
ACCOUNTS = [*range(CUSTOMERS), *(base + n for base in (POT, CLEARING, STOCK, RESERVED) for n in range(100))]
OPENING = 10_000_000  # cents
LARGE = 50_000  # cents from which on a payment is approved
MINE = {"transfer": 40, "order": 22, "careful": 12, "split": 12, "nested": 8, "coins": 6}  # how often each is drawn


@dataclass
class Job:
    """What a saga is started with. ``cents``: how much it moves. ``fates``: how its steps fail, by path; by path with
    ``:undo`` how their compensations do.

    ``flaky:n`` fails n times before its effect, ``late:n`` n times after it, ``lost`` once with an unknown outcome,
    ``refused`` for good, ``broken`` for good until somebody mends it.
    """

    number: int
    cents: int
    payer: int
    payees: list[int]
    fates: dict[str, str] = field(default_factory=dict)


class Plan(NamedTuple):
    """A saga of the run: the name of its definition, and its input."""

    name: str
    job: Job

    @property
    def key(self) -> str:
        """Under which it is started."""
        return f"n{self.job.number}"


class Posting(NamedTuple):
    """Money from one account to another."""

    debit: int
    credit: int
    cents: int


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a running saga, with its path in the journal.

    ``kind``: ``tx`` (posts to the ledger), ``bank`` (calls the bank outside), ``careful`` (so, and an unknown outcome is
    undone), ``signal``, or ``rule`` (conditions, lists, inputs, timers).
    """

    path: str
    kind: str
    undo: bool = False
    pivot: bool = False


def draw(seed: int, number: int) -> Plan:
    """The saga of a number."""
    chance = random.Random(f"saga:{seed}:{number}")
    name = chance.choices(list(MINE), list(MINE.values()))[0]
    people = chance.sample(range(CUSTOMERS), chance.randint(3, 6))
    job = Job(number, chance.randint(1_000, 100_000), people[0], people[1:])
    job.fates = dict(_fates(chance, Plan(name, job)))
    return Plan(name, job)


def _fates(chance: random.Random, plan: Plan) -> Iterator[tuple[str, str]]:
    every = list(places(plan.name, plan.job))
    acting = [place for place in every if place.kind in ("tx", "bank", "careful")]
    pivot = next((n for n, place in enumerate(acting) if place.pivot), len(acting))
    if chance.random() < 0.15:
        yield chance.choice(acting).path, chance.choice(("flaky", "late")) + f":{chance.randint(1, 3)}"
    lost = [place.path for place in acting if place.kind in ("bank", "careful")]
    if lost and chance.random() < 0.2:
        yield chance.choice(lost), "lost"
    undone = [place.path for place in acting if place.undo]
    if undone and chance.random() < 0.2:
        yield chance.choice(undone) + ":undo", chance.choice(("flaky", "late")) + f":{chance.randint(1, 3)}"
    drawn = chance.random()
    if drawn < 0.012 and len(undone) > 1:  # a way back that ends at a closed door
        broken = chance.randrange(len(undone) - 1)
        yield undone[broken] + ":undo", "broken"
        yield undone[-1], "refused"
    elif drawn < 0.1:
        yield chance.choice(acting[:pivot]).path, "refused"
    elif pivot < len(acting) - 1 and drawn < 0.125:  # of orders, which are a fifth
        yield acting[pivot + 1].path, "broken"


def places(name: str, job: Job) -> Iterator[Place]:
    """The parts of a saga in the order of its definition; of a condition only what is taken."""
    match name:
        case "transfer":
            yield from _steps("", "hold", "credit", "fee")
        case "order":
            yield from _steps("", "reserve")
            yield Place("charge", "bank", undo=True)
            yield from _steps("", "book")
            yield Place("ship", "bank", pivot=True)
            yield Place("confirm", "tx")
        case "careful":
            yield from _steps("", "hold")
            yield Place("charge", "careful", undo=True)
            yield from _steps("", "settle")
        case "split":
            yield from _steps("", "fund", "levy")
            yield Place("payees", "rule")
            for n in range(len(job.payees)):
                yield from _steps(f"payees[{n}]/", "pay")
            yield from _steps("", "close")
        case "nested":
            yield Place("is-large", "rule")
            yield from _steps("", "approve" if job.cents >= LARGE else "quick")
            yield Place("inner", "rule")
            yield from _steps("inner/", "hold", "credit")
            yield from _steps("", "finish")
        case _:
            yield from _steps("", "fund")
            yield Place("pause", "rule")
            yield Place("rounds", "rule")
            for n in range(ROUNDS):
                yield Place(f"rounds[{n}]/coin", "signal")
                yield from _steps(f"rounds[{n}]/", "insert")
            yield from _steps("", "close")


ROUNDS = 2  # coins that a saga waits for


def _steps(prefix: str, *names: str) -> Iterator[Place]:
    return (Place(prefix + name, "tx", undo=True) for name in names)


def posting(name: str, job: Job, path: str, coin: int = 0) -> Posting:
    """What a step moves; its compensation moves it back."""
    slot = job.number % 100
    step = path.rpartition("/")[2]
    match step:
        case "hold" | "fund":
            return Posting(job.payer, POT + slot, job.cents)
        case "credit":
            return Posting(POT + slot, job.payees[0], job.cents)
        case "fee" | "book" | "close" | "finish":
            return Posting(job.payer, CLEARING + slot, job.cents if step == "book" else 1 + job.number % 7)
        case "settle":
            return Posting(POT + slot, CLEARING + slot, job.cents)
        case "levy":
            return Posting(POT + slot, CLEARING + slot, job.cents % 100)
        case "pay":
            payee = int(path.partition("[")[2].partition("]")[0])
            return Posting(POT + slot, job.payees[payee], shares(job)[payee])
        case "reserve":
            return Posting(STOCK + slot, RESERVED + slot, 1 + job.number % 9)
        case "confirm":
            return Posting(RESERVED + slot, POT + slot, 1 + job.number % 9)
        case "approve" | "quick":
            return Posting(job.payer, POT + slot, 2 if step == "approve" else 3)
        case "insert":
            return Posting(POT + slot, CLEARING + slot, coin)
        case _:
            raise AssertionError(f"{name}: {path} moves nothing")


def shares(job: Job) -> Sequence[int]:
    """What each payee gets: to the cent, and the last one the rest."""
    rest = job.cents - job.cents % 100
    each = rest // len(job.payees)
    return [*[each] * (len(job.payees) - 1), rest - each * (len(job.payees) - 1)]


def coins(job: Job) -> Sequence[int]:
    """The coins that are sent to a saga, all of different worth; one in twelve sagas gets too few."""
    return [10 * job.number + n + 1 for n in range(ROUNDS if job.number % 12 else ROUNDS - 1)]
