"""How tests start slicecast, and the generator of made-up checkpoints, in processes of their own."""

from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"

# The longest that any process of a test may take, on a loaded machine; a hang ends here.
TIMEOUT_SECONDS = 120.0

# The command line, as Python code.
CLI = "\nfrom slicecast.convert import cli\ncli.run()"
