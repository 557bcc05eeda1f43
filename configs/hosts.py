"""Virtual machines that a conversion can be planned for.

Sources: cloud.google.com/compute/docs/general-purpose-machines (n2, c3) and /memory-optimized-machines (m3), tables of
vCPUs, memory and default egress bandwidth. Memory that Google counts in GiB counts here as so many GB, for a margin.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A TPU chip as its host sees it.

    Attributes:
        memory_gb: Its high-bandwidth memory in GB (10**9 bytes).
        memory_gb_per_second: The bandwidth of that memory.
        pcie_gb_per_second: The bandwidth between the host and the chip, in each direction.
        devices: As how many devices JAX shows it; they share the chip's memory evenly.
    """

    memory_gb: int
    memory_gb_per_second: int
    pcie_gb_per_second: int
    devices: int = 1


@dataclass(frozen=True)
class Host:
    """A virtual machine.

    Attributes:
        name: Google Cloud's machine type, or what else people call it.
        vcpus: Its virtual processors.
        memory_gb: Its memory in GB (10**9 bytes).
        network_gb_per_second: The bandwidth of its network, in each direction; None if it is not known.
        chips: How many TPU chips it has.
        chip: What these are.
    """

    name: str
    vcpus: int
    memory_gb: float
    network_gb_per_second: float | None
    chips: int = 0
    chip: Chip | None = None


def _hosts(family: str, gb_per_vcpu: float, gigabits: dict[int, int]) -> list[Host]:
    return [
        Host(f"{family}-{vcpus}", vcpus, gb_per_vcpu * vcpus, gbps / 8)  # Bits to bytes.
        for vcpus, gbps in gigabits.items()
    ]


# By name, the smallest memory first.
CPU_HOSTS: dict[str, Host] = {
    host.name: host
    for host in sorted(
        (
            *_hosts("n2-standard", 4, {2: 10, 4: 10, 8: 16, 16: 32, 32: 32, 48: 32, 64: 32, 80: 32, 96: 32, 128: 32}),
            *_hosts("c3-standard", 4, {4: 23, 8: 23, 22: 23, 44: 32, 88: 62, 176: 100}),
            *_hosts("m3-ultramem", 30.5, {32: 32, 64: 32, 128: 32}),
        ),
        key=lambda host: (host.memory_gb, host.vcpus),
    )
}
