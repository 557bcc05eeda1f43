"""scripts/verify_logits.py tells a right conversion from a wrong one, and what a user has done wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import convert_with_slicecast
import numpy as np
import pytest
import verify_logits
from case import Case, Layout, SaveDtype, output
from cases import CASES
from converted import TOLERANCE, VISIBLE
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.maxtext

_CASES = {case.name: case for case in CASES}
_LLAMA = _CASES["llama31"]


def words(case: Case, layout: Layout) -> list[str]:
    """The settings of MaxText for a tiny model. All else is in the checkpoint's metadata."""
    recorded = {"model_name", "scan_layers", "max_target_length", "vocab_size"}
    return [f"{key}={value}" for key, value in case.maxtext_settings(layout).items() if key not in recorded]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does."""
    command = [sys.executable, "-P", verify_logits.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def with_mistake(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in which two query heads of one layer are exchanged: that of a source which has them so."""
    folder = tmp_path_factory.mktemp("mistake")
    shutil.copytree(sources / _LLAMA.name / "hf", folder / "hf")
    name = "model.layers.3.self_attn.q_proj.weight"
    changed = 0
    for file in (folder / "hf").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            heads = tensors[name].reshape(_LLAMA.config["num_attention_heads"], -1, tensors[name].shape[1])
            save_file(tensors | {name: heads[[1, 0, 2, 3]].reshape(tensors[name].shape)}, file, {"format": "pt"})
            changed += 1
    assert changed == 1
    command = convert_with_slicecast.command(_LLAMA, "scanned", "bfloat16", folder)
    # In a process of its own: in this one JAX has its devices already.
    subprocess.run([sys.executable, "-P", "-m", "slicecast.convert", *command], check=True, capture_output=True)
    return output(folder, "slicecast", "bfloat16", "scanned")


@pytest.mark.parametrize(
    ("name", "layout", "save_dtype", "largest"),
    # In bfloat16 the queries are rounded once, for their scale is in the weights.
    [("llama31", "scanned", "bfloat16", VISIBLE), ("qwen3_moe", "unscanned", "float32", TOLERANCE)],
)
def test_right_conversion_agrees(
    name: str, layout: Layout, save_dtype: SaveDtype, largest: float, sources: Path
) -> None:
    case = _CASES[name]
    done = run(output(sources / name, "slicecast", save_dtype, layout), *words(case, layout), "--json", "--seed=3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["agree"] is True
    assert result["vocabulary"] == case.tokens
    assert [prompt["tokens"] for prompt in result["prompts"]] == [16, 16, 16]
    assert all(0 < prompt["mean"] < prompt["largest"] < largest for prompt in result["prompts"])
    assert all(prompt["kl"] < 1e-5 and prompt["top1"] == 1 for prompt in result["prompts"])
    assert "random tokens, --seed=3" in done.stderr


def test_wrong_conversion_differs(with_mistake: Path, sources: Path) -> None:
    source = sources / _LLAMA.name / "hf"
    done = run(with_mistake, *words(_LLAMA, "scanned"), f"--hf_model_path={source}")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("DIFFERS") == 3
    assert done.stdout.endswith("MaxText and transformers DIFFER\n")


def test_prompts_of_different_lengths_go_through_the_tokenizer(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / _LLAMA.name / "hf", tmp_path / "hf")
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 7, "b": 20, "c": 95}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "hf")
    out = output(sources / _LLAMA.name, "slicecast", "bfloat16", "scanned")
    prompts = ["--prompt=a b c a d", "--prompt=c b"]
    done = run(out, *words(_LLAMA, "scanned"), f"--hf_model_path={tmp_path / 'hf'}", *prompts, "--json")
    assert done.returncode == 0, done.stderr
    assert [prompt["ids"] for prompt in json.loads(done.stdout)["prompts"]] == [[7, 20, 95, 7, 0], [95, 20]]


def test_other_sizes_than_the_models_are_said(sources: Path) -> None:
    done = run(output(sources / _LLAMA.name, "slicecast", "bfloat16", "scanned"))
    assert done.returncode == 2
    assert "maxtext does not compute this model: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name=llama9"], "--model_name=llama9: MaxText 0.2.5 has no model of this name."),
        (["--hf_model_path=/nowhere"], "/nowhere"),
        (["--prompt=Hello"], "has no tokenizer"),
        (["base_emb_dim"], "base_emb_dim: MaxText's settings are given as KEY=VALUE."),
        (["--transformers_python=/nowhere/python"], "/nowhere/python cannot be started"),
    ],
)
def test_mistakes_of_users_are_said(
    arguments: list[str], message: str, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = output(sources / _LLAMA.name, "slicecast", "bfloat16", "scanned")
    assert verify_logits.main([str(out), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_checkpoint_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_logits.main([str(tmp_path)]) == 2
    assert "a finished checkpoint is expected, found nothing" in capsys.readouterr().err


def test_model_that_does_not_fit_is_refused(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_logits, "available_host_bytes", lambda: 10**9)
    out = output(sources / _LLAMA.name, "slicecast", "bfloat16", "scanned")
    assert verify_logits.main([str(out)]) == 2
    assert "memory will not be enough. --dtype=bfloat16 takes half." in capsys.readouterr().err


def test_blocks_that_transformers_misreads_are_refused(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = output(sources / "deepseek3_fp8", "slicecast", "bfloat16", "scanned")
    assert verify_logits.main([str(out)]) == 2
    assert "its last blocks are not whole" in capsys.readouterr().err


def test_divergence_is_that_of_the_definition() -> None:
    right, other = np.float32([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), np.float32([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    compared = verify_logits.compare(np.log(right) + 3, np.log(other))
    assert compared.tokens == 2
    assert compared.kl == pytest.approx(0.125 * np.log(2), abs=1e-6)
    assert compared.largest_kl == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert compared.top1 == 0.5
    assert compared.largest == pytest.approx(3 + np.log(2), abs=1e-6)


def test_logits_that_are_no_numbers_do_not_agree() -> None:
    logits = np.ones((2, 3), np.float32)
    broken = logits.copy()
    broken[1, 2] = np.nan
    bars = verify_logits.Bars(kl=1e9, top1=0, reason="any")
    assert verify_logits.compare(logits, logits).keeps(bars)
    assert not verify_logits.compare(logits, broken).keeps(bars)
