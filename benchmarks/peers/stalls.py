"""Tell when this machine ran nothing: print the times at which a process that sleeps 10 ms woke up much later.

    python stalls.py

One line each, `time.monotonic()` of the waking in seconds and how late it was in seconds, where that is 0.1 or more,
until it is killed. A process that nearly always sleeps is run soon after it wakes, however busy the cores are, so such
a delay means that the machine itself stood still: a virtual one whose host ran others, for instance.
"""

from __future__ import annotations

import time

SLEEP_S = 0.01
LATE_S = 0.1


def main() -> None:
    """Watch until killed."""
    before = time.monotonic()
    while True:
        time.sleep(SLEEP_S)
        now = time.monotonic()
        late = now - before - SLEEP_S
        if late >= LATE_S:
            print(f"{now:.3f} {late:.3f}", flush=True)
        before = now


if __name__ == "__main__":
    main()
