"""What `verify` does, on every process: agree, compare a share, gather what was found, and keep the result.

    full       every value is recomputed from the source, and compared
    sample     so are some regions of every leaf (`sampling.py`)
    digests    every chunk is read, and each leaf has its digest in the summary (`digests.py`): no source is needed

In all of them the tree, its shapes and dtypes must be right, all chunks must be there, and the files that hold no
chunks must have their digests in the summary.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from etils import epath
from rich.console import Console

from slicecast.convert import hosts, orbax_checkpoint, summary
from slicecast.convert.commands import RECORDED, make_plan
from slicecast.convert.errors import OutputError, UsageError, first_line
from slicecast.convert.memory import Machine, available_host_bytes, budget
from slicecast.convert.orbax_checkpoint import StoredTree
from slicecast.convert.output import SUMMARY_FILE, open_output
from slicecast.convert.plan import Plan
from slicecast.convert.settings import Settings
from slicecast.convert.verification import against_source, digests, record, requantize, sampling
from slicecast.convert.verification.against_source import Difference, Mismatch, Region
from slicecast.convert.verification.progress import VerifyProgress
from slicecast.convert.verification.record import Verification
from slicecast.convert.verification.requantize import Requantized

FULL, SAMPLE, DIGESTS = "full", "sample", "digests"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for.

    Attributes:
        output: The output of the conversion.
        strength: `full`, `sample` or `digests`.
        hf_model_path: The source; None for that in the checkpoint's metadata.
        revision: Its revision on the Hub.
        host_memory_gb: Memory to use on each host, in GB; None for a part of what is free.
        regions: How many regions of each leaf a sample has.
        seed: What the sample is drawn from; None for a number that nobody knows before.
        requantize: Whether to quantize INT4 leaves again too, and to compare codes and scales.
    """

    output: str
    strength: str = FULL
    hf_model_path: str | None = None
    revision: str | None = None
    host_memory_gb: float | None = None
    regions: int = sampling.DEFAULT_REGIONS
    seed: int | None = None
    requantize: bool = False


@dataclass
class _Found:
    """What a process has found in its share.

    Attributes:
        missing: Leaves of which chunks are not there; process 0 looks for them.
        mismatches: Regions that differ from the source.
        digested: What was read of each leaf.
        requantized: What quantizing again gave.
    """

    missing: list[Difference] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    digested: dict[str, digests.Digested] = field(default_factory=dict)
    requantized: Requantized | None = None

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> "_Found":
        """From JSON."""
        fields = json.loads(text)
        again = fields["requantized"]
        if again is not None:
            differences = tuple(Difference(**each) for each in again.pop("differences"))
            again = Requantized(**again, differences=differences)
        return cls(
            [Difference(**each) for each in fields["missing"]],
            [Mismatch(**each) for each in fields["mismatches"]],
            {path: digests.Digested(**each) for path, each in fields["digested"].items()},
            again,
        )


def settings_of(output: epath.Path, hf_model_path: str | None = None, revision: str | None = None) -> Settings:
    """The settings that a finished checkpoint was made with, from its metadata.

    Args:
        output: The output of its conversion.
        hf_model_path: Where the source is; None for where it was.
        revision: Its revision on the Hub.

    Raises:
        OutputError: If there is no finished checkpoint, or slicecast did not make it.
    """
    step = orbax_checkpoint.require_finished(output)
    own = orbax_checkpoint.read_own_metadata(step)
    if not own:
        raise OutputError(f"{step}: this checkpoint was not written by slicecast; verify can only check its own.")
    recorded = str(own.get("source"))
    if hf_model_path is None:
        hf_model_path = recorded
    if revision is None and recorded.startswith(f"hf://{hf_model_path.removeprefix('hf://')}@"):
        hf_model_path = recorded  # The commit, wherever its branch is by now.
    return Settings(
        hf_model_path=hf_model_path,
        revision=revision,
        base_output_directory=str(output),
        scan_layers=bool(orbax_checkpoint.read_custom_metadata(step).get("scan_layers")),
        override_model_config=True,
        **{name: own[name] for name in RECORDED if name in own},
    )


