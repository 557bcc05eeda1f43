"""Hostile checkpoints: each is understood as a second, simple parser understands it, or refused with an error of ours.

Files are in memory (`fuzz_checkpoints.py`, `fuzz_mutations.py`), so that everything that is read of them is seen.
"""

import gc
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fuzz_checkpoints import CONFIG, INDEX, SUFFIX, VALID, File, Files, WatchedStorage
from fuzz_limits import assert_can_be_shown, memory_limit, time_limit
from fuzz_mutations import mutant

from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import ConfigError, HeaderError, PlanErrors, SlicecastError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.source import checkpoint, index, safetensors_header
from slicecast.convert.source.checkpoint import SIDE_CONFIGS, Checkpoint, fingerprint, open_checkpoint

SEED = 5
QUICK_CASES = 3_000
CASES = 100_000


# ---- What a checkpoint means, once more


class InvalidError(ValueError):
    """A checkpoint that is to be refused."""


def require(condition: object) -> None:
    """Raises `InvalidError` unless the condition holds."""
    if not condition:
        raise InvalidError


BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8}
BITS |= dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= {f"{kind}{bits}": bits for kind in "UIF" for bits in (16, 32, 64)} | {"BF16": 16, "C64": 64}

Place = tuple[str, str, tuple[int, ...], int, int]


def understand(files: Files) -> tuple[dict[str, Any], dict[str, Any], dict[str, Place]]:
    """The config, the side configs, and for each tensor its file, dtype, shape, first byte and end.

    Raises:
        InvalidError: It is to be refused.
    """
    require(CONFIG in files)
    config = json_object(files[CONFIG])
    side_configs = {name: json_object(files[name]) for name in SIDE_CONFIGS if name in files}
    if INDEX in files:
        places = json_object(files[INDEX]).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise InvalidError
        require(all(name_is_fine(name) and file_is_fine(file) for name, file in places.items()))
        wanted = set(places.values())
        require("model.safetensors" not in files or "model.safetensors" in wanted)
    else:
        places, wanted = None, {name for name in files if name.endswith(SUFFIX)}
    require(wanted and wanted <= files.keys() and all(map(file_is_fine, wanted)))
    tensors: dict[str, Place] = {}
    for file in wanted:
        found = tensors_of(files[file], file)
        require(tensors.keys().isdisjoint(found))
        tensors |= found
    require(places is None or places == {name: place[0] for name, place in tensors.items()})
    return config, side_configs, tensors


def tensors_of(file: File, name: str) -> dict[str, Place]:
    """The tensors of a file."""
    require(file.size >= 8)
    length = int.from_bytes((file.head + bytes(8))[:8], "little")
    start = 8 + length
    require(start <= file.size and file.head[8:9] == b"{")
    entries = json_object(File(file.head[8:start], length))
    metadata = entries.pop("__metadata__", {})
    require(isinstance(metadata, dict) and all(is_text(text) for pair in metadata.items() for text in pair))
    tensors: dict[str, Place] = {}
    for tensor, entry in entries.items():
        require(name_is_fine(tensor) and isinstance(entry, dict))
        require(sorted(entry) == ["data_offsets", "dtype", "shape"])
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        require(isinstance(dtype, str) and dtype in BITS and isinstance(shape, list) and isinstance(offsets, list))
        require(len(shape) <= 64 and len(offsets) == 2)
        require(all(type(number) is int and 0 <= number < 2**63 for number in shape + offsets))
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        require(bits == 8 * (offsets[1] - offsets[0]))
        tensors[tensor] = (name, dtype, tuple(shape), start + offsets[0], start + offsets[1])
    # Every byte of the data belongs to one tensor; tensors without bytes stand between others.
    filled = sorted((begin, end) for *_, begin, end in tensors.values() if begin < end)
    borders = [start, *(end for _, end in filled)]
    require([begin for begin, _ in filled] == borders[:-1] and borders[-1] == file.size)
    require(all(begin in borders for *_, begin, end in tensors.values() if begin == end))
    return tensors


