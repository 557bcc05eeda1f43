"""Compares what MaxText computes from a converted checkpoint with what transformers computes from its source.

    .venv-maxtext/bin/python -P scripts/verify_logits.py OUT [KEY=VALUE ...]

OUT is what `slicecast convert` was given as `--base_output_directory`. MaxText loads OUT/0/items as its trainer does,
transformers loads the source, both read the same prompts, and their logits are compared. The source, the model and the
layout come from the checkpoint's own metadata; KEY=VALUE are settings of MaxText on top of them. A model with other
sizes than MaxText's needs them there, such as `base_num_decoder_layers=8`.

The two run one after the other on this machine's CPU, each in a process of its own, and in an environment of its own if
there is no torch beside MaxText. scripts/test_maxtext.sh makes `.venv-maxtext`.

Exits with 0 if the logits agree, 1 if they do not, 2 if they could not be compared.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import operator
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from rich import box
from rich.console import Console
from rich.table import Table

from slicecast.configs import maxtext
from slicecast.convert import orbax_checkpoint
from slicecast.convert.errors import OutputError, SlicecastError, UsageError
from slicecast.convert.memory import GB, available_host_bytes
from slicecast.convert.output import open_output
from slicecast.convert.source.checkpoint import Checkpoint, open_checkpoint

_SCRIPTS = Path(__file__).parent

_PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Der schnelle braune Fuchs springt über den faulen Hund. 素早い茶色の狐はのろまな犬を飛び越える。",
)

# A tokenizer has one of these, whatever its kind.
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tiktoken.model", "tekken.json"}

# Without a tokenizer: enough that every token sees others, and a choice of experts is made many times.
_RANDOM_PROMPTS = 3
_RANDOM_TOKENS = 16

_ITEMSIZE = {"float32": 4, "bfloat16": 2}

# What torch or MaxText, compiled programs and activations of short prompts take beside the weights. Measured with
# Qwen3-0.6B: 1.3 GB.
_PROGRAM_BYTES = 2 * GB

# Settings that slicecast records and MaxText has by the same name.
_MAXTEXT_SETTINGS = ("param_scan_axis", "rope_type", "use_multimodal")


@dataclass(frozen=True)
class Bars:
    """What right conversions keep to.

    Attributes:
        kl: The most that the mean KL divergence of a prompt may be, in nats.
        top1: The least part of a prompt's tokens for which both find the same next token the likeliest.
        reason: Why these.
    """

    kl: float
    top1: float
    reason: str


# Rounded even then are queries, whose scale Llama's and Gemma's weights contain in MaxText, and a tied table of
# embeddings. That gives divergences of 1e-6 to 1e-5 in tiny models, and errors grow with depth; mistakes give 1e-2.
_SAME_VALUES = Bars(1e-3, 0.9, "both compute in float32 from the same values")
# MaxText's own checks of its conversions allow a divergence of 0.015 in bfloat16. Near ties fall either way.
_ROUNDED = Bars(1e-2, 0.75, "")


@dataclass(frozen=True)
class Compared:
    """How the logits of one prompt differ. The divergence is of MaxText's next token from transformers', in nats.

    Attributes:
        tokens: How many there are.
        largest: The largest absolute difference of two logits.
        mean: The mean one.
        kl: The mean KL divergence over the tokens.
        largest_kl: That of the worst token.
        top1: The part of the tokens for which both find the same next token the likeliest.
    """

    tokens: int
    largest: float
    mean: float
    kl: float
    largest_kl: float
    top1: float

    def keeps(self, bars: Bars) -> bool:
        """Whether this is no more than what right conversions differ by."""
        return self.kl <= bars.kl and self.top1 >= bars.top1  # False for NaN, too


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        source: The Hugging Face checkpoint.
        settings: MaxText's settings.
        values: How many values the converted checkpoint has.
        leaf_bytes: The largest leaf's size in float32.
        vocabulary: How many rows MaxText's table of embeddings has; None where there is none.
        save_dtype: The converted checkpoint's dtype, if slicecast has written it.
    """

    source: Checkpoint
    settings: Mapping[str, str]
    values: int
    leaf_bytes: int
    vocabulary: int | None
    save_dtype: str | None


