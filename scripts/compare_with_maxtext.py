"""Runs slicecast and MaxText's own converter on the same checkpoints, and prints what each did as a table.

    .venv/bin/python scripts/compare_with_maxtext.py --work_dir DIR

scripts/test_maxtext.sh makes the environment that MaxText needs, `.venv-maxtext`. Both programs are started as a user
starts them, nothing in them is changed. The checkpoints have the true sizes of Qwen3-0.6B, with made-up weights: in
bfloat16, in FP8 with a scale for each block of 128 x 128, as Qwen3-0.6B-FP8 has them, and in INT4 with a scale for 32
values, as llm-compressor writes them.

slicecast's results are verified first, so that a leaf of MaxText's in which values differ is wrong.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import make_checkpoint
import numpy as np
from absl import logging
from etils import epath
from make_checkpoint import Tensor

from slicecast.convert import orbax_checkpoint
from slicecast.convert.errors import OutputError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import published_models  # noqa: E402  It is found in `tests` only.

PROGRAMS = ("slicecast", "MaxText")

# Small, and MaxText's converter has it.
MODEL = "qwen3-0.6b"

# Bytes that are changed, one at a time, to see who notices.
FLIPS = 20

# slicecast's budget. MaxText's converter has none.
BUDGET_GB = 1

# What `config.json` says of a checkpoint that is quantized.
ANNOUNCED = {
    "FP8": make_checkpoint.DEEPSEEK_FP8["quantization_config"],
    "INT4": make_checkpoint.KIMI_TEXT["quantization_config"] | {"ignore": ["lm_head"]},
}


@dataclass(frozen=True)
class Run:
    """What a program did.

    Attributes:
        exit_code: How it ended.
        seconds: How long it took.
        peak_bytes: The most memory that it held.
        output: What it said.
    """

    exit_code: int
    seconds: float
    peak_bytes: int
    output: str


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a directory with 10 GB free, for temporary files")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what it does not need here.
    work = arguments.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(f"| | {' | '.join(PROGRAMS)} |\n| --- | --- | --- |")
    for title, *cells in rows(work):
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def rows(work: Path) -> Iterator[Sequence[str]]:
    """The table's rows."""
    for stored in ("bfloat16", *ANNOUNCED):
        source = work / stored
        write(source, stored)
        runs = [convert(program, source, work / f"{program}-{stored}") for program in PROGRAMS]
        verify(work / f"slicecast-{stored}")
        if stored == "bfloat16":
            yield (
                "bfloat16, 1.2 GB: memory, time",
                *(f"{run.peak_bytes / 1e9:.1f} GB, {run.seconds:.0f} s" for run in runs),
            )
        yield (
            f"{stored}: leaves with wrong values",
            *(
                wrong(work, program, stored) if run.exit_code == 0 else f"fails: `{last_line(run)}`"
                for program, run in zip(PROGRAMS, runs, strict=True)
            ),
        )
    yield (
        f"a byte of the result is changed, {FLIPS} times: noticed by a load",
        *(noticed_flips(work / f"{program}-bfloat16") for program in PROGRAMS),
    )
    write(work / "other", "bfloat16", seed=1)
    yield "another checkpoint is converted into the same output", *(into_the_same(work, p) for p in PROGRAMS)
    yield "killed halfway, and started again", *(killed(work, program) for program in PROGRAMS)


def command(program: str, source: Path, output: Path) -> list[str]:
    """How a user starts a program."""
    if program == "slicecast":
        program_path = str(Path(sys.executable).with_name("slicecast"))
        words = [program_path, "convert", f"--base_output_directory={output}", f"--host_memory_gb={BUDGET_GB}"]
        return [*words, f"--hf_model_path={source}", f"--model_name={MODEL}", "--simulated_cpu_devices_count=16"]
    return [
        *(str(ROOT / ".venv-maxtext" / "bin" / "python"), "-P", "-m", "maxtext.checkpoint_conversion.to_maxtext"),
        *(f"model_name={MODEL}", f"base_output_directory={output}", "scan_layers=true", "use_multimodal=false"),
        *("hardware=cpu", "skip_jax_distributed_system=true", f"--hf_model_path={source}", "--save_dtype=bfloat16"),
    ]


