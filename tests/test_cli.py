"""The command line: how it may be spelled, what it says, how it ends."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import logging

from slicecast.convert import cli, commands, describe
from slicecast.convert.errors import PlanErrors, ReadError, SlicecastError, UsageError
from slicecast.convert.memory import Machine
from slicecast.convert.settings import Settings

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"
GB = 10**9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi-K2.6."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("source") / "checkpoint"
    module.write_checkpoint(str(path))
    return path


@pytest.fixture
def quiet() -> Iterator[None]:
    """Takes back what `main` does to absl's logging."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def parsed(*words: str) -> dict[str, Any]:
    return vars(cli.parse(words))


def usage_error(*words: str) -> str:
    with pytest.raises(UsageError) as error:
        cli.parse(words)
    return str(error.value)


PATHS = ("--hf_model_path=/in", "--base_output_directory=/out")


# ---- Spellings


def test_what_a_plain_command_means() -> None:
    arguments = parsed("convert", *PATHS)
    assert arguments.pop("command") == "convert"
    assert {name: value for name, value in arguments.items() if value is not None} == {
        "hf_model_path": "/in",
        "base_output_directory": "/out",
        "scan_layers": True,
        "param_scan_axis": 1,
        "save_dtype": "bfloat16",
        "enable_mtp": False,
        "overwrite": False,
        "log_json": False,
        "checkpoint_storage_use_ocdbt": True,
        "checkpoint_storage_use_zarr3": True,
        "override_model_config": False,
    }


def test_every_setting_has_a_flag() -> None:
    names = set(parsed("convert", *PATHS, "--ici_fsdp_parallelism=2")) | set(parsed("plan", *PATHS))
    assert set(Settings.__dataclass_fields__) <= names


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "hf_model_path=/in", "base_output_directory=/out", "scan_layers=false", "model_name=llama2-7b"),
        ("convert", "base.yml", *PATHS, "scan_layers=False", "--model_name=llama2-7b"),
        ("convert", "src/maxtext/configs/base.yml", *PATHS, "--scan_layers", "False", "--model_name", "llama2-7b"),
        ("convert", *PATHS, "--scan_layers=0", "model_name=llama2-7b", "hardware=cpu"),
        ("convert", "--model_name=llama2-7b", *PATHS, "scan_layers=no", "skip_jax_distributed_system=true"),
        ("convert", *PATHS, "--model_name=llama2-7b", "--scan_layers=FALSE", "--lazy_load_tensors=False"),
    ],
)
def test_maxtexts_spelling(words: tuple[str, ...]) -> None:
    same = parsed("convert", *PATHS, "--scan_layers=false", "--model_name=llama2-7b")
    assert parsed(*words) == same


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ((), True),
        (("--scan_layers",), True),
        (("--scan_layers=true",), True),
        (("scan_layers=True",), True),
        (("scan_layers=1",), True),
        (("--scan_layers=yes",), True),
        (("--scan_layers", "True"), True),
        (("--scan_layers=false",), False),
        (("scan_layers=False",), False),
        (("scan_layers=0",), False),
        (("--scan_layers=no",), False),
        (("--scan_layers", "False"), False),
    ],
)
def test_truth_values(words: tuple[str, ...], value: bool) -> None:
    assert parsed("plan", "hf_model_path=/in", *words)["scan_layers"] is value


def test_values_are_kept_as_they_are() -> None:
    """Equals signs, spaces and slashes in values; and values that look like words of MaxText's."""
    assert parsed("plan", "hf_model_path=/a=b/c d")["hf_model_path"] == "/a=b/c d"
    assert parsed("plan", "--hf_model_path", "/a=b")["hf_model_path"] == "/a=b"
    assert parsed("verify", "/out/step=3", "--hf_model_path=/in")["output"] == "/out/step=3"
    assert parsed("plan", "--hf_model_path=hardware")["hf_model_path"] == "hardware"
    numbers = parsed("plan", *PATHS, "host_memory_gb=1.5", "--device_memory_gb=16", "hosts=2", "param_scan_axis=0")
    assert (numbers["host_memory_gb"], numbers["device_memory_gb"], numbers["hosts"]) == (1.5, 16.0, 2)
    assert numbers["param_scan_axis"] == 0


