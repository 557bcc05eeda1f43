"""What the README and docs/sizing.md say of ten well-known models is what the program says now."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from program import SCRIPT


def test_the_page_is_current(make_checkpoint: Callable[..., Path]) -> None:
    """If not: `scripts/size_models.py` writes it anew."""
    file = SCRIPT.with_name("size_models.py")
    specification = importlib.util.spec_from_file_location("size_models", file)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    sys.modules["size_models"] = script  # Dataclasses look their module up.
    specification.loader.exec_module(script)
    page, table = script.document(make_checkpoint(headers_only=True, files=64))
    assert page == script.DOCUMENT.read_text()
    assert table in script.README.read_text()
    assert page.count("\n| ") == 2 + len(script.MODELS)
