"""Damages finished checkpoints, and asks who notices: `verify`, `verify --digests`, and an ordinary load.

    .venv/bin/python scripts/corruption_campaign.py --flips 1000 --seed 1

A tiny checkpoint is converted in each chunk format. Then one byte is changed in a copy of it, or a file is cut short or
removed, and the copy is verified, and loaded as MaxText does: with `Checkpointer` and `PyTreeCheckpointHandler`, onto
shardings over all devices, and with Orbax's newer `load`. Each finds the damage or does not; and a load may also give
wrong values, or leave a leaf as it was, without a word. All bytes of a kind of files are changed one after another, or
a random one of each of `--flips` equal parts of them.

The exit code is 1 if there is a hole:

* `verify` does not find what a load sees or suffers from, or a change in a file that holds no chunks.
* A load gives a wrong value after a flipped byte of a zarr3 checkpoint, which has checksums.

What else a load does not see is no hole of ours, but in the table: zarr 2 has no checksums, the first loader reads a
missing chunk as zeros, and a leaf that has another name in `_METADATA` is not there for it.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Devices over which leaves are spread by a load.
DEVICES = 4

# Tiles far smaller than ours, so that leaves of a tiny model have several chunks, and those several inner ones.
SMALL_TILES = {"COLUMN": 1 << 12, "MAX_CHUNK": 1 << 11, "MAX_INNER": 1 << 10, "REQUEST": 1 << 8, "SMALL": 1 << 10}
MODEL: dict[str, Any] = {"layers": 2, "hidden": 32, "intermediate": 40, "heads": 4, "kv_heads": 2, "vocab": 50}

# By name, whether chunks are in OCDBT databases, and whether they are zarr3's.
FORMATS = {
    "ocdbt, zarr3": (True, True),
    "ocdbt, zarr 2": (True, False),
    "files, zarr3": (False, True),
    "files, zarr 2": (False, False),
}

# What may be seen of a damage.
FOUND, WRONG, LEFT_OUT, NOTHING = "found", "wrong values", "a leaf left out", "nothing"


@dataclass(frozen=True)
class Damage:
    """What is done to a file.

    Attributes:
        kind: What the file holds.
        file: Its path in the output.
        act: `flip`, `cut` or `remove`.
        place: Which byte is flipped, or where the file is cut.
        bits: The bits that are flipped.
    """

    kind: str
    file: str
    act: str
    place: int = 0
    bits: int = 0

    def apply(self, output: Path) -> None:
        """Damages the file."""
        path = output / self.file
        if self.act == "remove":
            path.unlink()
            return
        content = bytearray(path.read_bytes())
        if self.act == "cut":
            del content[self.place :]
        else:
            content[self.place] ^= self.bits
        path.write_bytes(content)


@dataclass(frozen=True)
class Seen:
    """What each has seen of a damage."""

    verify: str
    digests: str
    load: str
    load_v1: str

    def hole(self, damage: Damage, zarr3: bool, metadata: bool) -> str:
        """What should have been seen; "" if all is well."""
        loads = (self.load, self.load_v1)
        if damage.act == "flip" and zarr3 and WRONG in loads:
            return "a load gives wrong values in spite of checksums"
        if loads == (NOTHING, NOTHING) and not metadata:
            return ""
        # What a summary that is gone would say, a comparison with the source need not know.
        gone = damage.act == "remove" and damage.kind == "summary"
        asked = ("digests",) if gone else ("verify", "digests")
        unseen = [name for name in asked if getattr(self, name) != FOUND]
        return f"{' and '.join(unseen)} found nothing" if unseen else ""


def main() -> int:
    """Runs the campaign; returns 1 if there is a hole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100, help="bytes of each kind of files at most (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="what bytes and bits are drawn from (default: 0)")
    parser.add_argument("--only", choices=sorted(FORMATS), nargs="+", help="only these formats")
    parser.add_argument("--prelude", type=Path, help="Python code that is run first, such as a bug to be found")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path += [str(ROOT / "scripts")]
    if arguments.prelude:
        exec(arguments.prelude.read_text(), {})
    # Orbax and JAX report each damage on the way, and coroutines that end with an error.
    logging.disable()
    sys.unraisablehook = lambda _: None
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="corruption-campaign-") as directory:
        results = _campaign(Path(directory), arguments.only or list(FORMATS), arguments.flips, arguments.seed)
    _show(results, time.monotonic() - begin, as_json=arguments.json)
    return int(any(result.hole for result in results))


