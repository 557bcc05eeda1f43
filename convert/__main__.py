"""`python -m slicecast.convert`: the same as the command `slicecast`."""

from slicecast.convert.cli import run

run()
