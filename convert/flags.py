"""The flags of the command line, and how they are read.

Flags carry MaxText's names, and MaxText's `key=value` spelling works too, so that a user of its converter swaps the
program and keeps the rest of the command.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from absl.flags import argparse_flags

from slicecast.convert import sharding
from slicecast.convert.errors import UsageError

# Words of MaxText's commands that change nothing here, and why.
_WITHOUT_EFFECT = {
    "lazy_load_tensors": "weights are always streamed",
    "eager_load_method": "weights are always streamed",
    "hardware": "the devices that JAX finds are used; set JAX_PLATFORMS to choose others",
    "skip_jax_distributed_system": "other hosts are found by JAX, or given with --coordinator_address",
}

_DESCRIPTION = "Turns Hugging Face checkpoints into sharded Orbax checkpoints that MaxText loads."

_EXAMPLES = {
    "convert": """examples:
  slicecast convert --hf_model_path=/data/Kimi-K2.6 --base_output_directory=/data/kimi --model_name=kimi-k2-1t
  slicecast convert hf_model_path=/data/Llama-3.1-8B base_output_directory=/data/llama scan_layers=false
  slicecast convert --hf_model_path=moonshotai/Kimi-K2.6 --base_output_directory=gs://bucket/kimi
  slicecast convert --hf_model_path=IN --base_output_directory=OUT --simulated_cpu_devices_count=8 --host_memory_gb=16

Run the same command again to go on after an interruption. MaxText loads OUT/0/items.""",
    "plan": """examples:
  slicecast plan --hf_model_path=/data/Kimi-K2.6 --slice=v5e-16
  slicecast plan --hf_model_path=/data/Kimi-K2.6 --host_memory_gb=96 --json""",
    "verify": """examples:
  slicecast verify /data/kimi
  slicecast verify /data/kimi --hf_model_path=/data/Kimi-K2.6 --requantize
  slicecast verify gs://bucket/kimi --sample
  slicecast verify gs://bucket/kimi --digests --json

The exit code is 0 if all is right, and 1 if something differs.""",
    "report": """examples:
  slicecast report /data/kimi
  slicecast report gs://bucket/kimi --html=kimi.html""",
    "inspect": """examples:
  slicecast inspect moonshotai/Kimi-K2.6
  slicecast inspect gs://bucket/kimi --all
  slicecast inspect --diff /data/kimi-a /data/kimi-b --json

The exit code of --diff is 0 if there is no difference, 1 if there is one, and 2 if they cannot be compared.""",
    "families": """examples:
  slicecast families
  slicecast families --json""",
    "formats": """examples:
  slicecast formats
  slicecast formats --json""",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line.

    Raises:
        UsageError: If a word or a value is not understood.
    """
    parser, commands = _parser()
    parsed, unknown = parser.parse_known_args(_as_flags(arguments))  # type: ignore[no-untyped-call]
    if unknown:
        known = re.findall(r"--(\w+)", commands[parsed.command].format_help())
        raise UsageError("; ".join(_unknown(word, known, parsed.command) for word in unknown))
    result: argparse.Namespace = parsed
    return result


def _unknown(word: str, known: Sequence[str], command: str) -> str:
    close = difflib.get_close_matches(word.lstrip("-").partition("=")[0], known, n=1)
    hint = f"; did you mean --{close[0]}?" if close else f"; see slicecast {command} --help"
    return f"'{word}' is not understood{hint}"


def _as_flags(arguments: Sequence[str]) -> list[str]:
    """Turns MaxText's `key=value` words into flags; drops the words that change nothing, with a line that says so."""
    words = []
    skip_value = False
    for position, word in enumerate(arguments):
        if skip_value:
            skip_value = False
            continue
        if word.endswith((".yml", ".yaml")) and not word.startswith("-") and "=" not in word:
            _note(f"{word}: ignored; slicecast needs no config file")
            continue
        key, equals, _ = word.lstrip("-").partition("=")
        if key in _WITHOUT_EFFECT:
            _note(f"{word}: ignored; {_WITHOUT_EFFECT[key]}")
            following = arguments[position + 1 : position + 2]
            skip_value = not equals and bool(following) and not following[0].startswith("-") and "=" not in following[0]
            continue
        is_pair = bool(equals) and not word.startswith("-") and key.isidentifier()
        words.append(f"--{word}" if is_pair else word)
    return words


def _note(text: str) -> None:
    print(f"slicecast: {text}", file=sys.stderr)


