"""The commands, from parsed flags (`flags.py`) to what is printed and the exit code."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from absl import app, flags, logging
from rich.console import Console

from slicecast.convert import hosts, interruption
from slicecast.convert.errors import SlicecastError, StoppedError, UsageError, VerificationError
from slicecast.convert.flags import parse
from slicecast.convert.settings import Settings

if TYPE_CHECKING:
    from slicecast.convert.conversion import Done
    from slicecast.convert.plan import Plan

# Commands that several processes carry out together.
_ON_SEVERAL_HOSTS = ("convert", "verify")


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
        return {
            "convert": _convert,
            "plan": _plan,
            "verify": _verify,
            "report": _report,
            "inspect": _inspect,
            "formats": _formats,
            "families": _families,
        }[arguments.command](arguments)
    except (KeyboardInterrupt, StoppedError) as error:
        stopped = error if isinstance(error, StoppedError) else StoppedError("interrupted")
        print(f"slicecast: {stopped}; run the same command again to go on.", file=sys.stderr)
        exit_code = stopped.exit_code
    except SlicecastError as error:
        _print(error)
        exit_code = error.exit_code
    if arguments.command in _ON_SEVERAL_HOSTS and jax.process_count() > 1:
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
    from slicecast.convert.verification import sampling, strengths

    if arguments.digests and (arguments.requantize or arguments.hf_model_path is not None):
        raise UsageError("--digests needs no source: leave --hf_model_path and --requantize out, or --digests.")
    if arguments.seed is not None and arguments.sample is None:
        raise UsageError("--seed is for --sample.")
    sample = strengths.SAMPLE if arguments.sample is not None else strengths.FULL
    request = strengths.Request(
        output=arguments.output,
        strength=strengths.DIGESTS if arguments.digests else sample,
        hf_model_path=arguments.hf_model_path,
        revision=arguments.revision,
        host_memory_gb=arguments.host_memory_gb,
        regions=arguments.sample or sampling.DEFAULT_REGIONS,
        seed=arguments.seed,
        requantize=arguments.requantize,
    )
    first = jax.process_index() == 0
    with _libraries_write_to_stderr():
        found = strengths.verify_checkpoint(request, Console(stderr=True, quiet=not first))
    if first and arguments.json:
        print(json.dumps({"output": arguments.output, **dataclasses.asdict(found)}, indent=2))
    elif first and found.right:
        print("\n".join(found.right))
    if first and found.wrong:
        # Not raised: that would end this process before the others.
        _print(VerificationError(strengths.describe(arguments.output, found)))
    return VerificationError.exit_code if found.wrong else 0


@contextlib.contextmanager
def _libraries_write_to_stderr() -> Iterator[None]:
    """Keeps apart what we print and the lines with which Gloo greets other processes on the standard output."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def _report(arguments: argparse.Namespace) -> int:
    from slicecast.convert.output import open_output
    from slicecast.convert.report import files

    print(files.write_report(open_output(arguments.output), arguments.html))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from slicecast.convert.inspection import contents, difference, show

    if (arguments.path is None) == (arguments.diff is None):
        raise UsageError("inspect takes either PATH or --diff A B.")
    if arguments.path is not None:
        found = contents.read(arguments.path, arguments.revision)
        _show(contents.as_json(found) if arguments.json else show.lines(found, unfolded=arguments.all))
        return 0
    try:
        comparison = difference.compare(*(contents.read(path, arguments.revision) for path in arguments.diff))
    except SlicecastError as error:
        _print(error)
        return UsageError.exit_code  # Not that of a difference.
    _show(
        difference.as_json(comparison) if arguments.json else show.comparison_lines(comparison, unfolded=arguments.all)
    )
    return 1 if comparison.differences else 0


def _show(content: Mapping[str, Any] | Iterable[str]) -> None:
    """Prints JSON, or lines."""
    print(json.dumps(content, indent=2) if isinstance(content, Mapping) else "\n".join(content))


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
    if (
        arguments.command in ("verify", "report", "inspect", "formats", "families")
        or getattr(arguments, "slice", None) is not None
    ):
        # Nothing is computed on devices, so none need be taken from another program.
        jax.config.update("jax_platforms", "cpu")
    if arguments.command in _ON_SEVERAL_HOSTS:
        hosts.initialize(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
        interruption.end_on_sigterm()


def _print(error: SlicecastError) -> None:
    lines = str(error).splitlines() or [type(error).__name__]
    print(f"slicecast: {type(error).__name__}: {lines[0]}", file=sys.stderr)
    for line in lines[1:]:
        print(f"  {line}", file=sys.stderr)
