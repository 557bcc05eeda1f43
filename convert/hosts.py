"""The processes of a conversion: how they find each other, and what they must agree on before anything is written."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from slicecast.convert.errors import OutputError, SlicecastError, StorageError, UsageError
from slicecast.convert.memory import Machine

# What `jax.distributed.initialize()` says where nothing tells it of other processes: a machine on its own.
_NO_CLUSTER = "coordinator_address should be defined"

# A process that is silent for this long is taken for dead, and the others end too, to be started again. JAX waits for
# 100 seconds by default; on spot machines, which vanish often, that is time that all others waste.
_HEARTBEAT_SECONDS = 20


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; to be called before JAX is used in any other way.

    On TPU slices, GKE and Slurm, JAX finds the others by itself. Elsewhere all three arguments say where they are;
    without them the process is alone.

    Raises:
        UsageError: If only some of the arguments are given.
    """
    given = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise UsageError("--coordinator_address, --num_processes and --process_id belong together: give all or none.")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UsageError(f"--process_id={process_id} is not one of --num_processes={num_processes}: they count from 0.")
    if all(given):
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
        return
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except ValueError as error:
        if _NO_CLUSTER not in str(error):
            raise


def end_alone(exit_code: int) -> NoReturn:
    """Ends this process after an error, at once: a normal end would wait for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def smallest(machine: Machine) -> Machine:
    """The machine with the smallest budgets of all processes, so that all of them plan alike."""
    if jax.process_count() == 1:
        return machine
    # As bytes, for JAX would make 32-bit numbers of them.
    mine = np.array([machine.host_bytes, machine.device_bytes or 0], np.int64).view(np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(mine)).view(np.int64)
    host_bytes, device_bytes = (int(least) for least in everyones.min(axis=0))
    return dataclasses.replace(
        machine, host_bytes=host_bytes, device_bytes=None if machine.device_bytes is None else device_bytes
    )


def check_agreement(facts: Mapping[str, str]) -> None:
    """Checks that all processes are about to do the same.

    Args:
        facts: What must be equal everywhere, by name.

    Raises:
        UsageError: On every process, if something differs on one.
    """
    if jax.process_count() == 1:
        return
    mine = np.array([list(hashlib.sha256(value.encode()).digest()) for value in facts.values()], np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(mine))
    for i, name in enumerate(facts):
        different = [
            process for process, theirs in enumerate(everyones) if not np.array_equal(theirs[i], everyones[0, i])
        ]
        if different:
            raise UsageError(
                f"processes {different} have another {name} than process 0 (here it is {facts[name]}). Give all "
                "processes the same flags, the same source and the same version of slicecast."
            )


def on_first(function: Callable[[], str]) -> str:
    """What a function returns on process 0, where alone it is called, on all processes.

    Raises:
        OutputError: On every process, if the function raises it.
    """
    if jax.process_count() == 1:
        return function()
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except OutputError as error:
            answer = {type(error).__name__: str(error)}
    encoded = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array([len(encoded)], np.int32))[0])
    padded = np.zeros(length, np.uint8)
    padded[: len(encoded)] = encoded[:length]
    answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    for kind in (OutputError, StorageError):
        if kind.__name__ in answer:
            raise kind(answer[kind.__name__])
    value: str = answer["value"]
    return value


def on_all(function: Callable[[], str]) -> list[str]:
    """What a function returns on each process, on all processes.

    Raises:
        SlicecastError: On every process, with the same exit code, if the function raises one on any.
    """
    if jax.process_count() == 1:
        return [function()]
    answer: dict[str, Any] = {}
    raised = None
    try:
        answer["value"] = function()
    except SlicecastError as error:
        raised = error
        answer = {"error": str(error), "exit_code": error.exit_code}
    answers = [json.loads(text) for text in _gathered(json.dumps(answer))]
    for process, theirs in enumerate(answers):
        if "error" in theirs:
            failure = raised or SlicecastError(f"process {process}: {theirs['error']}")
            failure.exit_code = theirs["exit_code"]
            raise failure
    return [theirs["value"] for theirs in answers]


def _gathered(text: str) -> list[str]:
    """The texts of all processes."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(encoded)], np.int32))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(encoded)] = encoded
    everyones = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8)
    return [theirs[:length].tobytes().decode() for theirs, length in zip(everyones, lengths, strict=True)]


def check_shared(output: epath.Path) -> None:
    """Checks that all processes see the same output directory.

    Raises:
        OutputError: On every process, if one sees another directory.
    """
    if jax.process_count() == 1:
        return
    # Process 0 leaves a file with an unguessable name, which the others must see.
    token = np.frombuffer(secrets.token_bytes(8), np.uint8)
    token = np.asarray(multihost_utils.broadcast_one_to_all(token)).astype(np.uint8)
    witness = output / f".slicecast-{token.tobytes().hex()}"
    if jax.process_index() == 0:
        # Backends of storage have errors of their own. After one nobody sees the file, process 0 neither.
        with contextlib.suppress(Exception):
            output.mkdir(parents=True, exist_ok=True)
            witness.write_text("")
    multihost_utils.sync_global_devices("slicecast: witness written")
    sees = False
    with contextlib.suppress(Exception):
        sees = witness.exists()
    seen = np.asarray(multihost_utils.process_allgather(np.array([sees])))
    multihost_utils.sync_global_devices("slicecast: witness seen")
    if jax.process_index() == 0 and seen.reshape(-1)[0]:
        witness.unlink(missing_ok=True)
    blind = [i for i, saw in enumerate(seen.reshape(-1)) if not saw]
    if blind:
        raise OutputError(
            f"{output}: processes {blind} do not see what process 0 writes there. With several hosts, give an output "
            "directory that all of them share, such as a mounted file system."
        )
