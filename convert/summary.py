"""The summary of a finished checkpoint: what it is, what it was made from, what that took, and a digest of each leaf.

The digest of a leaf is the XXH3 (128 bits) of the digests of its chunks one after another, in row-major order; that of
a chunk is the XXH3 of its values in row-major order, little-endian. It does not depend on compression.

Beside them are the digests of the files of the checkpoint that hold no chunks, which no checksum of theirs protects:
Orbax's own, and without OCDBT the metadata of each array. The last is that of the summary itself.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import xxhash
from etils import epath

from slicecast.convert.box import Box
from slicecast.convert.chunk_store import ArraySpec, ChunkFormat, ChunkReader, digest, files
from slicecast.convert.orbax_checkpoint import ITEM
from slicecast.convert.output import SUMMARY_FILE
from slicecast.convert.plan import Plan
from slicecast.convert.run_log import Event

# Those whose versions say how a checkpoint was made.
_LIBRARIES = ("slicecast", "jax", "orbax-checkpoint", "tensorstore")


def versions() -> dict[str, str]:
    """The versions of slicecast and of what it writes with."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def facts(plan: Plan) -> dict[str, Any]:
    """What a plan makes of what: in the summary, and in the log for those who look before there is one."""
    codecs = (stored.codec.description for planned in plan.leaves for stored in planned.sources.values())
    return {
        "source": plan.checkpoint.path,
        "model": plan.model.description,
        "quantization": plan.quantization,
        "formats": dict(Counter(codecs).most_common()),
        "notes": list(plan.model.notes),
        "ignored": [{"why": i.why, "tensors": i.count, "bytes": i.nbytes} for i in plan.ignored],
        "plan": plan.digest,
        "in_bytes": plan.in_bytes,
        "out_bytes": plan.out_bytes,
    }


def summarize(
    plan: Plan, events: Iterable[Event], step: epath.Path, specs: Mapping[str, ArraySpec], chunk_format: ChunkFormat
) -> dict[str, Any]:
    """The summary of a checkpoint.

    Args:
        plan: The plan that it was made by.
        events: All events of all runs.
        step: The checkpoint: what the log lacks is computed from it.
        specs: How its leaves are stored, by path.
        chunk_format: How they are stored.
    """
    reader = ChunkReader(step / ITEM, chunk_format)
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
    found = {
        **facts(plan),
        "versions": versions(),
        "finished": round(time.time(), 3),
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
        "files": _file_digests(step, specs.values(), chunk_format),
    }
    return {**found, "digest": _digest_of(found)}


def encode(summary: Mapping[str, Any]) -> str:
    """The text of a summary."""
    return json.dumps(summary, indent=1)


def read(output: epath.Path) -> dict[str, Any]:
    """The summary of the checkpoint in an output, just as it was written.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    text = (output / SUMMARY_FILE).read_text()
    found = json.loads(text)
    if not isinstance(found, dict) or encode(found) != text:
        raise ValueError("it is not as it was written")
    # Those of earlier versions have neither field.
    sealed = "files" in found or "digest" in found
    if sealed and found.get("digest") != _digest_of({key: found[key] for key in found if key != "digest"}):
        raise ValueError("it is not what its own digest says")
    return found


def _digest_of(summary: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(encode(summary).encode())


def file_digest(content: bytes) -> str:
    """The digest of a file: the XXH3 of its bytes."""
    return xxhash.xxh3_128_hexdigest(content)


def _file_digests(step: epath.Path, specs: Iterable[ArraySpec], chunk_format: ChunkFormat) -> dict[str, str]:
    """The digest of each file of a checkpoint that holds no chunks, by its path in the step."""
    store = files(step)
    names = {key.decode() for key in store.list().result()}
    if chunk_format.ocdbt:
        # Below `d/` are the nodes and chunks of databases. Nodes have checksums.
        names = {name for name in names if "/d/" not in name}
    else:
        names -= {f"{ITEM}/{key}" for spec in specs for key in chunk_format.keys(spec)}
    reads = {name: store.read(name) for name in sorted(names)}
    return {name: file_digest(read.result().value) for name, read in reads.items()}


def leaf_digest(spec: ArraySpec, chunk_format: ChunkFormat, known: Mapping[str, str], reader: ChunkReader) -> str:
    """The digest of a leaf; chunks whose digests are not known are read."""
    of_leaf = xxhash.xxh3_128()
    for chunk in Box.whole(spec.shape).tiles(spec.chunk):
        found = known.get(chunk_format.key(spec, chunk))
        if found is None:
            found = digest(reader.open(spec.name)[chunk.slices].read().result())
        of_leaf.update(bytes.fromhex(found))
    return of_leaf.hexdigest()
