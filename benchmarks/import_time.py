"""What ``import soma_common`` and ``somastack --help`` cost, beside a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.reporting import report

RUNS = 15
_BARE = "pass"
_DOOR = "import soma_common"
_STORE = "from soma_common import EventStore"
_HELP = "from soma_common.cli.main import main; main(['--help'])"


def seconds(script: str) -> float:
    """The median time of a fresh interpreter that runs the script."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", script], check=False, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print and write the table."""
    bare = seconds(_BARE)
    rows = [
        {"what": what, "ms": seconds(script) * 1000, "above bare ms": (seconds(script) - bare) * 1000}
        for what, script in (("bare python", _BARE), (_DOOR, _DOOR), (_STORE, _STORE), ("somastack --help", _HELP))
    ]
    report("import_time", f"Import time, median of {RUNS}", rows)


if __name__ == "__main__":
    main()
