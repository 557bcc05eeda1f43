"""The command line.

Flags carry MaxText's names, and MaxText's `key=value` spelling works too, so that a user of its converter swaps the
program and keeps the rest of the command.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

import jax
from absl import app, flags, logging
from absl.flags import argparse_flags
from rich.console import Console

from slicecast.convert import hosts, interruption
from slicecast.convert.errors import SlicecastError, StoppedError, UsageError
from slicecast.convert.settings import Settings

if TYPE_CHECKING:
    from slicecast.convert.conversion import Done
    from slicecast.convert.plan import Plan

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
  slicecast verify /data/kimi --hf_model_path=/data/Kimi-K2.6
  slicecast verify /data/kimi --hf_model_path=/data/Kimi-K2.6 --requantize""",
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


def run() -> None:
    """The entry point of `slicecast`."""
    try:
        app.run(main, flags_parser=_parse_for_absl)
    except UsageError as error:
        _print(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # Whoever read our output, such as `head`, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse_for_absl(argv: Sequence[str]) -> argparse.Namespace:
    flags.FLAGS(argv[:1])  # The flags that libraries define keep their defaults.
    return parse(argv[1:])


def main(arguments: argparse.Namespace) -> int:
    """Carries out a parsed command line; returns the exit code."""
    # Orbax reports its routine, and logs a stack trace for errors that it also raises, which we report ourselves.
    logging.set_verbosity(logging.FATAL)
    try:
        _use_token(getattr(arguments, "hf_access_token", None))
        _start_jax(arguments)
        return {"convert": _convert, "plan": _plan, "verify": _verify, "formats": _formats, "families": _families}[
            arguments.command
        ](arguments)
    except (KeyboardInterrupt, StoppedError) as error:
        stopped = error if isinstance(error, StoppedError) else StoppedError("interrupted")
        print(f"slicecast: {stopped}; run the same command again to go on.", file=sys.stderr)
        exit_code = stopped.exit_code
    except SlicecastError as error:
        _print(error)
        exit_code = error.exit_code
    if arguments.command == "convert" and jax.process_count() > 1:
        hosts.end_alone(exit_code)
    return exit_code


def _convert(arguments: argparse.Namespace) -> int:
    from slicecast.convert import conversion, describe

    console = Console(stderr=True, quiet=arguments.log_json)

    def echo(event: Mapping[str, Any]) -> None:
        if arguments.log_json:
            print(json.dumps(event), file=sys.stderr, flush=True)

    def show_plan(plan: "Plan") -> None:
        describe.show(plan, console)
        echo({"event": "plan", **describe.as_json(plan)})

    done = conversion.convert(_settings(arguments), console, describe=show_plan, echo=echo)
    if jax.process_index() == 0:
        echo({"event": "done", **dataclasses.asdict(done)})
        console.print(_last_line(done), highlight=False, soft_wrap=True)
        # MaxText does not read from the Hub, so there it is no path to load.
        print(done.items if done.items.startswith("hf://") else f"load_parameters_path={done.items}")
    return 0


def _last_line(done: "Done") -> str:
    if not done.waves:
        return f"done in {done.seconds:.1f} s: the checkpoint was finished before"
    return (
        f"done in {done.seconds:.1f} s: {done.waves - done.resumed} waves written, {done.resumed} had been written "
        f"before; read {done.in_bytes / 1e9:.2f} GB in {done.requests} requests; peak memory "
        f"{done.peak_bytes / 1e9:.2f} GB"
    )


def _plan(arguments: argparse.Namespace) -> int:
    from slicecast.convert import commands, describe

    settings = _settings(arguments)
    plan = commands.make_plan(settings, commands.machine_for_planning(settings))
    if arguments.json:
        print(json.dumps(describe.as_json(plan), indent=2))
    else:
        describe.show(plan, Console())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from slicecast.convert import commands
    from slicecast.convert.output import open_output

    console = Console(stderr=True)
    output = open_output(arguments.output)
    settings = commands.settings_of(output, arguments.hf_model_path, arguments.revision)
    lines = commands.verify_checkpoint(settings, arguments.host_memory_gb, console, requantize_too=arguments.requantize)
    for line in lines:
        print(line)
    return 0


def _formats(arguments: argparse.Namespace) -> int:
    from slicecast.convert import describe

    print(describe.formats_as_json() if arguments.json else describe.formats_as_table())
    return 0


def _families(arguments: argparse.Namespace) -> int:
    from slicecast.configs import maxtext
    from slicecast.convert import describe

    version = arguments.maxtext_version or maxtext.VERSION
    if arguments.json:
        print(json.dumps(describe.families_as_records(version), indent=2))
    else:
        print(describe.families_as_table(version))
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    known = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in vars(arguments).items() if name in known})


def _use_token(given: str | None) -> None:
    """Puts the token where `huggingface_hub` looks for it."""
    token = given or os.environ.get("HF_TOKEN") or os.environ.get("HF_AUTH_TOKEN")
    if token:
        os.environ["HF_TOKEN"] = token


def _start_jax(arguments: argparse.Namespace) -> None:
    """Chooses the platform and joins the other processes, before JAX is used."""
    simulated = getattr(arguments, "simulated_cpu_devices_count", None)
    if simulated is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated)
    if arguments.command in ("verify", "formats", "families") or getattr(arguments, "slice", None) is not None:
        # Nothing is computed on devices, so none need be taken from another program.
        jax.config.update("jax_platforms", "cpu")
    if arguments.command == "convert":
        hosts.initialize(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
        interruption.end_on_sigterm()


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


def _print(error: SlicecastError) -> None:
    lines = str(error).splitlines() or [type(error).__name__]
    print(f"slicecast: {type(error).__name__}: {lines[0]}", file=sys.stderr)
    for line in lines[1:]:
        print(f"  {line}", file=sys.stderr)


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
    convert.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="where process 0 listens; found by JAX on TPUs"
    )
    convert.add_argument(
        "--num_processes", metavar="N", type=_count, help="how many processes convert; found by JAX on TPUs"
    )
    convert.add_argument("--process_id", metavar="I", type=int, help="which of them this is; found by JAX on TPUs")

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
    _add_source_flags(verify)
    verify.add_argument("--host_memory_gb", metavar="GB", type=_positive, help="memory to use, in GB")
    verify.add_argument(
        "--requantize", action="store_true",
        help="quantize INT4 weights again, compare codes and scales; for releases trained as INT4, such as Kimi-K2.6",
    )  # fmt: skip

    formats = _command(commands, "formats", "list the formats of weights that convert")
    formats.add_argument("--json", action="store_true", help="print JSON")

    families = _command(commands, "families", "list the model families that convert, and how each was checked")
    families.add_argument("--json", action="store_true", help="print JSON")
    families.add_argument("--maxtext_version", metavar="VERSION", help="the MaxText release whose models are listed")
    return parser, {"convert": convert, "plan": plan, "verify": verify, "formats": formats, "families": families}


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


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host_memory_gb", metavar="GB", type=_positive,
        help="bytes in flight on each host at most, in GB (default: three quarters of the free memory)",
    )  # fmt: skip
    parser.add_argument(
        "--device_memory_gb", metavar="GB", type=_positive,
        help="memory of each chip to use at most, in GB (default: three quarters of it)",
    )  # fmt: skip


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
