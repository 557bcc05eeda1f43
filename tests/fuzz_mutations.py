"""Checkpoints that are wrong in random places: as JSON trees, as bytes, and as sets of files."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fuzz_checkpoints import CONFIG, INDEX, SUFFIX, VALID, File, Files, tensor_file


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may hold a key twice."""


@dataclass(frozen=True)
class Raw:
    """JSON text that is written as it is, or something that is no JSON."""

    text: str


PATHS = ["../../x", "/etc/x", "a/../../x", "..\\x", "sub/x", "gs://bucket/x", "%2e%2e%2fx", "x?y", "x#1", "*", ""]
UNSHOWN = ["x\0", "x\n", "\x1b[2J\x1b[31mx", "\u202ex", "\ud800"]
LONG = ["n" * 300, "n" * 20_000]
HOSTILE_NAMES = [
    *(name + SUFFIX for name in PATHS + UNSHOWN + LONG),
    *("", ".", "..", "x.bin", "größe", "model.safetensors", CONFIG, INDEX),
]

INTEGERS = [0, 1, -1, 2, 3, 7, 64, 65, -(2**63), *(2**n + d for n in (31, 32, 53, 63, 64, 128) for d in (-1, 0, 1))]

VALUES = [
    *(None, True, False, 0.0, 1.5, 4.0, -0.0, math.nan, math.inf, -math.inf, 1e300),
    *INTEGERS,
    *("", "F32", "U8", "F4", "I4", "4", "gptq", "fp8", "\x1b[31m", "\ud800", "\u202e", "x" * 5000),
    *([], [[]], [1] * 65, [0, 0], [0, 2**63 - 1], [4, 0], [-4, 0], [2**63 - 1] * 64, [None], ["a"], [1.0, 2]),
    *(Pairs(), Pairs([("a", 1)]), Pairs([("a", 1), ("a", 2)]), Pairs([("dtype", "U8")])),
    *(Raw("9" * 4300), Raw("9" * 5000), Raw("1" + "0" * 4000), Raw("1e999"), Raw("-0"), Raw("01"), Raw("nul"), Raw("")),
    # Around our limit of depth, and around that of Python's parser.
    *(Raw("[" * n + "]" * n) for n in (60, 62, 64, 65, 70, 100, 200, 300, 500, 900, 980, 990, 100_000)),
    *(Raw('{"a":' * n + "1" + "}" * n) for n in (61, 63, 65, 100, 400, 900, 975)),
]

TOKENS = [
    *b'{ } [ ] , : " \\ \\u \\ud800 - . 0 9 1e9 NaN null true'.split(),
    *(b"\0", b"\n", b"\x1b[2J", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 2000, b"9" * 5000),
]

# Shapes whose products do not fit into 64 bits, or do so only because of what is negative or nothing.
OVERFLOWING = [[2**32, 2**32], [2**31, 2**33, 1], [2**63 - 1] * 64, [-2, -3], [0, 2**63], [2**64 + 2, 3]]

