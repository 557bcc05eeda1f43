"""How glibc's malloc is set up for conversions. It reads its settings only when a process starts."""

import os
import sys

# Huge pages: a conversion fills fresh buffers of 100 MB all the time, and clearing them in small pages takes a fifth of
# its processor time on a CPU host. Two arenas: buffers are allocated by one thread and freed by another, which leaves
# every arena with free memory of its own; by default there are eight for each core.
SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"}


def restart() -> None:
    """Starts this program again with the settings, unless they are there, or the user's own, or not for Linux."""
    if sys.platform != "linux" or os.environ.keys() & SETTINGS.keys():
        return
    os.environ.update(SETTINGS)
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)
