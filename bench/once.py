"""Runs one shell command and prints what it took, as JSON: a small process in between, for the sake of the memory.

The kernel counts a child's peak from what its parent had when it was started. Under a parent of a hundred megabytes
every program would seem to take that; under this one the floor is a tenth of it. Only the standard library, and little
of it: ``python -S once.py DESCRIPTOR COMMAND`` writes the figures to that descriptor; stdout is the
command's own.
"""

import json
import os
import resource
import sys
import time


def _peak() -> int:
    """Return this process's own peak in bytes; getrusage would tell that of whoever started it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    """Run it; every stage of a pipeline must succeed."""
    figures, command = int(sys.argv[1]), sys.argv[2]
    start = time.monotonic()
    pid = os.posix_spawn(
        "/bin/bash",
        ["bash", "-o", "pipefail", "-c", command],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_CLOSE, figures)],
    )
    _, status = os.waitpid(pid, 0)
    wall = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    memory = used.ru_maxrss * 1024 if used.ru_maxrss * 1024 > _peak() * 1.02 else None
    told = {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "memory": memory}
    os.write(figures, json.dumps({"status": os.waitstatus_to_exitcode(status), "run": told}).encode())


if __name__ == "__main__":
    main()