# Lengths of headers: ordinary, around the longest that the format allows, and absurd.
SMALL_LENGTHS = [0, 1, 2, 7, 8, 100]
LARGE_LENGTHS = [10**8 - 1, 10**8]
ABSURD_LENGTHS = [10**8 + 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def mutant(seed: int, number: int) -> Files:
    """A checkpoint with up to three mutations; the same for the same arguments. Every sixteenth has none."""
    rng = random.Random(f"{seed}/{number}")
    files = dict(rng.choice(VALID))
    for _ in range(rng.choice((1, 1, 2, 3)) if number % 16 else 0):
        rng.choices((_mutate_json, _mutate_header, _mutate_weight_map, _mutate_bytes, _mutate_files), (6, 6, 3, 4, 3))[
            0
        ](rng, files)
    return files


def _mutate_json(rng: random.Random, files: Files) -> None:
    """Changes the JSON of one file as a tree."""
    _change_json(rng, files, rng.choice(sorted(files)), mutate_tree)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of JSON with one place changed."""
    slots = list(_slots(tree))
    if not slots or rng.random() < 0.02:
        return rng.choice(VALUES)
    container, at = rng.choice(slots)
    other, elsewhere = rng.choice(slots)
    match rng.randrange(7):
        case 0:
            _put(container, at, rng.choice(VALUES))
        case 1:
            _put(container, at, _nudged(rng, _get(container, at)))
        case 2:
            del container[at]
        case 3:
            container.insert(rng.randrange(len(container) + 1), container[at])
        case 4 if isinstance(container, Pairs):
            keys = [key for pairs, i in slots if isinstance(pairs, Pairs) for key in [pairs[i][0]]]
            container[at] = (rng.choice((*keys, *HOSTILE_NAMES)), container[at][1])
        case 5:
            _put(container, at, Raw(dumps(_get(other, elsewhere))))
        case _:
            mine, theirs = _get(container, at), Raw(dumps(_get(other, elsewhere)))
            _put(other, elsewhere, Raw(dumps(mine)))
            _put(container, at, theirs)
    return tree


def _nudged(rng: random.Random, value: Any) -> Any:
    """Something close to a value."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice(
                (value + rng.randint(-8, 8), -value, 2 * value, Raw(f"{value}.0"), str(value), value + 2**64)
            )
        case str():
            hostile = rng.choice(HOSTILE_NAMES)
            return rng.choice((value + "\x1b]0;", value.upper(), value[:-1], value * 100, [value], hostile, hostile))
        case list() if not isinstance(value, Pairs):
            return rng.choice((value[::-1], [*value, 1], [1] * 64 + value, [*value, 0], value * 2, []))
    return [value]


def _mutate_header(rng: random.Random, files: Files) -> None:
    """Changes what a header says of tensors, so that it may be still a valid one."""
    names = [name for name in sorted(files) if name.endswith(SUFFIX)]
    if names:
        _change_json(rng, files, rng.choice(names), _mutate_entries)


def _mutate_entries(rng: random.Random, header: Any) -> Any:
    whole = [at for at, (_, entry) in enumerate(header) if _is_whole(entry)] if isinstance(header, Pairs) else []
    if not whole:
        return header
    at = rng.choice(whole)
    entry, other = dict(header[at][1]), dict(header[rng.choice(whole)][1])
    shape, offsets = entry["shape"], entry["data_offsets"]
    match rng.randrange(8):
        case 0:
            entry["data_offsets"] = other["data_offsets"]
        case 1:
            entry["data_offsets"] = [offset + rng.choice((0, -1, 1, 4, -4, 2**63, 2**64)) for offset in offsets]
        case 2:
            entry["data_offsets"] = [*offsets[: rng.randrange(2)], rng.choice(INTEGERS)]
        case 3:
            padded = [1] * (64 - len(shape)) + shape
            entry["shape"] = rng.choice((shape[::-1], [1, *shape], [True, *shape], padded, [1, *padded]))
        case 4:
            entry["shape"] = rng.choice(OVERFLOWING)
        case 5:
            entry["dtype"] = rng.choice(
                ("F32", "I32", "BF16", "F16", "U8", "BOOL", "F4", "F6_E3M2", "C64", "f32", "I4")
            )
        case 6:
            entry |= {"shape": [0, *shape], "data_offsets": offsets[:1] * 2}
        case _:
            entry = other
    header[at] = (header[at][0], Pairs(entry.items()))
    return header


def _is_whole(entry: Any) -> bool:
    """Whether a tensor's entry has its fields, and numbers where they belong."""
    if not isinstance(entry, Pairs) or {key for key, _ in entry} != {"dtype", "shape", "data_offsets"}:
        return False
    fields = dict(entry)
    numbers = (fields["shape"], fields["data_offsets"])
    return all(type(value) is list and all(type(n) is int for n in value) for value in numbers)


def _mutate_weight_map(rng: random.Random, files: Files) -> None:
    """Changes where the index says that a tensor is."""
    if INDEX in files:
        _change_json(rng, files, INDEX, _mutate_places)


def _mutate_places(rng: random.Random, index: Any) -> Any:
    for key, places in index if isinstance(index, Pairs) else ():
        if key == "weight_map" and isinstance(places, Pairs) and places:
            at = rng.randrange(len(places))
            file = rng.choice((*HOSTILE_NAMES, "x.safetensors", "y.safetensors", "z.safetensors"))
            if rng.random() < 0.7:
                places[at] = (places[at][0], file)
            else:
                places.append((rng.choice(("new", "a", *HOSTILE_NAMES)), file))
    return index


