"""Ctrl-C and SIGTERM: the work in flight is done, nothing new begins, and the exit code says what happened.

A spot machine that is taken away, and every scheduler that ends a run, send SIGTERM first and SIGKILL some time later.
As process 1 of a container, a program that does not handle SIGTERM does not even get it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from slicecast.convert.errors import PreemptedError, StoppedError

# XPK and Kubernetes send SIGKILL 30 seconds after SIGTERM. Work that takes longer is given up, with an exit code of our
# own: what is not committed will be done again.
GRACE_SECONDS = 20.0


def end_on_sigterm() -> None:
    """From now on SIGTERM raises `PreemptedError` in the main thread.

    To be called after JAX has joined the other processes: it has a handler of its own, for programs that save at once.
    """

    def handle(_: int, __: FrameType | None) -> None:
        raise PreemptedError("ended by SIGTERM")

    signal.signal(signal.SIGTERM, handle)


@contextlib.contextmanager
def stopping(stop: Callable[[StoppedError], None]) -> Iterator[None]:
    """Calls `stop` at the first Ctrl-C or SIGTERM, whatever the main thread waits for then.

    An exception in the main thread would not do: Orbax would wait for the conversion, which would not know of it. The
    second Ctrl-C has its usual effect, and some time after SIGTERM the process ends, whatever is still in flight.
    """

    def interrupt(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        stop(StoppedError("interrupted"))

    def terminate(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        timer = threading.Timer(GRACE_SECONDS, _give_up)
        timer.daemon = True
        timer.start()
        stop(PreemptedError("ended by SIGTERM"))

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up() -> None:
    print(
        f"slicecast: ended by SIGTERM; what was in flight was not done within {GRACE_SECONDS:g} seconds and is given "
        "up. Run the same command again to go on.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PreemptedError.exit_code)