@pytest.mark.parametrize("word", ["hf_model_path=/models/llama.yml", "hf_model_path=llama.yaml"])
def test_a_pair_is_no_config_file(word: str) -> None:
    assert parsed("plan", word)["hf_model_path"] == word.partition("=")[2]


# ---- Words without effect


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("base.yml",), "needs no config file"),
        (("src/maxtext/configs/base.yml",), "needs no config file"),
        (("configs/other.yaml",), "needs no config file"),
        (("--lazy_load_tensors",), "always streamed"),
        (("--lazy_load_tensors=True",), "always streamed"),
        (("--lazy_load_tensors", "True"), "always streamed"),
        (("lazy_load_tensors=False",), "always streamed"),
        (("--eager_load_method=transformers",), "always streamed"),
        (("--eager_load_method", "safetensors"), "always streamed"),
        (("hardware=cpu",), "JAX_PLATFORMS"),
        (("skip_jax_distributed_system=true",), "--coordinator_address"),
        (("--skip_jax_distributed_system=true",), "--coordinator_address"),
    ],
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_words_without_effect_print_a_line(
    words: tuple[str, ...], why: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = parsed("convert", *PATHS)
    first, second = PATHS
    order = {"first": (*words, first, second), "middle": (first, *words, second), "last": (first, second, *words)}
    assert parsed("convert", *order[place]) == plain
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"slicecast: {words[0]}: ignored; ")
    assert why in line


def test_a_pair_after_a_word_without_effect_is_not_its_value() -> None:
    pairs = ("hf_model_path=/in", "base_output_directory=/out")
    assert parsed("convert", "--lazy_load_tensors", *pairs) == parsed("convert", *PATHS)
    assert parsed("convert", pairs[0], "--lazy_load_tensors", pairs[1]) == parsed("convert", *PATHS)


def test_each_of_several_words_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("base.yml", "hardware=cpu", "--lazy_load_tensors=True", "skip_jax_distributed_system=true")
    assert parsed("convert", *words, *PATHS) == parsed("convert", *PATHS)
    assert len(capsys.readouterr().err.splitlines()) == len(words)


# ---- Mistakes


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--host_memory=3", "--host_memory_gb"),
        ("--scan_layer=true", "--scan_layers"),
        ("scan_layer=true", "--scan_layers"),
        ("--model_nam=x", "--model_name"),
        ("--save_type=float32", "--save_dtype"),
        ("--base_output_dir=/x", "--base_output_directory"),
        ("--simulated_cpu_devices=8", "--simulated_cpu_devices_count"),
    ],
)
def test_unknown_flags_have_a_suggestion(word: str, suggestion: str) -> None:
    message = usage_error("convert", *PATHS, word)
    assert f"'{word if word.startswith('-') else '--' + word}' is not understood" in message
    assert f"did you mean {suggestion}?" in message


def test_unknown_words_without_a_resemblance() -> None:
    assert "see slicecast plan --help" in usage_error("plan", *PATHS, "--zzz")
    message = usage_error("plan", *PATHS, "--zzz", "--host_memory=3", "stray")
    for word in ("'--zzz'", "'--host_memory=3'", "did you mean --host_memory_gb?", "'stray'"):
        assert word in message


def test_flags_of_other_commands_are_unknown() -> None:
    assert "'--json' is not understood" in usage_error("convert", *PATHS, "--json")
    assert "'--slice=v5e-16' is not understood" in usage_error("convert", *PATHS, "--slice=v5e-16")