class _Parser(argparse_flags.ArgumentParser):
    """A parser that reports mistakes as `UsageError`, with a suggestion."""

    def __init__(self, **kwargs: Any):
        # Only our own flags: those that libraries define for themselves would drown them in the help.
        super().__init__(inherited_absl_flags=None, allow_abbrev=False, **kwargs)  # type: ignore[no-untyped-call]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the subcommands by name."""
    parser = _Parser(prog="slicecast", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"slicecast {metadata.version('slicecast')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    convert = _command(commands, "convert", "convert a checkpoint, or go on converting it")
    _add_model_flags(convert)
    convert.add_argument(
        "--base_output_directory", metavar="DIR", required=True,
        help="the result goes to DIR/0/items: a directory, gs://bucket/path, or hf://org/name",
    )  # fmt: skip
    convert.add_argument(
        "--staging_directory", metavar="DIR",
        help="where a checkpoint for hf:// is converted before it is uploaded (default: ~/.cache/slicecast/org/name)",
    )  # fmt: skip
    convert.add_argument(
        "--overwrite", action="store_true",
        help="remove another checkpoint that is in DIR, finished or not; make sure that no other run writes there",
    )  # fmt: skip
    convert.add_argument("--log_json", action="store_true", help="print events as JSON, one a line, on every host")
    _add_memory_flags(convert)
    _add_device_flags(convert)
    _add_process_flags(convert)

    plan = _command(commands, "plan", "show what convert would do; reads headers only, writes nothing")
    _add_model_flags(plan)
    plan.add_argument(
        "--base_output_directory", metavar="DIR", help="accepted so that a convert command can be planned"
    )
    _add_memory_flags(plan)
    _add_device_flags(plan)
    plan.add_argument("--slice", metavar="NAME", help="plan for a TPU slice, for example v5e-16")
    plan.add_argument("--hosts", metavar="N", type=_count, help="plan for this many hosts")
    plan.add_argument("--json", action="store_true", help="print JSON")

    verify = _command(commands, "verify", "compare a finished checkpoint with its source, bit for bit")
    verify.add_argument("output", metavar="OUT", help="the --base_output_directory of the conversion")
    verify.add_argument(
        "--hf_model_path", metavar="SOURCE",
        help="the Hugging Face checkpoint, as for convert (default: the one that it was converted from)",
    )  # fmt: skip
    _add_hub_flags(verify)
    strength = verify.add_mutually_exclusive_group()
    strength.add_argument(
        "--sample", metavar="N", type=_count, nargs="?", const=0,
        help="compare N regions of each leaf, drawn at random (default: 32), and not every value",
    )  # fmt: skip
    strength.add_argument(
        "--digests", action="store_true",
        help="read every value, and compare the leaves with the digests in slicecast-summary.json: needs no source",
    )  # fmt: skip
    verify.add_argument("--seed", metavar="S", type=int, help="what --sample draws from, to compare the same again")
    verify.add_argument(
        "--host_memory_gb", metavar="GB", type=_positive,
        help="memory to use on each host, in GB (default: three quarters of what is free)",
    )  # fmt: skip
    verify.add_argument(
        "--requantize", action="store_true",
        help="quantize INT4 weights again, compare codes and scales; for releases trained as INT4, such as Kimi-K2.6",
    )  # fmt: skip
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_process_flags(verify)

    report = _command(commands, "report", "write a page about a conversion, finished or not: what it did, and how")
    report.add_argument("output", metavar="OUT", help="the --base_output_directory of the conversion")
    report.add_argument("--html", metavar="FILE", help="where the page goes (default: OUT/slicecast-report.html)")

    inspect = _command(commands, "inspect", "show what a checkpoint holds; reads headers and metadata only")
    inspect.add_argument(
        "path", metavar="PATH", nargs="?",
        help="a Hugging Face checkpoint: a directory, gs://, https://, or org/name on the Hub; or one of Orbax: OUT, "
        "OUT/0 or OUT/0/items, in a directory or gs://",
    )  # fmt: skip
    inspect.add_argument(
        "--diff", metavar=("A", "B"), nargs=2,
        help="name every difference between two Hugging Face checkpoints, or between two of Orbax; the exit code is 0 "
        "if there is none, 1 if there is one; on the Hub hf://org/name@REV is a revision",
    )  # fmt: skip
    inspect.add_argument("--all", action="store_true", help="a line for each tensor, also where layers are alike")
    inspect.add_argument("--json", action="store_true", help="print JSON, which has everything")
    _add_hub_flags(inspect)

    formats = _command(commands, "formats", "list the formats of weights that convert")
    formats.add_argument("--json", action="store_true", help="print JSON")

    families = _command(commands, "families", "list the model families that convert, and how each was checked")
    families.add_argument("--json", action="store_true", help="print JSON")
    families.add_argument("--maxtext_version", metavar="VERSION", help="the MaxText release whose models are listed")
    return parser, {
        "convert": convert,
        "plan": plan,
        "verify": verify,
        "report": report,
        "inspect": inspect,
        "formats": formats,
        "families": families,
    }


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary.capitalize() + ".",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf_model_path", metavar="SOURCE", required=True,
        help="the Hugging Face checkpoint: a directory, gs:// or https://, or org/name on the Hub",
    )  # fmt: skip
    _add_hub_flags(parser)