@dataclass(frozen=True)
class Result:
    """A damage to a checkpoint of a format, what was seen of it, and what should have been."""

    format: str
    damage: Damage
    seen: Seen
    hole: str


def _campaign(directory: Path, formats: Sequence[str], flips: int, seed: int) -> list[Result]:
    import jax
    import make_checkpoint
    import numpy as np

    from slicecast.convert import tiles

    jax.config.update("jax_num_cpu_devices", DEVICES)
    for name, nbytes in SMALL_TILES.items():
        setattr(tiles, f"{name}_BYTES", nbytes)
    make_checkpoint.write_checkpoint(str(directory / "source"), family="llama", files=2, **MODEL)
    results = []
    for name in formats:
        ocdbt, zarr3 = FORMATS[name]
        output = directory / "output"
        _convert(directory / "source", output, ocdbt, zarr3)
        witness = _Witness(output, ocdbt, zarr3)
        (output / "slicecast-verification.json").unlink()  # It tells what was seen, and is no part of the checkpoint.
        random = np.random.default_rng(seed)
        for number, damage in enumerate(_damages(output, flips, random)):
            # At a path of its own: TensorStore remembers nodes of databases by their path.
            copy = directory / f"copy-{number}"
            shutil.copytree(output, copy)
            damage.apply(copy)
            seen = witness.look(copy)
            hole = seen.hole(damage, zarr3, damage.file in witness.metadata)
            results.append(Result(name, damage, seen, hole))
            shutil.rmtree(copy)
        shutil.rmtree(output)
    return results


def _convert(source: Path, output: Path, ocdbt: bool, zarr3: bool) -> None:
    from rich.console import Console

    from slicecast.convert import conversion
    from slicecast.convert.settings import Settings

    settings = Settings(
        hf_model_path=str(source),
        base_output_directory=str(output),
        checkpoint_storage_use_ocdbt=ocdbt,
        checkpoint_storage_use_zarr3=zarr3,
        host_memory_gb=0.001,
    )
    conversion.convert(settings, Console(quiet=True), describe=lambda _: None, echo=lambda _: None)


def _kind(path: Path) -> str:
    """What a file of a checkpoint holds."""
    if path.parent.name == "d":
        return "process's database" if path.parent.parent.name.startswith("ocdbt.process") else "merged database"
    if path.name == "manifest.ocdbt":
        return "process's manifest" if path.parent.name.startswith("ocdbt.process") else "merged manifest"
    if path.name in ("zarr.json", ".zarray"):
        return "array metadata"
    if any(part.startswith("params.") for part in path.parts):
        return "chunks"
    return "summary" if path.name == "slicecast-summary.json" else path.name


