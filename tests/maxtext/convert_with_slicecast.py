"""Converts the source of each case with slicecast, in each of the case's layouts.

    python convert_with_slicecast.py DIR [CASE ...]

Reads `DIR/<case>/hf`, and writes `DIR/<case>/slicecast/<dtype>/<layout>`. All in one process, for its imports take
longer than a conversion.
"""

import itertools
import sys
from pathlib import Path

from case import SAVE_DTYPES, Case, Layout, SaveDtype, output
from cases import CASES

from slicecast.convert import cli


def command(case: Case, layout: Layout, save_dtype: SaveDtype, folder: Path) -> list[str]:
    """Returns the arguments of `slicecast` that convert one case."""
    return [
        "convert",
        f"--hf_model_path={folder / 'hf'}",
        f"--base_output_directory={output(folder, 'slicecast', save_dtype, layout)}",
        f"--model_name={case.model_name}",
        "--override_model_config=true",
        f"--scan_layers={layout == 'scanned'}",
        f"--save_dtype={save_dtype}",
        f"--enable_mtp={case.predicts_more}",
        "--simulated_cpu_devices_count=8",
        *(["--use_multimodal"] if case.sees else []),
        *([f"--vocab_size={case.maxtext['vocab_size']}"] if "vocab_size" in case.maxtext else []),
    ]


def main(arguments: list[str]) -> None:
    """Converts all cases, or those named after the folder, in the folder given first."""
    if not arguments:
        sys.exit("usage: convert_with_slicecast.py DIR [CASE ...]")
    out, names = Path(arguments[0]), arguments[1:]
    for case in CASES:
        if names and case.name not in names:
            continue
        for layout, save_dtype in itertools.product(case.layouts, SAVE_DTYPES):
            words = command(case, layout, save_dtype, out / case.name)
            print("slicecast", *words, file=sys.stderr)
            if cli.main(cli.parse(words)) != 0:
                sys.exit(f"{case.name}, {layout}, {save_dtype}: not converted")


if __name__ == "__main__":
    main(sys.argv[1:])