def convert(program: str, source: Path, output: Path, kill_after: float | None = None) -> Run:
    """Runs a program, and kills it after some seconds if asked to."""
    log = output.with_suffix(".log")
    start = time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(command(program, source, output), stdout=file, stderr=subprocess.STDOUT)
        if kill_after is not None:
            time.sleep(kill_after)
            child.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    return Run(child.returncode, seconds, usage.ru_maxrss << 10, log.read_text(errors="replace"))


def verify(output: Path) -> None:
    """Has slicecast's result verified."""
    program = str(Path(sys.executable).with_name("slicecast"))
    subprocess.run([program, "verify", str(output)], check=True, capture_output=True)


def last_line(run: Run) -> str:
    """The last line that a program said."""
    return run.output.strip().splitlines()[-1].strip()


def arrays(output: Path) -> Mapping[str, np.ndarray]:
    """The weights of a result."""
    opened = orbax_checkpoint.open_tree(epath.Path(output) / "0" / "items").arrays
    return {path: store.read().result() for path, store in opened.items() if path.startswith("params/")}


def wrong(work: Path, program: str, stored: str) -> str:
    """How many leaves of a result differ from slicecast's."""
    expected, found = arrays(work / f"slicecast-{stored}"), arrays(work / f"{program}-{stored}")
    return f"{differing(expected, found)} of {len(expected)}"


def differing(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> int:
    """How many leaves have other bits."""
    assert expected.keys() == found.keys()
    return sum(expected[path].tobytes() != found[path].tobytes() for path in expected)


def noticed_flips(output: Path) -> str:
    """How many changed bytes keep a result from being read, of those that change values."""
    expected = arrays(output)
    file = max((file for file in (output / "0").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    chance = random.Random(0)
    noticed = silent = 0
    for _ in range(FLIPS):
        position = chance.randrange(file.stat().st_size)
        with file.open("r+b") as data:
            data.seek(position)
            (before,) = data.read(1)
            data.seek(position)
            data.write(bytes((before ^ 1 << chance.randrange(8),)))
        try:
            silent += differing(expected, arrays(output)) > 0
        except (OutputError, ValueError):
            noticed += 1
        with file.open("r+b") as data:
            data.seek(position)
            data.write(bytes((before,)))
    return f"{noticed} of {noticed + silent} that change a value"


def into_the_same(work: Path, program: str) -> str:
    """What happens with a finished checkpoint when another one is converted into its output."""
    output = work / f"{program}-bfloat16"
    before = arrays(output)
    run = convert(program, work / "other", output)
    kept = not differing(before, arrays(output))
    state = "the old one is kept" if kept else "it is replaced"
    return f"{state}, exit code {run.exit_code}"


def killed(work: Path, program: str) -> str:
    """How long a second run takes after the first was killed halfway."""
    output = work / f"{program}-killed"
    whole = convert(program, work / "bfloat16", output)
    shutil.rmtree(output)
    convert(program, work / "bfloat16", output, kill_after=whole.seconds / 2)
    again = convert(program, work / "bfloat16", output)
    assert again.exit_code == 0, again.output
    found = re.findall(r"(\d+) waves written, (\d+) had been written before", again.output)
    waves = f", {found[0][1]} of {int(found[0][0]) + int(found[0][1])} waves were there" if found else ""
    return f"{again.seconds:.0f} s of {whole.seconds:.0f} s{waves}"


def write(directory: Path, stored: str, seed: int = 0) -> None:
    """Writes a checkpoint of the model's sizes, in one file."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    published = published_models.load(MODEL)
    config = published.config | ({"quantization_config": ANNOUNCED[stored]} if stored in ANNOUNCED else {})
    (directory / "config.json").write_text(json.dumps(config))
    tensors: list[Tensor] = []
    for name, (_, shape) in published.tensors.items():
        if name == "lm_head.weight" and published.config["tie_word_embeddings"]:
            continue  # It would have to repeat the embedding.
        if stored in ANNOUNCED and name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            rows, columns = shape
            tensors += (
                make_checkpoint.packed(module, rows, columns)
                if stored == "INT4"
                else make_checkpoint.linear(module, config, rows, columns)
            )
        else:
            tensors.append(make_checkpoint.weight(name, *shape))
    pools = make_checkpoint.make_pools(seed)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(make_checkpoint.header(tensors))
        for number, tensor in enumerate(tensors):
            make_checkpoint.write_values(file, tensor, number, pools)


if __name__ == "__main__":
    main()