def json_object(file: File) -> dict[str, Any]:
    """The JSON object in a file."""
    require(file.size <= 100_000_000 and file.size == len(file.head))  # Zeros behind the text are no JSON.
    try:
        content = json.loads(file.head.decode(), object_pairs_hook=without_duplicates)
    except RecursionError:
        raise InvalidError from None
    require(isinstance(content, dict) and depth(content) <= 64)
    return dict(content)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that has each key once."""
    keys = [key for key, _ in pairs]
    require(len(keys) == len(set(keys)))
    return dict(pairs)


def depth(value: Any) -> int:
    """How deep objects and lists are nested."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def is_text(value: Any) -> bool:
    """Whether a value is a string of whole characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def name_is_fine(name: Any) -> bool:
    """Whether a name can be shown."""
    return isinstance(name, str) and name.isprintable() and len(name) < 256


def file_is_fine(name: Any) -> bool:
    """Whether a name is one of a file of weights, in this directory, in every kind of storage."""
    return name_is_fine(name) and name.endswith(SUFFIX) and ".." not in name and not set(name) & set("/\\%?#*")


# ---- One case


def check(files: Files, *, believing: bool) -> str:
    """Opens a checkpoint and compares; returns `accepted`, or the class of the first error."""
    try:
        expected = understand(files)
    except (ValueError, RecursionError):
        expected = None
    storage = WatchedStorage(files, believing=believing)
    opened: Checkpoint | None = None
    errors: tuple[SlicecastError, ...] = ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "open_storage", lambda path, revision=None: storage)
        try:
            opened = open_checkpoint("memory")
        except PlanErrors as refusal:
            errors = refusal.errors
    assert storage.violations == []
    if opened is None:
        for error in errors:
            assert isinstance(error, SlicecastError)
            assert_can_be_shown(error)
        assert expected is None, errors
        return type(errors[0]).__name__
    assert expected is not None, "this should have been refused"
    compare(opened, files, *expected)
    assert len(fingerprint(opened)) == 64
    announced = quantization_config.read(opened.config, opened.side_configs)
    if announced is not None:
        assert_can_be_shown(announced.description)
        assert_can_be_shown(announced.refusal)
    return "accepted"


def compare(
    opened: Checkpoint, files: Files, config: dict[str, Any], side_configs: dict[str, Any], tensors: dict[str, Place]
) -> None:
    """Compares a checkpoint with what it means."""
    # By their text, in which NaN is itself.
    assert repr(opened.config) == repr(config)
    assert repr(dict(sorted(opened.side_configs.items()))) == repr(dict(sorted(side_configs.items())))
    found = {t.name: (t.file, t.dtype, t.shape, t.offset, t.offset + t.nbytes) for t in opened.tensors.values()}
    assert list(opened.tensors) == list(found) == sorted(tensors)
    assert found == tensors
    assert opened.file_sizes.keys() >= {place[0] for place in tensors.values()}
    assert all(size == files[file].size for file, size in opened.file_sizes.items())


def run(cases: range) -> Counter[str]:
    """Checks cases; returns how many had which result."""
    outcomes: Counter[str] = Counter()
    for number in cases:
        if number % 100 == 0:
            gc.collect()  # An error and the frames that it comes from hold each other, and the threads of a reader.
        try:
            with time_limit():
                outcomes[check(mutant(SEED, number), believing=number % 2 == 0)] += 1
        except Exception as error:
            error.add_note(f"mutant({SEED}, {number})")
            raise
    return outcomes


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Lets the process have little more memory than it has."""
    run(range(100))  # Threads reserve memory when they first allocate.
    with memory_limit():
        yield


# ---- The tests


def test_valid_checkpoints_are_accepted() -> None:
    for files in VALID:
        assert check(files, believing=False) == "accepted"


@pytest.mark.usefixtures("little_memory")
def test_some_mutants() -> None:
    assert_varied(run(range(QUICK_CASES)))


