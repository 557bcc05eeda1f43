"""What `convert` does, on every process: plan, agree, claim the output, run, commit, summarize."""

import contextlib
import dataclasses
import hashlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from rich.console import Console

from slicecast.convert import copies, hosts, orbax_checkpoint
from slicecast.convert.chunk_store import ChunkFormat, ChunkWriter, files
from slicecast.convert.commands import RECORDED, make_plan, this_machine
from slicecast.convert.device import choose_implementation
from slicecast.convert.errors import OutputError, StorageError, UsageError
from slicecast.convert.interruption import stopping
from slicecast.convert.output import LOG_DIRECTORY, SUMMARY_FILE, Ownership, begin, open_output, release
from slicecast.convert.pipeline import Pipeline, WaveReport, array_spec
from slicecast.convert.plan import Plan
from slicecast.convert.progress import HostProgress, ProgressDisplay, peak_resident_bytes, resident_bytes
from slicecast.convert.run_log import SECONDS_BETWEEN_PARTS, Event, LogReader, RunLog
from slicecast.convert.settings import Settings
from slicecast.convert.source.checkpoint import sample_contents
from slicecast.convert.summary import encode, facts, summarize, versions

if TYPE_CHECKING:
    from slicecast.convert.upload import HubOutput, UploadProgress

# What MaxText loads, below the output.
_ITEMS = f"{orbax_checkpoint.STEP}/{orbax_checkpoint.ITEM}"

# What stands before the name of a repository of the Hub.
_HUB = "hf://"


@dataclass(frozen=True)
class Done:
    """What a conversion did, on this process.

    Attributes:
        items: The directory to give to MaxText as `load_parameters_path`; on the Hub, where it is downloaded to.
        waves: How many waves the process had; 0 if the checkpoint was there already.
        resumed: How many of them an earlier run had finished.
        in_bytes: Source bytes read.
        requests: Read requests.
        seconds: Time taken.
        peak_bytes: The most memory that the process held.
    """

    items: str
    waves: int = 0
    resumed: int = 0
    in_bytes: int = 0
    requests: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def convert(
    settings: Settings, console: Console, *, describe: Callable[[Plan], None], echo: Callable[[Event], None]
) -> Done:
    """Converts a checkpoint; called by all processes.

    Args:
        settings: What the user asked for.
        console: Where process 0 shows what happens.
        describe: Called with the plan on process 0, before anything is written.
        echo: Called with each event of this process.

    Raises:
        SlicecastError: If something keeps the checkpoint from being converted, or from being finished.
    """
    start = time.monotonic()
    if settings.base_output_directory is None:
        raise OutputError("convert needs --base_output_directory.")
    hub = _open_hub_output(settings) if settings.base_output_directory.startswith(_HUB) else None
    output = epath.Path(hub.staging) if hub else open_output(settings.base_output_directory)
    made = make_plan(settings, hosts.smallest(this_machine(settings)))
    chunk_format = ChunkFormat(settings.checkpoint_storage_use_ocdbt, settings.checkpoint_storage_use_zarr3)
    agreed = {
        "version of slicecast": versions()["slicecast"],
        "source": made.checkpoint.path,
        "plan": made.digest,
        "format": str(chunk_format),
        "sample of the source's bytes": sample_contents(made.checkpoint),
    }
    # The path does not count: another copy of the same source gives the same chunks.
    identity = [value for name, value in agreed.items() if name != "source"]
    digest = hashlib.sha256(" ".join(identity).encode()).hexdigest()
    hosts.check_agreement(agreed)
    copies.check(made)
    if hub:
        count = 0 if chunk_format.ocdbt else sum(planned.chunk_count for planned in made.leaves)
        if hub.begin(digest, files=count, overwrite=settings.overwrite):
            return Done(items=f"{_HUB}{hub.name}/{_ITEMS}", seconds=time.monotonic() - start)
    hosts.check_shared(output)
    run = hosts.on_first(
        lambda: begin(output, digest, overwrite=settings.overwrite, ocdbt=settings.checkpoint_storage_use_ocdbt)
    )
    if jax.process_index() == 0:
        describe(made)
    conversion = _Conversion(settings, made, output, chunk_format, digest)
    done = conversion.run(run, console, echo) if run else Done(items=conversion.items)
    hosts.on_first(lambda: conversion.summarize(run))
    if hub:
        _upload(hub, settings, console, echo)
        done = dataclasses.replace(done, items=f"{_HUB}{hub.name}/{_ITEMS}")
    return dataclasses.replace(done, seconds=time.monotonic() - start)


def _open_hub_output(settings: Settings) -> "HubOutput":
    # Imported here, so that a conversion to anywhere else does not load the Hub's library.
    from slicecast.convert.upload import open_hub_output

    if jax.process_count() > 1:
        raise UsageError(
            f"{settings.base_output_directory}: one host converts for the Hub, in a directory of its own. "
            "With several hosts, give gs://bucket/path."
        )
    return open_hub_output(str(settings.base_output_directory), settings.staging_directory)


def _upload(hub: "HubOutput", settings: Settings, console: Console, echo: Callable[[Event], None]) -> None:
    def report(progress: "UploadProgress") -> None:
        console.print(str(progress), highlight=False, soft_wrap=True)
        echo({"event": "upload", **dataclasses.asdict(progress)})

    hub.upload(report, overwrite=settings.overwrite)
    console.print(f"{hub.staging} may be removed now", highlight=False, soft_wrap=True)


