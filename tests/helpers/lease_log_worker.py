"""The process that test_lease_log kills: it spends from two slots of a lease log, and prints each written total.

python lease_log_worker.py FOLDER LEASE
"""

from __future__ import annotations

import sys
from pathlib import Path

from strongroom.limits.lease_log import LeaseLog


def main(folder: str, lease: str) -> None:
    log = LeaseLog(lease, Path(folder))
    slots = [log.slot("key_1", "tokens|total"), log.slot("key_2", "tokens|total")]
    total = 0
    while True:
        total += 1
        log.moment(slots[total % 2], total)
        log.cells[slots[total % 2]] = total
        sys.stdout.write(f"{total}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