def verify_checkpoint(request: Request, console: Console) -> Verification:
    """Verifies a finished checkpoint, and keeps the result beside it; called by all processes.

    Args:
        request: What the user asked for.
        console: Where this process shows what happens.

    Raises:
        OutputError: If there is no finished checkpoint of ours, or no summary where its digests are needed.
        UsageError: If processes differ in what they verify, or there is nothing to quantize again.
        SlicecastError: Whatever keeps the source from being read.
    """
    started = time.monotonic()
    if request.strength == SAMPLE and request.seed is None:
        request = dataclasses.replace(request, seed=int(hosts.on_first(lambda: str(secrets.randbelow(1 << 32)))))
    host_bytes = budget(request.host_memory_gb, available_host_bytes())
    comparison = _Comparison(request, hosts.smallest(Machine(jax.process_count(), 1, host_bytes, None)), console)
    hosts.on_all(comparison.prepare)
    hosts.check_agreement(comparison.facts)
    found = hosts.on_all(lambda: comparison.compare().encode())
    wrong, right = comparison.conclude(list(map(_Found.decode, found)))
    verification = Verification(
        strength=request.strength,
        checkpoint=str(comparison.own.get("digest", "")),
        version=summary.versions()["slicecast"],
        finished=round(time.time(), 3),
        seconds=round(time.monotonic() - started, 3),
        hosts=jax.process_count(),
        leaves=comparison.leaves,
        right=right,
        wrong=tuple((each.path, each.detail) for each in wrong),
    )
    if jax.process_index() == 0:
        try:
            record.add(comparison.output, verification)
        except Exception as error:  # Each backend of storage has its own.
            message = f"the result is not kept: {comparison.output} cannot be written: {first_line(error)}"
            console.print(message, highlight=False, markup=False, soft_wrap=True)
    return verification