def main(words: Sequence[str]) -> int:
    """Compares, prints, and returns the exit code."""
    arguments = parse(words)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what it does not need here.
    try:
        return run(arguments)
    except SlicecastError as error:
        print(f"verify_logits: {error}", file=sys.stderr)
        return 2


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        "verify_logits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="OUT", help="the directory, or gs:// path, of a finished conversion")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="settings of MaxText")
    parser.add_argument("--hf_model_path", help="the source: a directory or a name of the Hub (default: as recorded)")
    parser.add_argument("--revision", help="a branch, tag or commit of the source on the Hub")
    parser.add_argument("--model_name", help="MaxText's name of the model (default: as recorded)")
    parser.add_argument("--dtype", choices=_ITEMSIZE, default="float32", help="in which both compute (%(default)s)")
    parser.add_argument("--prompt", action="append", help="a text to compare for, instead of three built in; repeats")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens where there is no tokenizer (%(default)s)")
    parser.add_argument("--max_kl", type=float, help="a bar of your own for the mean KL divergence of a prompt")
    parser.add_argument("--force", action="store_true", help="go on though memory may not be enough")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--verbose", action="store_true", help="show what transformers and MaxText say")
    parser.add_argument("--transformers_python", help="the Python that has torch and transformers (default: found)")
    parser.add_argument("--maxtext_python", default=sys.executable, help="the Python that has MaxText (default: this)")
    return parser.parse_intermixed_args(words)


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints, and returns 0 if the logits agree and 1 if they do not.

    Raises:
        SlicecastError: If they cannot be compared.
    """
    console = Console(stderr=arguments.json, highlight=False, soft_wrap=True)
    request = make_request(arguments)
    texts = arguments.prompt or list(_PROMPTS)
    if not _TOKENIZERS & request.source.storage.names():
        if arguments.prompt:
            raise UsageError(f"--prompt: {request.source.path} has no tokenizer. Without --prompt, random tokens do.")
        texts = None
        console.print(f"no tokenizer in the source: random tokens, --seed={arguments.seed}")
    check_memory(request, arguments, console)
    ids, expected, found = compute(request, texts, arguments)
    vocabulary = min(expected[0].shape[1], found[0].shape[1])
    compared = [compare(e[:, :vocabulary], f[:, :vocabulary]) for e, f in zip(expected, found, strict=True)]
    bars = choose_bars(request, arguments.dtype)
    if arguments.max_kl is not None:
        bars = dataclasses.replace(bars, kl=arguments.max_kl, reason="--max_kl")
    agree = all(prompt.keeps(bars) for prompt in compared)
    show(console, compared, bars, agree)
    if arguments.json:
        result = {"agree": agree, "bars": dataclasses.asdict(bars), "vocabulary": vocabulary}
        prompts = [
            {"text": texts[number] if texts else None, "ids": ids[number].tolist(), **dataclasses.asdict(prompt)}
            for number, prompt in enumerate(compared)
        ]
        print(json.dumps({**result, "prompts": prompts}, indent=2))
    return 0 if agree else 1


def make_request(arguments: argparse.Namespace) -> Request:
    """What the arguments and the checkpoint's metadata ask for.

    Raises:
        SlicecastError: If something is not given, or not there.
    """
    output = open_output(arguments.output)
    step = orbax_checkpoint.require_finished(output)
    own = orbax_checkpoint.read_own_metadata(step)
    given = dict(_setting(word) for word in arguments.settings)
    model_name = arguments.model_name or own.get("model_name")
    if model_name is None:
        raise UsageError(f"{step}: it is not recorded which model this is. Give --model_name=, MaxText's name of it.")
    if model_name not in maxtext.model_names():
        raise UsageError(f"--model_name={model_name}: MaxText {maxtext.VERSION} has no model of this name.")
    scan_layers = orbax_checkpoint.read_custom_metadata(step).get("scan_layers", given.get("scan_layers"))
    if scan_layers is None:
        raise UsageError(f"{step}: it is not recorded whether layers are scanned. Give scan_layers=true or =false.")
    recorded = own.get("source")
    path = arguments.hf_model_path or recorded
    if path is None:
        raise UsageError(f"{step}: its source is not recorded. Give --hf_model_path=.")
    if arguments.hf_model_path and recorded and recorded.startswith(f"hf://{path.removeprefix('hf://')}@"):
        path = recorded if arguments.revision is None else path  # The commit, wherever its branch is by now.
    source = open_checkpoint(path, arguments.revision)
    if "://" in source.path and not source.path.startswith("hf://"):
        raise UsageError(f"{source.path}: transformers does not read this. Give --hf_model_path=, a copy on a disk.")
    misread = None if arguments.force else _misread(source)
    if misread is not None:
        raise UsageError(
            f"{misread}: it is in FP8 and its last blocks are not whole. transformers dequantizes those wrongly, "
            "so a difference would say nothing. --force goes on all the same."
        )
    arrays = orbax_checkpoint.open_arrays(output)
    if not arrays:
        raise OutputError(f"{step}: the checkpoint is empty.")
    vocabulary = next((a.shape[0] for name, a in arrays.items() if name.endswith("token_embedder/embedding")), None)
    settings = {
        "model_name": model_name,
        "scan_layers": scan_layers,
        "load_parameters_path": step / orbax_checkpoint.ITEM,
        "dtype": arguments.dtype,
        "weight_dtype": arguments.dtype,
        # Its default lets a reader hold 96 GB of a checkpoint at once. One leaf must fit.
        "checkpoint_storage_concurrent_gb": 1 + math.ceil(max(array.size for array in arrays.values()) * 4 / GB),
        **({} if vocabulary is None else {"vocab_size": vocabulary}),
        **{name: own[name] for name in _MAXTEXT_SETTINGS if own.get(name) is not None},
        **given,
    }
    return Request(
        source=source,
        settings={key: str(value) for key, value in settings.items()},
        values=sum(array.size for array in arrays.values()),
        leaf_bytes=max(array.size for array in arrays.values()) * 4,
        vocabulary=vocabulary,
        save_dtype=own.get("save_dtype"),
    )


def _misread(source: Checkpoint) -> str | None:
    """A tensor that transformers would dequantize wrongly, if there is one.

    transformers 5.23 divides a weight's shape by that of its scales, whatever `weight_block_size` says.
    """
    announced = source.config.get("quantization_config") or {}
    block = announced.get("weight_block_size")
    if announced.get("quant_method") != "fp8" or not block:
        return None
    in_fp8 = (t for t in source.tensors.values() if t.dtype.startswith("F8_E4M3") and len(t.shape) == len(block))
    return next((t.name for t in in_fp8 if any(map(operator.mod, t.shape, block))), None)


def _setting(word: str) -> tuple[str, str]:
    key, separator, value = word.partition("=")
    if not separator or not key.isidentifier():
        raise UsageError(f"{word}: MaxText's settings are given as KEY=VALUE.")
    return key, value


def needed_bytes(request: Request, dtype: str) -> int:
    """The most memory that is needed at a time: that of transformers, or that of MaxText."""
    itemsize = _ITEMSIZE[dtype]
    # A quantized source has fewer elements than values; one with a vision tower that is left out has more.
    elements = max(request.values, sum(math.prod(tensor.shape) for tensor in request.source.tensors.values()))
    # XLA puts the axis of scanned layers first, in a copy; transformers has a weight dequantized, and then cast.
    copies = 2 if request.settings["scan_layers"].lower() == "true" else 1
    in_transformers = elements * itemsize * (2 if is_quantized(request.source) else 1)
    return max(in_transformers, request.values * itemsize * copies + request.leaf_bytes) + _PROGRAM_BYTES


def is_quantized(source: Checkpoint) -> bool:
    """Whether transformers has to dequantize the source."""
    return "quantization_config" in source.config or bool(source.side_configs)


def check_memory(request: Request, arguments: argparse.Namespace, console: Console) -> None:
    """Says how much memory will be needed.

    Raises:
        UsageError: If there is less, unless `--force` is given.
    """
    needed, available = needed_bytes(request, arguments.dtype), available_host_bytes()
    console.print(
        f"{request.values:,} values in {arguments.dtype}: about {needed / GB:.1f} GB of memory will be "
        f"needed, {available / GB:.1f} GB are free"
    )
    if needed > available and not arguments.force:
        narrower = " --dtype=bfloat16 takes half." if arguments.dtype == "float32" else ""
        raise UsageError(f"memory will not be enough.{narrower} --force goes on all the same.")


def compute(
    request: Request, texts: Sequence[str] | None, arguments: argparse.Namespace
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The ids of each prompt, its logits from transformers, and those from MaxText.

    Raises:
        UsageError: If one of the two does not come to an end.
    """
    path, _, commit = request.source.path.removeprefix("hf://").partition("@")
    if not request.source.path.startswith("hf://"):
        path, commit = os.path.abspath(request.source.path), ""
    wanted = {
        "path": path,
        "revision": commit or None,
        "dtype": arguments.dtype,
        "texts": texts,
        "random": {
            "prompts": _RANDOM_PROMPTS,
            "tokens": _RANDOM_TOKENS,
            "seed": arguments.seed,
            "below": request.vocabulary or sys.maxsize,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("transformers.json", "expected.npz", "maxtext.json", "found.npz")]
        # MaxText writes its logs somewhere.
        settings = {"base_output_directory": folder, "jax_cache_dir": "", **request.settings}
        files[0].write_text(json.dumps(wanted))
        files[2].write_text(json.dumps(settings))
        python = arguments.transformers_python or _python_with_torch()
        _start("transformers", python, files[:2], verbose=arguments.verbose)
        _start("maxtext", arguments.maxtext_python, [files[2], files[1], files[3]], verbose=arguments.verbose)
        with np.load(files[1]) as expected, np.load(files[3]) as found:
            numbers = range(len(found))
            ids = [expected[f"ids_{number}"] for number in numbers]
            left, right = ([file[f"logits_{number}"] for number in numbers] for file in (expected, found))
            return ids, left, right


def _python_with_torch() -> str:
    if importlib.util.find_spec("torch"):
        return sys.executable
    tests = _SCRIPTS.parent / ".venv" / "bin" / "python"
    if not tests.exists():
        raise UsageError("there is no torch here. Give --transformers_python=, the Python of an environment with it.")
    return str(tests)


def _start(program: str, python: str, files: Sequence[Path], *, verbose: bool) -> None:
    """Runs one of the two programs to its end."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [python, "-P", str(_SCRIPTS / f"{program}_logits.py"), *map(str, files)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UsageError(f"{python} cannot be started: {error.strerror}.") from error
    if verbose:
        print(done.stdout, done.stderr, sep="", file=sys.stderr)
    if done.returncode < 0:
        raise UsageError(f"{program} was killed by signal {-done.returncode}: memory may not have been enough.")
    if done.returncode:
        raise UsageError(f"{program} does not compute this model: {_cause(done.stderr)}\n--verbose shows more.")


def _cause(stderr: str) -> str:
    """What the last exception of a traceback says, without the calls that led to it."""
    _, _, last = stderr.rstrip().rpartition("Traceback (most recent call last):")
    lines = [line for line in last.splitlines() if line and not line.startswith(" ")]
    return "\n".join(lines[:10]) or "it does not say why"


def compare(expected: np.ndarray, found: np.ndarray) -> Compared:
    """How MaxText's logits of one prompt differ from transformers', both `[tokens, vocabulary]`."""
    difference = np.abs(expected.astype(np.float64) - found)
    right, other = _log_softmax(expected), _log_softmax(found)
    divergence = (np.exp(right) * (right - other)).sum(-1)
    return Compared(
        tokens=len(expected),
        largest=float(difference.max()),
        mean=float(difference.mean()),
        kl=float(divergence.mean()),
        largest_kl=float(divergence.max()),
        top1=float((expected.argmax(-1) == found.argmax(-1)).mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def choose_bars(request: Request, dtype: str) -> Bars:
    """The bars for what the two compute with."""
    weights = {tensor.dtype for tensor in request.source.tensors.values() if len(tensor.shape) > 1}
    if is_quantized(request.source):
        reason = "transformers dequantizes by itself, and rounds where it likes"
    elif dtype != "float32":
        reason = f"both compute in {dtype}"
    elif request.save_dtype != "float32" and weights != {"BF16"}:
        reason = f"the source's weights ({', '.join(sorted(weights))}) were rounded to {request.save_dtype}"
    else:
        return _SAME_VALUES
    return dataclasses.replace(_ROUNDED, reason=reason)


def show(console: Console, compared: Sequence[Compared], bars: Bars, agree: bool) -> None:
    """Prints the table and the verdict."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("prompt", "tokens", "largest diff", "mean diff", "mean KL", "largest KL", "top-1", "verdict"):
        table.add_column(title, justify="right")
    for number, prompt in enumerate(compared, 1):
        figures = (f"{x:.1e}" for x in (prompt.largest, prompt.mean, prompt.kl, prompt.largest_kl))
        verdict = "agrees" if prompt.keeps(bars) else "DIFFERS"
        table.add_row(str(number), str(prompt.tokens), *figures, f"{prompt.top1:.0%}", verdict)
    console.print(table)
    console.print(f"bars: mean KL at most {bars.kl:g}, top-1 at least {bars.top1:.0%}, for {bars.reason}")
    console.print("MaxText and transformers agree" if agree else "MaxText and transformers DIFFER")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