def _add_hub_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument(
        "--hf_access_token", metavar="TOKEN",
        help="for the Hub (default: HF_TOKEN, HF_AUTH_TOKEN, or the token of `hf auth login`)",
    )  # fmt: skip


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    _add_source_flags(parser)
    _add_boolean(
        parser, "--scan_layers", True,
        "stack the layers into one leaf, as MaxText does by default (default: true)",
    )  # fmt: skip
    parser.add_argument(
        "--param_scan_axis", metavar="AXIS", type=int, choices=(0, 1), default=1,
        help="where the layer axis stands in a stacked leaf (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--save_dtype", choices=("bfloat16", "float32", "float8_e4m3fn"), default="bfloat16",
        help="the dtype of the weights (default: bfloat16); a few small leaves are always float32, see docs/dtypes.md; "
        "float8_e4m3fn keeps FP8 weights and their scales as they are, for MaxText's *-fp8 models",
    )  # fmt: skip
    _add_boolean(
        parser, "--checkpoint_storage_use_ocdbt", True,
        "store chunks in a database (default: true); false, for Pathways, stores each as a file",
    )  # fmt: skip
    _add_boolean(
        parser, "--checkpoint_storage_use_zarr3", True,
        "store arrays as zarr3 (default: true); false is zarr 2, which has no checksums",
    )  # fmt: skip
    parser.add_argument("--model_name", metavar="NAME", help="MaxText's name of the model, to check the result against")
    parser.add_argument(
        "--rope_type",
        choices=("default", "llama3.1", "yarn"),
        help="MaxText's rope_type, if you will run the model with another one",
    )
    parser.add_argument(
        "--maxtext_version", metavar="VERSION",
        help="the MaxText release that will load the result (default: the newest known one)",
    )  # fmt: skip
    _add_boolean(
        parser, "--enable_mtp", False,
        "convert the layers for multi-token prediction too, for MaxText's mtp_num_layers",
    )  # fmt: skip
    _add_boolean(
        parser, "--use_multimodal", None,
        "convert vision and audio encoders too, or not (default: as MaxText's model does)",
    )  # fmt: skip
    parser.add_argument(
        "--vocab_size", metavar="N", type=_count,
        help="MaxText's vocab_size: rows of zeros are added to the embedding, or its last rows are left out",
    )  # fmt: skip
    parser.add_argument(
        "--ignore_extra", metavar="REGEX", type=_pattern,
        help="leave out tensors that the model has no place for, if REGEX matches their whole name",
    )  # fmt: skip
    _add_boolean(
        parser, "--override_model_config", False,
        "let the model's sizes differ from those that MaxText has for --model_name",
    )  # fmt: skip
    _add_parallelism_flags(parser)


def _add_parallelism_flags(parser: argparse.ArgumentParser) -> None:
    """MaxText's flags for the sizes of a mesh; those that few use are not in the help."""
    group = parser.add_argument_group(
        "the mesh that will load the result",
        "Chunks are cut for it (default: for most meshes). MaxText's other --ici_*_parallelism and --dcn_*_parallelism "
        "are understood too; see docs/loading.md.",
    )
    shown = ("ici_fsdp_parallelism", "ici_expert_parallelism", "ici_tensor_parallelism")
    for flag, axis in sharding.flags().items():
        group.add_argument(
            f"--{flag}", metavar="N", action=_Parallelism, default=argparse.SUPPRESS,
            # Copies of the weights change nothing, however many there are.
            type=int if axis in ("data", "diloco") else _axis_size,
            help=f"the size of the axis {axis}" if flag in shown else argparse.SUPPRESS,
        )  # fmt: skip


class _Parallelism(argparse.Action):
    """Gathers the flags of a mesh under one name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.parallelism = {**(getattr(namespace, "parallelism", None) or {}), self.dest: values}


def _axis_size(text: str) -> int:
    if text == "-1":
        raise argparse.ArgumentTypeError("-1 is what the other axes leave of the chips; give the number itself")
    return _count(text)


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host_memory_gb", metavar="GB", type=_positive,
        help="bytes in flight on each host at most, in GB (default: three quarters of the free memory)",
    )  # fmt: skip
    parser.add_argument(
        "--device_memory_gb", metavar="GB", type=_positive,
        help="memory of each chip to use at most, in GB (default: three quarters of it)",
    )  # fmt: skip


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    found = "; convert finds it by itself on TPUs"
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help=f"where process 0 listens{found}")
    parser.add_argument("--num_processes", metavar="N", type=_count, help=f"how many processes work together{found}")
    parser.add_argument("--process_id", metavar="I", type=int, help=f"which of them this is{found}")


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--simulated_cpu_devices_count", metavar="N", type=_count,
        help="run on the CPU, as this many devices (default: the devices that JAX finds)",
    )  # fmt: skip


def _add_boolean(parser: argparse.ArgumentParser, name: str, default: bool | None, help: str) -> None:
    """A flag that is given alone, or with one of MaxText's spellings of a truth value."""
    parser.add_argument(name, metavar="BOOL", type=_boolean, nargs="?", const=True, default=default, help=help)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return values[text.lower()]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from None
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above zero")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above zero")
    return value