def _damages(output: Path, flips: int, random: Any) -> Iterator[Damage]:
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(output.rglob("*")):
        if path.is_file() and "slicecast-log" not in path.parts:
            kinds[_kind(path.relative_to(output))].append(path)
    for kind, paths in sorted(kinds.items()):
        names = [str(path.relative_to(output)) for path in paths]
        sizes = [path.stat().st_size for path in paths]
        total, wanted = sum(sizes), min(flips, sum(sizes))
        for part in range(wanted):
            place = int(random.integers(part * total // wanted, (part + 1) * total // wanted))
            for name, size in zip(names, sizes, strict=True):
                if place < size:
                    yield Damage(kind, name, "flip", place, int(random.integers(1, 256)))
                    break
                place -= size
        for name, size in list(zip(names, sizes, strict=True))[:: max(1, len(names) * 4 // max(flips, 4))]:
            yield Damage(kind, name, "remove")
            for place in {0, size // 2, size - 1}:
                yield Damage(kind, name, "cut", place)


class _Witness:
    """Verifies and loads copies of a checkpoint.

    Attributes:
        metadata: Its files that hold no chunks, by their paths in the output.
    """

    def __init__(self, output: Path, ocdbt: bool, zarr3: bool):
        import jax
        import numpy as np
        import orbax.checkpoint as ocp
        from etils import epath
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from slicecast.convert import orbax_checkpoint, summary

        self._handler = lambda: ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        arrays = orbax_checkpoint.open_arrays(epath.Path(output))
        self._right = {path: array.read().result() for path, array in arrays.items()}
        files = summary.read(epath.Path(output))["files"]
        self.metadata = {f"0/{name}" for name in files} | {"slicecast-summary.json"}
        mesh = Mesh(np.array(jax.devices()), ("x",))

        def abstract(array: Any) -> jax.ShapeDtypeStruct:
            axis = next((axis for axis, size in enumerate(array.shape) if size % DEVICES == 0), None)
            spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "x")
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

        self._target: dict[str, Any] = {}
        for path, array in self._right.items():
            *parents, last = path.split("/")
            node = self._target
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = abstract(array)
        untouched = self.look(output)
        assert untouched == Seen(NOTHING, NOTHING, NOTHING, NOTHING), f"before all damage: {untouched}"

    def look(self, output: Path) -> Seen:
        """What each sees of a checkpoint."""
        from slicecast.convert.verification import strengths

        return Seen(
            self._verify(output, strengths.FULL),
            self._verify(output, strengths.DIGESTS),
            self._values(lambda: self._load(output)),
            self._values(lambda: self._load_v1(output)),
        )

    def _verify(self, output: Path, strength: str) -> str:
        from rich.console import Console

        from slicecast.convert.errors import SlicecastError
        from slicecast.convert.verification import strengths

        request = strengths.Request(output=str(output), strength=strength, host_memory_gb=0.001)
        try:
            wrong = strengths.verify_checkpoint(request, Console(quiet=True)).wrong
        except SlicecastError:
            return FOUND  # Any other error would be a bug.
        return FOUND if wrong else NOTHING

    def _load(self, output: Path) -> Any:
        import orbax.checkpoint as ocp
        from etils import epath

        restore_args = ocp.checkpoint_utils.construct_restore_args(self._target)
        return ocp.Checkpointer(self._handler()).restore(
            epath.Path(output / "0" / "items"), item=self._target, transforms={}, restore_args=restore_args
        )

    def _load_v1(self, output: Path) -> Any:
        from orbax.checkpoint import v1

        return v1.load_checkpointables(output / "0", {"items": self._target})["items"]

    def _values(self, load: Callable[[], Any]) -> str:
        import jax
        import numpy as np

        try:
            leaves, _ = jax.tree_util.tree_flatten_with_path(load())
            found = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        except Exception:  # Whatever kind of error it is, the user sees it.
            return FOUND
        if found.keys() != self._right.keys() or any(leaf.dtype == object for leaf in found.values()):
            return LEFT_OUT  # What was asked for is given back, a shape and no array.
        same = all(
            found[path].dtype == right.dtype and found[path].tobytes() == right.tobytes()
            for path, right in self._right.items()
        )
        return NOTHING if same else WRONG


def _show(results: Sequence[Result], seconds: float, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    rows: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        rows[result.format, result.damage.kind, result.damage.act].append(result)
    counts = {key: _counts(of_row) for key, of_row in rows.items()}
    holes = [f"{each.format}: {each.damage}: {each.hole} ({each.seen})" for each in results if each.hole]
    if as_json:
        records = [{**dict(zip(("format", "kind", "act"), key, strict=True)), **row} for key, row in counts.items()]
        found = {"damages": len(results), "seconds": round(seconds), "rows": records, "holes": holes}
        print(json.dumps(found, indent=1))
        return
    console = Console(width=150, highlight=False)
    table = Table(
        "format", "file", "damage", "times", "verify\nfound", "digests\nfound",
        "load\nfound", "load\nwrong", "load\nleft out", "newer\nfound", "newer\nwrong", "newer\nleft out",
    )  # fmt: skip
    for key, row in counts.items():
        table.add_row(*key, *map(str, row.values()))
    console.print(table)
    for hole in holes:
        console.print(f"HOLE: {hole}", markup=False)
    console.print(f"{len(results)} damages in {seconds:.0f} s, {len(holes)} holes")


def _counts(results: Sequence[Result]) -> Mapping[str, int]:
    seen = {name: Counter(getattr(result.seen, name) for result in results) for name in Seen.__dataclass_fields__}
    return {
        "times": len(results),
        "verify found": seen["verify"][FOUND],
        "digests found": seen["digests"][FOUND],
        "load found": seen["load"][FOUND],
        "load wrong": seen["load"][WRONG],
        "load left out": seen["load"][LEFT_OUT],
        "newer load found": seen["load_v1"][FOUND],
        "newer load wrong": seen["load_v1"][WRONG],
        "newer load left out": seen["load_v1"][LEFT_OUT],
    }


if __name__ == "__main__":
    sys.exit(main())
