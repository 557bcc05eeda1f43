"""Machines that a conversion can be planned for by name.

Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, tables of the virtual machines of multi-host slices.
In slice names, v4, v5p and tpu7x count TensorCores (two a chip), the others chips.
"""

import re
from dataclasses import dataclass

from slicecast.convert.errors import UsageError


@dataclass(frozen=True)
class TpuGeneration:
    """One generation's virtual machine in a multi-host slice.

    Attributes:
        chips_per_host: Chips of a host.
        host_gb: The host's memory in GB (10**9 bytes).
        chip_gb: Each chip's high-bandwidth memory in GB.
        cores_per_chip: How much a chip counts in the name of a slice.
    """

    chips_per_host: int
    host_gb: int
    chip_gb: int
    cores_per_chip: int = 1


GENERATIONS = {
    "v4": TpuGeneration(4, 400, 32, 2),
    "v5e": TpuGeneration(4, 192, 16),
    "v5litepod": TpuGeneration(4, 192, 16),
    "v5p": TpuGeneration(4, 448, 95, 2),
    "v6e": TpuGeneration(4, 720, 32),
    "tpu7x": TpuGeneration(4, 960, 192, 2),
}


@dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
        generation: Its chips and hosts.
        chips: How many chips it has.
    """

    generation: TpuGeneration
    chips: int

    @property
    def hosts(self) -> int:
        """How many hosts it has."""
        return -(-self.chips // self.generation.chips_per_host)

    @property
    def chips_of_each_host(self) -> int:
        """Chips of each host."""
        return self.chips // self.hosts


def parse(name: str) -> Slice:
    """The slice of a name such as `v5e-16`, `v5litepod-16` or `v5p-128`.

    Raises:
        UsageError: If there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    generation = GENERATIONS.get(match[1]) if match else None
    cores = int(match[2]) if match else 0
    if generation is not None and cores > 0 and cores % generation.cores_per_chip == 0:
        described = Slice(generation, cores // generation.cores_per_chip)
        if described.chips == described.hosts * described.chips_of_each_host:
            return described
    raise UsageError(
        f"--slice={name} is no TPU slice; an example is v5e-16. Generations: {', '.join(sorted(GENERATIONS))}."
    )
