"""Ahead-of-time compilation for TPUs on a machine that has none.

The compiler ships in the package `libtpu`, and one process can compile for every generation. This proves that a program
compiles and fits the device's memories. It says nothing about numerics or speed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""The smallest whole host of each generation: four chips."""

ENVIRONMENT = {
    # Ask nothing of the cloud's metadata server: there is none, and each query would wait for a timeout.
    "TPU_SKIP_MDS_QUERY": "1",
    # No TPU is opened, so several processes may load the library at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What the metadata server would have said. The topology named in the call decides what is compiled.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What the library reads from the environment when it loads."""


@functools.cache
def devices(generation: str) -> Sequence[jax.Device]:
    """Returns the described, absent devices of one host of a TPU generation.

    Args:
      generation: A key of `TOPOLOGIES`.

    Raises:
      ModuleNotFoundError: `libtpu` is not installed.
    """
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("compiling for a TPU needs the package libtpu")
    library = pathlib.Path(spec.origin).with_name("libtpu.so")
    for name, value in {**ENVIRONMENT, "TPU_LIBRARY_PATH": str(library)}.items():
        os.environ.setdefault(name, value)
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices)


def compile_for(generation: str, function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """Compiles `function` for one TPU device.

    Args:
      generation: A key of `TOPOLOGIES`.
      function: A function of arrays.
      *arguments: The arrays' shapes and dtypes.

    Returns:
      The compiled program, which can be inspected but not run.
    """
    sharding = SingleDeviceSharding(devices(generation)[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    return jax.jit(function).lower(*placed).compile()