@pytest.mark.campaign
@pytest.mark.usefixtures("little_memory")
def test_many_mutants() -> None:
    outcomes = run(range(CASES))
    print(*outcomes.most_common(), sep="\n")
    assert_varied(outcomes)


def assert_varied(outcomes: Counter[str]) -> None:
    """The mutations reach every kind of refusal, and leave enough valid, or they would prove nothing."""
    kinds = {"ConfigError", "HeaderError", "MissingFileError", "TruncatedFileError", "OffsetError"}
    kinds |= {"DuplicateTensorError", "UnsupportedFormatError"}
    assert outcomes.keys() == kinds | {"accepted"}
    assert all(count > outcomes.total() // 500 for count in outcomes.values()), outcomes
    assert outcomes["accepted"] > outcomes.total() // 10


# Bugs: a function, a part of its text, and what stands there instead.
BUGS: dict[str, tuple[ModuleType, str, str, str]] = {
    "overlaps": (safetensors_header, "parse_header", "tensor.offset != position", "tensor.offset > position"),
    "holes": (safetensors_header, "parse_header", "tensor.offset != position", "tensor.offset < position"),
    "ends": (safetensors_header, "parse_header", "position != file_size", "position > file_size"),
    "lengths": (safetensors_header, "_parse_entry", "bits != 8 * (end - begin)", "bits > 8 * (end - begin)"),
    "bools": (safetensors_header, "_are_sizes", "type(size) is int", "isinstance(size, int)"),
    "names": (safetensors_header, "_parse_entry", "not is_name(name)", "False"),
    "header lengths": (safetensors_header, "header_nbytes", "nbytes > MAX_HEADER_BYTES", "False"),
    "repeated keys": (safetensors_header, "load_json", "object_pairs_hook=_unique", "object_pairs_hook=dict"),
    "depth": (safetensors_header, "load_json", "if level:", "if False:"),
    "encoding": (safetensors_header, "load_json", '"utf-8"', '"latin-1"'),
    "paths": (index, "parse_index", "not _is_plain(file)", "not isinstance(file, str)"),
    "URLs": (index, "_is_plain", "and _NOT_IN_FILES.isdisjoint(file)", ""),
    "config lengths": (checkpoint, "_read_json", "size > MAX_JSON_BYTES", "False"),
    "control characters": (quantization_config, "_refused", "clip(what)", "what"),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    module, name, old, new = BUGS[bug]
    function = getattr(module, name)
    wrong = altered(function, old, new)
    for user in (safetensors_header, index, checkpoint, quantization_config):
        if getattr(user, name, None) is function:
            monkeypatch.setattr(user, name, wrong)
    with pytest.raises((AssertionError, MemoryError, RecursionError, TypeError)) as error:
        run(range(QUICK_CASES))
    print(f"{bug}: {error.value.__notes__[0]}: {str(error.value)[:100]}")


def altered(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """A function with other text in one place."""
    source = inspect.getsource(function)
    assert source.count(old) == 1
    namespace = dict(function.__globals__)
    exec(source.replace(old, new), namespace)
    wrong: Callable[..., Any] = namespace[function.__name__]
    return wrong


# ---- What the campaign has found, and what only a disk has


def on_disk(directory: Path, files: Files) -> Path:
    """Writes files, as sparse ones where they are long."""
    for name, file in files.items():
        (directory / name).write_bytes(file.head)
        os.truncate(directory / name, file.size)
    return directory


def refusals(directory: Path) -> tuple[SlicecastError, ...]:
    """The errors of a checkpoint on a disk, each of which can be shown."""
    with pytest.raises(PlanErrors) as raised:
        open_checkpoint(str(directory))
    for error in raised.value.errors:
        assert_can_be_shown(error)
    return raised.value.errors


@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_json_of_a_terabyte(tmp_path: Path, file: str) -> None:
    on_disk(tmp_path, VALID[1] | {file: File(b"{}", 10**12)})
    (error,) = refusals(tmp_path)
    assert type(error) is (ConfigError if file == CONFIG else HeaderError)
    assert f"{file}: found 1000000000000 bytes, expected at most 100000000 of JSON" in str(error)


@pytest.mark.parametrize(
    "text", ['{"a": ' * 64 + "[]" + "}" * 64, '{"a": ' + "[" * 64 + "]" * 64 + "}"], ids=["{", "["]
)
def test_json_that_is_nested_too_deeply(tmp_path: Path, text: str) -> None:
    """Python's parser takes it, and some deeper text that its encoder then does not."""
    on_disk(tmp_path, VALID[0] | {CONFIG: File(text.encode(), len(text))})
    assert "the JSON is nested more than 64 levels deep" in str(*refusals(tmp_path))
    flatter = text.replace("[]", "1").encode()
    on_disk(tmp_path, VALID[0] | {CONFIG: File(flatter, len(flatter))})
    fingerprint(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\u202ea", "n" * 256], ids=ascii)
def test_names_of_tensors_that_cannot_be_shown(tmp_path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}).encode()
    file = File(len(header).to_bytes(8, "little") + header, 8 + len(header) + 1)
    on_disk(tmp_path, {CONFIG: VALID[0][CONFIG], "model.safetensors": file})
    assert list(map(type, refusals(tmp_path))) == [HeaderError]
    index_text = json.dumps({"weight_map": {name: "model.safetensors"}}).encode()
    on_disk(tmp_path, {INDEX: File(index_text, len(index_text))})
    assert {type(error) for error in refusals(tmp_path)} == {HeaderError}


@pytest.mark.parametrize(
    "name", ["x\x1b[2J.safetensors", "x\n.safetensors", os.fsdecode(b"\xff.safetensors")], ids=ascii
)
def test_names_of_files_that_cannot_be_shown(tmp_path: Path, name: str) -> None:
    on_disk(tmp_path, {CONFIG: VALID[0][CONFIG], name: VALID[0]["model.safetensors"]})
    assert "Rename it" in str(*refusals(tmp_path))


@pytest.mark.parametrize("special", ["pipe", "directory", "device", "loop", "nothing"])
@pytest.mark.parametrize("file", [CONFIG, INDEX, "x.safetensors"])
def test_what_is_no_file(tmp_path: Path, file: str, special: str) -> None:
    """Nothing is waited for, and nothing endless is read."""
    path = on_disk(tmp_path, VALID[1]) / file
    path.unlink()
    match special:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case _:
            path.symlink_to(tmp_path / "nothing")
    with time_limit():
        refusals(tmp_path)


def test_links_lead_out_of_the_directory(tmp_path: Path) -> None:
    """The Hub's cache is made of links. They are the user's: a repository's files cannot be any."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for name in on_disk(blobs, VALID[1]).iterdir():
        (snapshot / name.name).symlink_to(name)
    assert fingerprint(open_checkpoint(str(snapshot))) == fingerprint(open_checkpoint(str(blobs)))


@pytest.mark.parametrize(
    "value", [2**31, 10**4000, [[[[1] * 9] * 9] * 9] * 9, "\x1b[2J" * 1000], ids=["2e9", "4000", "[", "x"]
)
def test_values_of_a_config_that_cannot_be(value: Any) -> None:
    """Products of endless numbers cannot even be printed; others would fill the screen, or clear it."""
    with pytest.raises(ConfigError) as error:
        HfConfig({"hidden_size": value}).integer("hidden_size")
    assert_can_be_shown(error.value)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_routed_experts"])
def test_more_layers_or_experts_than_can_be_listed(name: str) -> None:
    assert HfConfig({name: 4096}).integer(name) == 4096
    with pytest.raises(ConfigError, match=f"'{name}' is 4097; a whole number from 1 to 4096 is expected"):
        HfConfig({name: 4097}).integer(name)