def _mutate_bytes(rng: random.Random, files: Files) -> None:
    """Changes the bytes of one file, mostly without changing its length."""
    name = rng.choice(sorted(files))
    head, end = bytearray(files[name].head), files[name].size
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(head) + 1)
        match rng.randrange(5):
            case 0:
                head[at : at + 1] = bytes([rng.randrange(256)])
            case 1 if at < len(head):
                head[at] ^= 1 << rng.randrange(8)
            case 2:
                head[at : at + rng.choice((0, 1, 1, 4))] = rng.choice(TOKENS)
            case 3:
                del head[at : at + rng.choice((1, 1, 2, 50))]
            case _:
                donor = files[rng.choice(sorted(files))].head
                start = rng.randrange(len(donor) + 1)
                head[at : at + 16] = donor[start : start + 16]
    files[name] = File(bytes(head), max(len(head), end + len(head) - len(files[name].head)))


def _mutate_files(rng: random.Random, files: Files) -> None:
    """Changes lengths, removes files, adds some, and gives them other names."""
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    file = files[name]
    match rng.randrange(10):
        case 0:
            size = rng.randrange(file.size + 1)
            files[name] = File(file.head[:size], size)
        case 1:
            files[name] = replace(file, size=file.size + rng.choice((1, 3, 8, 1000, 2**20, 2**40, 2**62)))
        case 2 | 3:
            # Headers of 100 MB are rare, for they take a while. Half of the files are as long as their header claims.
            length = rng.choice(LARGE_LENGTHS if rng.random() < 0.005 else SMALL_LENGTHS + ABSURD_LENGTHS)
            size = rng.choice((file.size, min(8 + length + rng.choice((-1, 0, 4)), 2**63 - 1)))
            head = length.to_bytes(8, "little") + file.head[8:]
            files[name] = File(head, max(size, len(head)))
        case 4 if len(files) > 1:
            del files[name]
        case 5:
            files[rng.choice(("model.safetensors", "other.safetensors", CONFIG, INDEX, *HOSTILE_NAMES))] = file
        case 6:
            files[name], files[other] = files[other], file
        case 7:
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
            files[name] = File(pointer, len(pointer))
        case 8:
            files["new.safetensors"] = tensor_file(rng.randrange(3))
        case _:
            files[name] = File(b"", rng.choice((0, 0, 0, 8, 10**6)))


def _change_json(rng: random.Random, files: Files, name: str, change: Callable[[random.Random, Any], Any]) -> None:
    """Changes a file's JSON, if it has any, and keeps the rest of the file, mostly where the JSON says."""
    file = files[name]
    start = 8 if name.endswith(SUFFIX) else 0
    stop = 8 + int.from_bytes(file.head[:8], "little") if start else len(file.head)
    try:
        tree = json.loads(file.head[start:stop], object_pairs_hook=Pairs)
        text = dumps(change(rng, tree)).encode()
    except (ValueError, RecursionError):  # An earlier mutation has left no JSON, or numbers and depths beyond Python.
        return
    prefix = len(text) if rng.random() < 0.95 else len(text) + rng.choice((-1, 1, 8))
    head = (max(prefix, 0).to_bytes(8, "little") if start else b"") + text + file.head[stop:]
    files[name] = File(head, max(len(head), file.size - len(file.head) + len(head)))


def dumps(node: Any) -> str:
    """JSON text of a tree with `Pairs` and `Raw`, and with other characters as they are."""
    match node:
        case Raw(text):
            return text
        case Pairs():
            return "{" + ", ".join(f"{json.dumps(key)}: {dumps(value)}" for key, value in node) + "}"
        case list():
            return "[" + ", ".join(map(dumps, node)) + "]"
    return json.dumps(node)


def _slots(node: Any) -> Iterator[tuple[Any, int]]:
    """Every place of a value in a tree: the object or list that holds it, and its index there."""
    if isinstance(node, list):
        for at in range(len(node)):
            yield node, at
            yield from _slots(_get(node, at))


def _get(container: Any, at: int) -> Any:
    return container[at][1] if isinstance(container, Pairs) else container[at]


def _put(container: Any, at: int, value: Any) -> None:
    container[at] = (container[at][0], value) if isinstance(container, Pairs) else value