class _Comparison:
    """A process's part of a verification.

    Attributes:
        output: The output of the conversion.
        own: What slicecast wrote into the checkpoint's metadata.
        facts: What must be equal on all processes.
        leaves: How many leaves the checkpoint should have.
    """

    def __init__(self, request: Request, machine: Machine, console: Console):
        self._request = request
        self._machine = machine
        self._console = console
        self.output = open_output(request.output)
        self.own: Mapping[str, Any] = {}
        self.facts: dict[str, str] = {}
        self.leaves = 0
        self._summary: dict[str, Any] = {}
        self._plan: Plan | None = None
        self._tree: StoredTree | None = None
        self._regions: list[Region] = []
        self._wrong: list[Difference] = []
        self._about_files = ""

    def prepare(self) -> str:
        """Looks at all that is not values: the same on all processes."""
        step = orbax_checkpoint.require_finished(self.output)
        self._read_summary(step)
        self.own = orbax_checkpoint.read_own_metadata(step)
        self.facts = {
            "version of slicecast": summary.versions()["slicecast"],
            "request": str(dataclasses.replace(self._request, host_memory_gb=None)),
            "checkpoint": str(self.own.get("digest")),
            "files": str(self._wrong),
            "source": "",
            "plan": "",
        }
        damaged = {difference.path for difference in self._wrong}
        if f"{step.name}/{orbax_checkpoint.STEP_METADATA_FILE}" in damaged:
            return ""  # It says how the checkpoint was made: without it nothing can be expected.
        if self._request.strength != DIGESTS:
            self._plan_comparison()
        elif self._summary:
            self.leaves = len(self._summary["leaves"])
        else:
            return ""
        self._open(step)
        return ""

    def _read_summary(self, step: epath.Path) -> None:
        """Reads the summary, and compares the files that hold no chunks with what it says."""
        try:
            self._summary = summary.read(self.output)
        except FileNotFoundError:
            if self._request.strength == DIGESTS:
                raise OutputError(
                    f"{self.output / SUMMARY_FILE}: there is none, so there are no digests to compare with. Run the "
                    "command that converted again: it writes one; or leave --digests out, and compare with the source."
                ) from None
            self._about_files = f"not checked: files without chunks, for there is no {SUMMARY_FILE}"
        except ValueError as error:
            self._wrong.append(Difference(SUMMARY_FILE, f"is damaged: {first_line(error)}"))
        else:
            known = self._summary.get("files")
            if known is None:
                self._about_files = f"not checked: files without chunks, of which {SUMMARY_FILE} has no digests"
                return
            self._wrong += digests.compare_files(step, known)
            self._about_files = f"{len(known)} files without chunks: as {SUMMARY_FILE} says"

    def _plan_comparison(self) -> None:
        request = self._request
        settings = settings_of(self.output, request.hf_model_path, request.revision)
        if request.hf_model_path is None:
            text = f"source {settings.hf_model_path}, as the checkpoint says"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._plan = make_plan(settings, self._machine)
        self.leaves = len(self._plan.leaves)
        self.facts |= {"source": self._plan.checkpoint.path, "plan": self._plan.digest}

    def _open(self, step: epath.Path) -> None:
        item = step / orbax_checkpoint.ITEM
        try:
            tree = orbax_checkpoint.open_tree(item)
        except OutputError as error:
            self._wrong.append(Difference(f"{step.name}/{item.name}", first_line(error).removeprefix(f"{item}: ")))
            return
        if self._plan is not None:
            wrong = against_source.compare_trees(self._plan, tree.arrays)
        else:
            wrong = digests.compare_trees(self._summary["leaves"], tree.arrays)
        self._wrong += wrong
        if not wrong:
            self._tree = tree

    def compare(self) -> _Found:
        """Compares this process's share of the values."""
        process, processes = jax.process_index(), jax.process_count()
        if self._tree is None:
            return _Found()
        arrays, host_bytes = self._tree.arrays, self._machine.host_bytes
        missing = []
        if process == 0:
            item = self.output / orbax_checkpoint.STEP / orbax_checkpoint.ITEM
            missing = digests.missing_chunks(item, self._tree.chunk_format, arrays)
        if self._plan is None:
            chunks = list(digests.share(arrays, process, processes))
            with VerifyProgress(self._console, sum(chunk.nbytes for chunk in chunks)) as progress:
                return _Found(missing, digested=digests.compute(arrays, chunks, progress.add, host_bytes))
        mine = dataclasses.replace(self._plan, waves=(self._plan.waves[process],))
        if self._request.strength == SAMPLE:
            self._regions = sampling.draw(self._plan, self._request.regions, self._request.seed or 0)
            regions = self._regions[process::processes]
        else:
            regions = list(map(Region.of, mine.boxes))
        with VerifyProgress(self._console, sum(region.nbytes for region in regions)) as progress:
            found = _Found(
                missing, against_source.compare_values(self._plan, arrays, regions, progress.add, host_bytes)
            )
        if self._request.requantize and not found.mismatches:
            workers = against_source.workers((Region.of(work).memory_bytes for work in mine.boxes), host_bytes)
            with self._console.status("quantizing again"):
                found.requantized = requantize.compare(mine, arrays, workers)
        return found

    def conclude(self, found: Sequence[_Found]) -> tuple[list[Difference], tuple[str, ...]]:
        """What is wrong, and a line for each thing that is right, from what all processes have found."""
        wrong = [*self._wrong, *(difference for each in found for difference in each.missing)]
        if self._tree is not None and self._plan is None:
            wrong += digests.compare(self._summary["leaves"], [each.digested for each in found])
        wrong += against_source.differences(mismatch for each in found for mismatch in each.mismatches)
        if wrong:
            return _one_a_path(wrong), ()
        lines = [self._what_is_right(), self._about_files]
        if self._request.requantize:
            again = _together([each.requantized for each in found if each.requantized is not None])
            if again.differences:
                return list(again.differences), ()
            lines.append(_about_requantized(again))
        return [], tuple(lines)

    def _what_is_right(self) -> str:
        if self._plan is None:
            return f"{self.leaves} leaves: each has the digest that {SUMMARY_FILE} says"
        values = sum(planned.nbytes // planned.itemsize for planned in self._plan.leaves)
        if self._request.strength == FULL:
            return f"{self.leaves} leaves, {values} values: all equal to the source, bit for bit"
        compared = sum(region.nbytes for region in self._regions)
        return (
            f"{len(self._regions)} regions of {self.leaves} leaves, {compared} of {self._plan.out_bytes} bytes "
            f"({100 * compared / self._plan.out_bytes:.3g} %): equal to the source, bit for bit; "
            f"--seed={self._request.seed} compares the same"
        )


def describe(output: str, found: Verification) -> str:
    """What is wrong, for people: a line, and one for each leaf and file."""
    leaves = [path for path, _ in found.wrong if path.startswith("params/")]
    others = len(found.wrong) - len(leaves)
    expected = "their digests" if found.strength == DIGESTS else "the source"
    parts = [f"{len(leaves)} of {found.leaves} leaves differ from {expected}"] if leaves or not others else []
    parts += [f"{others} files are damaged"] if others else []
    lines = [f"{path} {detail}" for path, detail in found.wrong]
    return f"{output}: {', '.join(parts)}:\n" + "\n".join(lines)


def _one_a_path(differences: Sequence[Difference]) -> list[Difference]:
    details: dict[str, list[str]] = {}
    for difference in differences:
        details.setdefault(difference.path, []).append(difference.detail)
    return [Difference(path, "; ".join(of_path)) for path, of_path in details.items()]


def _together(found: Sequence[Requantized]) -> Requantized:
    """What all processes have found together; each knows all leaves, and has had some of their boxes."""
    return Requantized(
        leaves=found[0].leaves,
        groups=sum(each.groups for each in found),
        ambiguous=sum(each.ambiguous for each in found),
        differences=tuple(_one_a_path([difference for each in found for difference in each.differences])),
    )


def _about_requantized(found: Requantized) -> str:
    if not found.leaves:
        raise UsageError("--requantize: no leaf of this checkpoint comes from symmetric INT4 weights alone.")
    alike = ""
    if found.ambiguous:
        alike = f"; the scales of {found.ambiguous} groups have a neighbor that gives the same values"
    return (
        f"{found.leaves} INT4 leaves, {found.groups} groups: quantized again, they give the source's codes and scales"
        f"{alike}"
    )
