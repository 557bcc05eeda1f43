"""Interrupts conversions at random moments, and checks that no value is ever wrong.

    .venv/bin/python scripts/fault_campaign.py --rounds 200 --seed 5
    .venv/bin/python scripts/fault_campaign.py --seed 5 --round 17       one round again, with all details

A round is a conversion that is started until it is finished: with 1, 2 or 4 processes each time; from a directory, a
bucket or the Hub; to a directory or a bucket; scanned or not; with OCDBT or without. In all starts but the last
something goes wrong at a random moment: processes are killed (`kill -9`), terminated (SIGTERM), stopped (SIGSTOP) for a
while or for good; the disk is full, a read fails or is short; bucket or Hub answer with 429, with 503, late, not at
all, or with less than was asked for; the same command is started a second time.

After each start Orbax's own loader must either find a checkpoint in which all leaves equal those of an undisturbed
conversion, or nothing. The exit codes must be the documented ones, and nothing may take longer than three minutes.
Processes say how far they are, so that each phase of a conversion is really hit; the table at the end says how often.

The undisturbed conversion is verified by `slicecast verify`, and some of its leaves by a decoder of the campaign's own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the rounds; returns 1 if something was wrong in one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="how many rounds (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="what the rounds are drawn from (default: 0)")
    parser.add_argument("--round", type=int, help="only the round of this number")
    parser.add_argument("--only", choices=("local", "bucket", "hub"), nargs="+", help="only these places")
    parser.add_argument(
        "--prelude", type=Path, help="Python code that each process runs first, such as a bug to be found"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    # For the processes of the conversions, which are forks of a server that this process starts.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",  # Threads do not survive a fork.
        "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "tests")]),
    }
    sys.path += [str(ROOT / "tests")]
    with tempfile.TemporaryDirectory(prefix="fault-campaign-") as directory:
        return _campaign(arguments, Path(directory))


def _campaign(arguments: argparse.Namespace, directory: Path) -> int:
    # Only now, since the server of forks and what it imports depend on the environment.
    import make_checkpoint
    from faults import plan, processes, rounds
    from faults.places import Places

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    make_checkpoint.write_checkpoint(str(directory / "source"))
    places = Places(directory, directory / "source")
    try:
        processes.CONTEXT.set_forkserver_preload(["faults.child", "faults.outputs"])
        os.environ |= places.environment
        begin = time.monotonic()
        references = {
            scanned: rounds.reference(places, f"reference-{scanned}", scanned=scanned) for scanned in (True, False)
        }
        console.print(f"undisturbed conversions verified in {time.monotonic() - begin:.1f} s")
        numbers = range(arguments.rounds) if arguments.round is None else [arguments.round]
        say = console.print if arguments.round is not None else lambda _: None
        prelude = arguments.prelude.read_text() if arguments.prelude else ""
        reports = {}
        for number in numbers:
            planned = plan.draw(arguments.seed, number, arguments.only or ("local", "bucket", "hub"))
            report = rounds.run(planned, places, references, say, prelude)
            reports[number] = report
            console.print(f"round {number}: {report.seconds:.1f} s, {report.attempts} starts, {report.struck}")
            if report.failure:
                console.print(f"FAILED: {report.failure}\n{planned}", markup=False)
                only = f" --only {' '.join(arguments.only)}" if arguments.only else ""
                console.print(f"again: scripts/fault_campaign.py --seed {arguments.seed} --round {number}{only}")
    finally:
        places.close()
    _show(reports, time.monotonic() - begin, as_json=arguments.json)
    return int(any(report.failure for report in reports.values()))


def _show(reports: Mapping[int, Any], seconds: float, *, as_json: bool) -> None:
    """Prints what happened in all rounds."""
    from faults.child import PHASES

    struck = Counter(f"{kind}, {phase}" for report in reports.values() for kind, phase in report.struck)
    outcomes = Counter(outcome for report in reports.values() for outcome in report.outcomes)
    codes = Counter(code for report in reports.values() for code in report.exit_codes)
    failed = [number for number, report in reports.items() if report.failure]
    totals = {
        "rounds": len(reports),
        "starts": sum(report.attempts for report in reports.values()),
        "starts with another number of processes": sum(report.regrouped for report in reports.values()),
        "faults": struck.total(),
        "moments that did not come": sum(report.missed for report in reports.values()),
        "failed rounds": len(failed),
        "wrong values": sum(report.wrong_values for report in reports.values()),
        "seconds": round(seconds),
    }
    if as_json:
        print(
            json.dumps(
                {**totals, "failed": failed, "struck": struck, "outcomes": outcomes, "exit codes": codes}, indent=2
            )
        )
        return
    console = Console()
    kinds = Table("fault", *PHASES, "all", title="faults that happened, by what the conversion was doing")
    for kind in sorted({kind for report in reports.values() for kind, _ in report.struck}):
        counts = [struck[f"{kind}, {phase}"] for phase in PHASES]
        kinds.add_row(kind, *map(str, counts), str(sum(counts)))
    console.print(kinds)
    for outcome, times in outcomes.most_common():
        console.print(f"{times:6} x {outcome}")
    console.print(f"exit codes: {', '.join(f'{times} x {code}' for code, times in codes.most_common())}")
    console.print("; ".join(f"{name}: {value}" for name, value in totals.items()))
    if failed:
        console.print(f"failed: {failed}")


if __name__ == "__main__":
    sys.exit(main())