class _Conversion:
    """A conversion whose output is claimed."""

    def __init__(self, settings: Settings, plan: Plan, output: epath.Path, chunk_format: ChunkFormat, digest: str):
        self._settings = settings
        self._plan = plan
        self._output = output
        self._format = chunk_format
        self._digest = digest
        self._specs = {planned.leaf.path: array_spec(planned) for planned in plan.leaves}
        self.items = str(output / _ITEMS)

    def run(self, run: str, console: Console, echo: Callable[[Event], None]) -> Done:
        """Writes what is not there yet, and commits."""
        plan, process = self._plan, jax.process_index()
        waves = plan.waves[process]
        ownership = Ownership(self._output, run)
        display = ProgressDisplay(
            console if process == 0 else Console(quiet=True),
            [
                HostProgress(number, len(theirs), sum(wave.out_bytes for wave in theirs))
                for number, theirs in enumerate(plan.waves)
            ],
            process,
            plan.machine.host_bytes,
        )

        def heard(event: Event) -> None:
            echo(event)
            display.add(event)

        log = RunLog(self._output / LOG_DIRECTORY, run, process, heard)
        log.add(
            "begin",
            host=platform.node(),
            hosts=plan.machine.hosts,
            devices=plan.machine.devices,
            waves=len(waves),
            waves_in_flight=plan.waves_in_flight,
            out_bytes=sum(wave.out_bytes for wave in waves),
            host_budget_bytes=plan.machine.host_bytes,
            device_budget_bytes=plan.machine.device_bytes,
            rss_bytes=resident_bytes(),
            versions=versions(),
            kept=self._facts() if process == 0 else None,
        )
        log.flush()  # Before the work, so that a run that is killed soon is known to have been.

        def report(wave: WaveReport) -> None:
            log.add(
                "wave",
                wave=wave.number,
                resumed=not wave.out_bytes,
                done_bytes=wave.done_bytes,
                in_bytes=wave.in_bytes,
                written_bytes=wave.out_bytes,
                seconds={stage: round(seconds, 3) for stage, seconds in wave.seconds.items()},
                rss_bytes=resident_bytes(),
                peak_rss_bytes=peak_resident_bytes(),
                kept={"digests": wave.digests},
            )
            display.show()

        with display, self._hearing_of_others(run, display):
            implementation, warning = choose_implementation(jax.local_devices()[0], plan.kernels)
            if warning is not None:
                console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
                log.add("warning", message=warning)
            pipeline = Pipeline(plan, process, jax.local_devices(), report, ownership.check, implementation)

            def work(writer: ChunkWriter) -> None:
                error = None
                try:
                    pipeline.run(writer)
                except BaseException as raised:
                    error = f"{type(raised).__name__}: {raised}"
                    raise
                finally:
                    log.add("end", error=error, requests=pipeline.reader.requests)
                    log.flush()

            with stopping(pipeline.stop):
                orbax_checkpoint.save(
                    self._output,
                    self._specs,
                    work,
                    self._metadata(),
                    chunk_format=self._format,
                    plan=self._digest,
                    before_commit=ownership.check_now,
                )
        log.add("commit")
        log.flush()
        return Done(
            items=self.items,
            waves=display.own.waves,
            resumed=display.own.resumed,
            in_bytes=pipeline.reader.bytes_read,
            requests=pipeline.reader.requests,
            peak_bytes=peak_resident_bytes(),
        )

    def summarize(self, run: str) -> str:
        """Writes the summary of the finished checkpoint, unless it is there, and returns its path.

        Then the output is nobody's.
        """
        file = self._output / SUMMARY_FILE
        try:
            if run or not file.exists():
                events = LogReader(self._output / LOG_DIRECTORY).new_events()
                step = self._output / orbax_checkpoint.STEP
                found = summarize(self._plan, events, step, self._specs, self._format)
                files(self._output).write(SUMMARY_FILE, encode(found)).result()
            release(self._output)
            return str(file)
        except Exception as error:  # Each backend of epath has its own.
            raise StorageError(
                f"{file}: the checkpoint is finished, but this could not be written: {error}. Run the command again."
            ) from error

    def _facts(self) -> dict[str, Any]:
        """What is converted and how, for a report on a checkpoint that is not finished."""
        leaves = {path: {"shape": list(spec.shape), "dtype": spec.dtype} for path, spec in self._specs.items()}
        return {"facts": {**facts(self._plan), "leaves": leaves}, "metadata": self._metadata()}

    def _metadata(self) -> dict[str, Any]:
        """The step's custom metadata: `scan_layers` for MaxText, the rest for `verify` and for resuming."""
        return {
            "scan_layers": self._settings.scan_layers,
            "slicecast": {
                "version": versions()["slicecast"],
                "plan": self._plan.digest,
                "digest": self._digest,
                "source": self._plan.checkpoint.path,
                **{name: getattr(self._settings, name) for name in RECORDED},
            },
        }

    @contextlib.contextmanager
    def _hearing_of_others(self, run: str, display: ProgressDisplay) -> Iterator[None]:
        """On process 0, tells the display now and then what the others have done."""
        process = jax.process_index()
        if process > 0 or jax.process_count() == 1:
            yield
            return
        reader = LogReader(self._output / LOG_DIRECTORY)
        ended = threading.Event()

        def look() -> None:
            with contextlib.suppress(Exception):  # It is only shown; what ails storage, others will say.
                for event in reader.new_events(run):
                    if event["process"] != process:
                        display.add(event)
            display.show()

        def watch() -> None:
            while not ended.wait(SECONDS_BETWEEN_PARTS):
                look()
            look()  # What they said last.

        thread = threading.Thread(target=watch, name="slicecast-hosts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            # What is only shown holds nobody up for longer.
            thread.join(SECONDS_BETWEEN_PARTS)