def test_flags_are_not_abbreviated() -> None:
    assert "did you mean --host_memory_gb?" in usage_error("plan", *PATHS, "--host_mem=3")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "command"),
        (("transmogrify",), "transmogrify"),
        (("convert",), "--hf_model_path"),
        (("convert", "--hf_model_path=/in"), "--base_output_directory"),
        (("plan",), "--hf_model_path"),
        (("verify", "--hf_model_path=/in"), "OUT"),
        (("plan", *PATHS, "--scan_layers=maybe"), "--scan_layers"),
        (("plan", *PATHS, "--param_scan_axis=2"), "--param_scan_axis"),
        (("plan", *PATHS, "--save_dtype=float16"), "--save_dtype"),
        (("plan", *PATHS, "--host_memory_gb=0"), "--host_memory_gb"),
        (("plan", *PATHS, "--host_memory_gb=-1"), "--host_memory_gb"),
        (("plan", *PATHS, "--host_memory_gb=nan"), "--host_memory_gb"),
        (("plan", *PATHS, "--host_memory_gb=inf"), "--host_memory_gb"),
        (("plan", *PATHS, "--device_memory_gb=much"), "--device_memory_gb"),
        (("plan", *PATHS, "--hosts=two"), "--hosts"),
        (("plan", *PATHS, "--model_name"), "--model_name"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], named: str) -> None:
    message = usage_error(*words)
    assert named in message
    assert "--help" in message


