"""What any hostile input may take, and what any message about it must be."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# A case takes milliseconds; one with the longest header that the format allows, half a second.
SECONDS_A_CASE = 5

# Address space beyond what is there after a few cases. The longest header, of 100 MB, is there three times for a
# moment, and each thread that allocates may reserve 64 MiB. Lengths that are claimed falsely begin at 2 GiB.
MORE_MEMORY = 1 << 30

# Longer messages fill a screen.
MESSAGE_CHARACTERS = 2000


def assert_can_be_shown(message: object) -> None:
    """Checks that a message is one line that a terminal shows as it is, and not endless."""
    assert str(message).isprintable()
    assert len(str(message)) < MESSAGE_CHARACTERS


@contextmanager
def time_limit() -> Iterator[None]:
    """Ends what hangs."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("this hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit() -> Iterator[None]:
    """Lets the process have little more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
