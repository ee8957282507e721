"""Run every benchmark, or those named: ``python -m benchmarks [append relay …]``."""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "import_time", "append", "reader", "relay", "latency", "consume", "slow_handlers", "dead_letters", "replay",
    "retention", "codec", "sagas", "logging_records", "tracing", "console",
)  # fmt: skip


def main() -> int:
    """Each benchmark in a process of its own, so that none warms another; the worst exit code."""
    chosen = sys.argv[1:] or NAMES
    unknown = set(chosen) - set(NAMES)
    if unknown:
        print(f"Unknown: {', '.join(sorted(unknown))}. There are: {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    worst = 0
    for name in chosen:
        print(f"\n== {name} ==", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
