"""Ctrl-C and SIGTERM: the work in flight is done, nothing new begins, and the exit code says what happened.

A spot machine that is taken away, and every scheduler that ends a run, send SIGTERM first and SIGKILL some time later.
As process 1 of a container, a program that does not handle SIGTERM does not even get it.

A thread of its own acts on signals. Python runs its handlers in the main thread, between two of its instructions: not
while that waits in a library for other processes or for storage.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator

from slicecast.convert.errors import PreemptedError, StoppedError

# XPK and Kubernetes send SIGKILL 30 seconds after SIGTERM. Work that takes longer is given up, with an exit code of our
# own: what is not committed will be done again.
GRACE_SECONDS = 20.0


def end_on_sigterm() -> None:
    """From now on SIGTERM ends the process at once; `stopping` is for the part of a run in which it has work in flight.

    Not by an exception: code that handles failures of storage would take it for one.

    To be called after JAX has joined the other processes: it has a handler of its own, for programs that save at once.
    """
    _watch([signal.SIGTERM], lambda _: _end(PreemptedError("ended by SIGTERM")))


@contextlib.contextmanager
def stopping(stop: Callable[[StoppedError], None]) -> Iterator[None]:
    """Calls `stop` at the first Ctrl-C or SIGTERM, in a thread of its own.

    An exception in the main thread would not do: Orbax would wait for the conversion, which would not know of it. The
    second Ctrl-C ends the process at once, and so does the time that passes after SIGTERM, whatever is in flight.

    Raises:
        StoppedError: In place of any error that comes after the signal.
    """
    signaled: dict[int, StoppedError] = {}

    def handle(number: int) -> None:
        if number == signal.SIGINT and number in signaled:
            _end(signaled[number])
        if number not in signaled:
            interrupted = number == signal.SIGINT
            signaled[number] = StoppedError("interrupted") if interrupted else PreemptedError("ended by SIGTERM")
            stop(signaled[number])
            if not interrupted:
                timer = threading.Timer(GRACE_SECONDS, _give_up)
                timer.daemon = True
                timer.start()

    with _watch([signal.SIGINT, signal.SIGTERM], handle):
        try:
            yield
        except Exception as error:
            # With all hosts signaled, one that is done with its work fails as it waits for another, which has ended.
            if signaled and not isinstance(error, StoppedError):
                raise next(reversed(signaled.values())) from error
            raise


def _watch(numbers: Collection[int], handle: Callable[[int], None]) -> contextlib.ExitStack:
    """Calls a function with each signal of these numbers, in a thread of its own, until what is returned is closed."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch(_: socket.socket) -> None:
        while received := receiver.recv(1):
            if received[0] in numbers:
                handle(received[0])

    # The sender is given to the thread only to stay open as long as nobody closes it.
    threading.Thread(target=watch, args=(sender,), name="slicecast-signals", daemon=True).start()
    undo = contextlib.ExitStack()
    undo.callback(sender.close)
    undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno()))
    for number in numbers:
        # Without a handler, even one that does nothing, Python would not write the signal to the socket.
        undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
    return undo


def _give_up() -> None:
    given_up = f"what was in flight was not done within {GRACE_SECONDS:g} seconds and is given up"
    _end(PreemptedError(f"ended by SIGTERM; {given_up}"))


def _end(why: StoppedError) -> None:
    """Ends the process with the line and the exit code that the error would have."""
    print(f"slicecast: {why}; run the same command again to go on.", file=sys.stderr, flush=True)
    os._exit(why.exit_code)
