"""The summary of a finished checkpoint: what it is, what it was made from, what that took, and a digest of each leaf.

The digest of a leaf is the XXH3 (128 bits) of the digests of its chunks one after another, in row-major order; that of
a chunk is the XXH3 of its values in row-major order, little-endian. It does not depend on compression.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import xxhash

from slicecast.convert.box import Box
from slicecast.convert.chunk_store import ArraySpec, ChunkFormat, ChunkReader, digest
from slicecast.convert.plan import Plan
from slicecast.convert.run_log import Event

# Those whose versions say how a checkpoint was made.
_LIBRARIES = ("slicecast", "jax", "orbax-checkpoint", "tensorstore")


def versions() -> dict[str, str]:
    """The versions of slicecast and of what it writes with."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def summarize(
    plan: Plan,
    events: Iterable[Event],
    reader: ChunkReader,
    specs: Mapping[str, ArraySpec],
    chunk_format: ChunkFormat,
) -> dict[str, Any]:
    """The summary of a checkpoint.

    Args:
        plan: The plan that it was made by.
        events: All events of all runs.
        reader: Reads the checkpoint: what the log lacks is computed from it.
        specs: How they are stored, by path.
        chunk_format: How they are stored.
    """
    known: dict[str, str] = {}
    doubtful: set[str] = set()
    hosts: dict[tuple[str, int], dict[str, Any]] = {}
    started: dict[str, float] = {}
    for event in events:
        for key, found in event.get("digests", {}).items():
            if known.setdefault(key, found) != found:
                doubtful.add(key)  # Two runs have written it, on different hardware. Only storage knows which is there.
        started.setdefault(event["run"], event["time"])
        host = hosts.setdefault(
            (event["run"], event["process"]),
            {"process": event["process"], "in_bytes": 0, "written_bytes": 0, "seconds": 0.0, "peak_rss_bytes": 0},
        )
        host["in_bytes"] += event.get("in_bytes", 0)
        host["written_bytes"] += event.get("written_bytes", 0)
        host["seconds"] = round(event["time"] - started[event["run"]], 3)
        host["peak_rss_bytes"] = max(host["peak_rss_bytes"], event.get("peak_rss_bytes", 0))
    for key in doubtful:
        del known[key]
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (run, _), host in sorted(hosts.items(), key=lambda item: item[0][1]):
        runs[run].append(host)
    return {
        "source": plan.checkpoint.path,
        "model": plan.model.description,
        "quantization": plan.quantization,
        "plan": plan.digest,
        "versions": versions(),
        "in_bytes": plan.in_bytes,
        "out_bytes": plan.out_bytes,
        "runs": [
            {"run": run, "started": started[run], "seconds": max(host["seconds"] for host in of_run), "hosts": of_run}
            for run, of_run in sorted(runs.items(), key=lambda item: started[item[0]])
        ],
        "leaves": {
            path: {
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "digest": leaf_digest(spec, chunk_format, known, reader),
            }
            for path, spec in specs.items()
        },
    }


def leaf_digest(spec: ArraySpec, chunk_format: ChunkFormat, known: Mapping[str, str], reader: ChunkReader) -> str:
    """The digest of a leaf; chunks whose digests are not known are read."""
    of_leaf = xxhash.xxh3_128()
    for chunk in Box.whole(spec.shape).tiles(spec.chunk):
        found = known.get(chunk_format.key(spec, chunk))
        if found is None:
            found = digest(reader.open(spec.name)[chunk.slices].read().result())
        of_leaf.update(bytes.fromhex(found))
    return of_leaf.hexdigest()
