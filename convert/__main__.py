"""The entry point: `slicecast`, or `python -m slicecast.convert`."""

import os
import sys

# Lets malloc ask for huge pages. A conversion fills fresh buffers of 100 MB all the time, and without huge pages
# clearing them takes a quarter of its processor time on a CPU host. glibc reads this only when a process starts.
_HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def run() -> None:
    """Runs the command line, in a process that has huge pages where the system offers them."""
    name, value = _HUGE_PAGES
    if sys.platform == "linux" and name not in os.environ:
        os.environ[name] = value
        os.execv(sys.executable, [sys.executable, "-m", "slicecast.convert", *sys.argv[1:]])
    # Only now, for it takes a second to import JAX.
    from slicecast.convert import cli

    cli.run()


if __name__ == "__main__":
    run()
