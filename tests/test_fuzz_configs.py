"""Hostile configs and indexes beside what `test_fuzz.py` opens.

Of each `config.json` a family makes rules, or it is refused with an error of ours that can be shown.
"""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny_models
from fuzz_limits import assert_can_be_shown, memory_limit, time_limit
from fuzz_mutations import Pairs, dumps, mutate_tree

from slicecast.configs import families
from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import SlicecastError
from slicecast.convert.mapping.rules import ModelOptions
from slicecast.convert.source import web
from slicecast.convert.source.safetensors_header import load_json

SEED = 5
QUICK_CASES = 3_000
CASES = 100_000


def outcome(number: int) -> str:
    """What becomes of one config: `no JSON`, `accepted`, or the class of the error."""
    rng = random.Random(f"{SEED}/{number}")
    name = rng.choice(sorted(tiny_models.CONFIGS))
    tree = json.loads(json.dumps(tiny_models.CONFIGS[name]), object_pairs_hook=Pairs)
    try:
        for _ in range(rng.choice((1, 1, 2, 3))):
            tree = json.loads(dumps(mutate_tree(rng, tree)), object_pairs_hook=Pairs)
        config = load_json(dumps(tree).encode())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return "no JSON"
    options = ModelOptions(use_multimodal=rng.random() < 0.3, enable_mtp=rng.random() < 0.3)
    try:
        families.recognize(config, options)
        quantization_config.read(config)
    except SlicecastError as error:
        assert_can_be_shown(error)
        return type(error).__name__
    return "accepted"


def run(cases: range) -> Counter[str]:
    """How many configs had which outcome."""
    outcomes: Counter[str] = Counter()
    for number in cases:
        try:
            with time_limit():
                outcomes[outcome(number)] += 1
        except Exception as error:
            error.add_note(f"config {number}")
            raise
    assert outcomes.keys() == {"no JSON", "accepted", "ConfigError", "UnsupportedArchitectureError"}
    assert all(count > outcomes.total() // 100 for count in outcomes.values()), outcomes
    return outcomes


def test_some_configs() -> None:
    with memory_limit():
        run(range(QUICK_CASES))


@pytest.mark.campaign
def test_many_configs() -> None:
    with memory_limit():
        print(*run(range(CASES)).most_common(), sep="\n")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"\xff", b"[]", b'{"weight_map": 1}', b"{}"], ids=lambda text: text[:16]
)
def test_indexes_of_a_web_server(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Only the index names the files. One that makes no sense names none; whoever reads it says what is wrong."""
    answers = {"HEAD": SimpleNamespace(status_code=200, headers={"content-length": str(len(text))}, content=b"")}
    answers["GET"] = SimpleNamespace(status_code=200, headers={}, content=text)
    monkeypatch.setattr(web, "request", lambda method, url, headers: answers[method])
    assert "model.safetensors.index.json" in web.WebDirectory("https://host/path").names()


def test_index_of_a_terabyte_on_a_web_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(method: str, url: str, headers: object) -> SimpleNamespace:
        assert method == "HEAD"
        return SimpleNamespace(status_code=200, headers={"content-length": str(10**12)})

    monkeypatch.setattr(web, "request", head)
    assert "model.safetensors.index.json" in web.WebDirectory("https://host/path").names()