@pytest.mark.parametrize("flag", ["--hosts", "--simulated_cpu_devices_count"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_counts_are_above_zero(flag: str, value: str) -> None:
    assert flag in usage_error("plan", *PATHS, f"{flag}={value}")


@pytest.mark.parametrize("value", ["llama3", "llama-3.1", "yes"])
def test_rope_types_are_those_of_maxtext(value: str) -> None:
    """Hugging Face calls it `llama3`; to take that for "another one" would convert to the wrong layout."""
    assert "--rope_type" in usage_error("plan", *PATHS, f"--rope_type={value}")


# ---- Help


@pytest.mark.parametrize("command", ["convert", "plan", "verify"])
def test_help_has_examples_that_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^  slicecast ({command} .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert cli.parse(example.split()).command == command
    for name in parsed(*examples[0].split()):
        assert name in ("command", "output") or f"--{name}" in text
    assert "absl" not in text
    assert "==SUPPRESS==" not in text


def test_help_of_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("convert", "plan", "verify", "--version"):
        assert word in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"slicecast \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# ---- What it prints and how it ends


@pytest.mark.usefixtures("quiet")
def test_plan_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "base.yml", f"hf_model_path={checkpoint}", "--slice=v5e-16", "--json", "scan_layers=False"]
    assert cli.main(cli.parse(words)) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert len(err.splitlines()) == 1
    settings = Settings(hf_model_path=str(checkpoint), scan_layers=False, slice="v5e-16")
    plan = commands.make_plan(settings, commands.machine_for_planning(settings))
    assert facts == json.loads(json.dumps(describe.as_json(plan)))
    assert facts["digest"] == plan.digest
    assert facts["scan_layers"] is False
    assert (facts["hosts"], facts["devices_per_host"]) == (4, 4)
    assert facts["out_bytes"] == sum(work.costs.out_bytes for work in plan.boxes)
    assert facts["boxes"] == len(list(plan.boxes))
    assert {ignored["why"].split(":")[0] for ignored in facts["ignored"]} == {"MaxText's model is text only"}


@pytest.mark.usefixtures("quiet")
def test_plan_for_people(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", f"--hf_model_path={checkpoint}", "--slice=v5e-16", "--hosts=2"]
    assert cli.main(cli.parse(words)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith((" ", "host m", "chip m")))
    assert "KimiK25ForConditionalGeneration: 3 layers, 8 experts" in lines["model"]
    assert lines["source"].startswith("3 files, ")
    assert "48 x int4 pack-quantized, group 32" in lines["formats"]
    assert lines["hosts"].startswith("2 with 4 devices each")
    assert re.search(r"^host memory +.* in flight at most; the budget is 144\.0 GB$", out, re.MULTILINE)
    assert re.search(r"^chip memory +.* at most; the budget is 12\.0 GB a chip$", out, re.MULTILINE)
    assert re.search(r"^left out +\d+ tensors, .* MB: .*vision tower", out, re.MULTILINE)
    assert re.search(r"^ +\S+ MB  bfloat16\[8, 2, 256, 128\], chunks .* of .*MoeBlock_0/wi_0$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) < 250


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("words", "name", "text"),
    [
        (("--hf_model_path=/nowhere",), "MissingFileError", "/nowhere"),
        (("--slice=v9-1",), "UsageError", "v5e-16"),
        (("--slice=v5e-0",), "UsageError", "v5e-16"),
        (("--model_name=llama2-7b",), "TargetError", "--override_model_config"),
        (("--host_memory_gb=0.000001",), "BudgetError", "Give --host_memory_gb="),
    ],
)
def test_errors_are_one_line_and_a_code(
    checkpoint: Path, words: tuple[str, ...], name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(cli.parse(["plan", f"--hf_model_path={checkpoint}", *words]))
    out, err = capsys.readouterr()
    assert out == ""
    first, *rest = err.splitlines()
    assert all(line.startswith("  ") for line in rest)
    found = " ".join([first, *rest])
    assert first.startswith(f"slicecast: {name}: ") or f"[{name}]" in found
    assert text in found
    assert code == (2 if name == "UsageError" else 1)


def subclasses(kind: type[SlicecastError]) -> Iterator[type[SlicecastError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_exit_codes_tell_mistakes_from_failures() -> None:
    codes = {kind.__name__: kind.exit_code for kind in subclasses(SlicecastError)}
    assert {name: code for name, code in codes.items() if code != 1} == {
        "UsageError": 2,
        "StoppedError": 130,
        "PreemptedError": 143,
        "StorageError": 42,
        "ReadError": 42,
    }


@pytest.mark.usefixtures("quiet")
def test_an_interruption(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "make_plan", interrupt)
    assert cli.main(cli.parse(["plan", f"--hf_model_path={checkpoint}", "--slice=v5e-16"])) == 130
    assert capsys.readouterr().err == "slicecast: interrupted; run the same command again to go on.\n"


def test_processes_end_with_the_code(checkpoint: Path) -> None:
    """The same through the entry point: code, one line on stderr, no stack trace."""
    plan = ["plan", f"--hf_model_path={checkpoint}", "--slice=v5e-16", "--json"]
    cases = [(plan, 0), ([*plan, "--jason"], 2), (["plan", "--hf_model_path=/nowhere", "--slice=v5e-16"], 1)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "slicecast.convert", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for words, _ in cases
    ]
    results = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [code for _, code in cases]
    (facts, nothing), (_, usage), (_, missing) = results
    assert json.loads(facts)["hosts"] == 4
    assert nothing == ""
    assert usage == "slicecast: UsageError: '--jason' is not understood; did you mean --json?\n"
    assert missing.startswith("slicecast: MissingFileError: /nowhere: ")
    assert missing.count("\n") == 1


def test_the_machine_that_is_planned_for() -> None:
    """Names of slices, and how flags override them."""
    machine = commands.machine_for_planning(Settings(hf_model_path="x", slice="v5e-16"))
    assert machine == Machine(4, 4, 144 * GB, 12 * GB)
    settings = Settings(hf_model_path="x", slice="v5p-128", hosts=3, host_memory_gb=1.5, device_memory_gb=2)
    assert commands.machine_for_planning(settings) == Machine(3, 4, 3 * GB // 2, 2 * GB)
    assert commands.machine_for_planning(Settings(hf_model_path="x", slice="v5p-128")).hosts == 16
    assert commands.machine_for_planning(Settings(hf_model_path="x", slice="v5e-1")).devices == 1


def test_errors_together_are_tried_again_if_all_of_them_may_pass() -> None:
    passing, lasting = ReadError("storage failed"), SlicecastError("never")
    assert PlanErrors([passing, passing]).exit_code == ReadError.exit_code
    assert PlanErrors([passing, lasting]).exit_code == SlicecastError.exit_code
