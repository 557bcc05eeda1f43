"""The entry point: `slicecast`, or `python -m slicecast.convert`."""

from slicecast.convert import allocator


def run() -> None:
    """Runs the command line, with an allocator that suits it."""
    allocator.restart()
    # Only now, for it takes a second to import JAX.
    from slicecast.convert import cli

    cli.run()


if __name__ == "__main__":
    run()
