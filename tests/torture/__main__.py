"""``python -m tests.torture``: see ``--help``."""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Sequence

from tests.torture import mutant_runs, mutants, run, saga_mutant_runs, saga_mutants, sagas, storm
from tests.torture.report import show


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.torture", description="Kill everything at random, check the history.")
    parser.add_argument("--duration", type=float, default=180.0, help="seconds of chaos; from 180 on the long form")
    parser.add_argument("--seed", type=int, help="of the chaos and the writers; random and printed when left out")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--exactly-once", dest="modes", action="store_const", const=(True,))
    mode.add_argument("--at-least-once", dest="modes", action="store_const", const=(False,))
    parser.add_argument("--rate", type=float, default=40.0, help="units of work per second and writer process")
    parser.add_argument("--promotion", action="store_true", help="promote a lagging standby in a short run too")
    parser.add_argument("--mutants", action="store_true", help="break the library in every known way; all are caught")
    parser.add_argument(
        "--mutant", choices=sorted({**mutants.MUTANTS, **saga_mutants.MUTANTS}), help="break it in one way"
    )
    parser.add_argument("--storm", action="store_true", help="members of a consumer group come and go every second")
    parser.add_argument("--sagas", action="store_true", help="torture sagas instead of events")
    parser.add_argument("--keep", action="store_true", help="keep journals and logs, and print where they are")
    parser.set_defaults(modes=(False, True))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when every check holds (or every mutant is caught)."""
    args = _arguments(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell made a background job deaf to it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are ended on the way out
    if args.mutants or args.mutant:
        return _mutants(args)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1_000_000)
    if args.storm:
        found = storm.weather(args.duration, seed)
        storm.show(found)
        return 0 if found.ok else 1
    if args.sagas:
        return _sagas(sagas.Plan.of(args.duration, seed, promotion=args.promotion, keep=args.keep))
    reports = []
    for exactly_once in args.modes:
        # Both modes share the time that was asked for.
        plan = run.Plan(
            args.duration / len(args.modes),
            seed,
            exactly_once=exactly_once,
            rate=args.rate,
            restarts=-(-run.RESTARTS // len(args.modes)) if args.duration >= run.LONG else 1,
            promotion=args.promotion or args.duration >= run.LONG,
            keep=args.keep,
        )
        reports += run.run(plan)
        for report in reports[-2:]:
            show(report)
    return 0 if all(report.ok for report in reports) else 1


def _mutants(args: argparse.Namespace) -> int:
    """Those of the sagas with ``--sagas``, else those of the events; or the one that was named."""
    if args.mutant in saga_mutants.MUTANTS or (args.sagas and not args.mutant):
        return saga_mutant_runs.main([args.mutant] if args.mutant else list(saga_mutants.MUTANTS))
    return mutant_runs.main([args.mutant] if args.mutant else list(mutants.MUTANTS), keep=args.keep)


def _sagas(plan: sagas.Plan) -> int:
    reports = sagas.run(plan)
    for report in reports:
        sagas.show(report)
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
