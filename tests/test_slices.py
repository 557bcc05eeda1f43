"""The machines that can be planned for by name."""

import dataclasses

import pytest

from slicecast.configs import slices
from slicecast.configs.hosts import CPU_HOSTS
from slicecast.configs.slices import GENERATIONS, Slice
from slicecast.convert import commands
from slicecast.convert.errors import UsageError
from slicecast.convert.memory import GB, Machine
from slicecast.convert.settings import Settings


@pytest.mark.parametrize(
    ("name", "machine_type", "hosts", "chips", "devices"),
    [
        ("v4-8", "ct4p-hightpu-4t", 1, 4, 4),
        ("v4-32", "ct4p-hightpu-4t", 4, 16, 4),
        ("v5e-1", "ct5lp-hightpu-1t", 1, 1, 1),
        ("v5e-4", "ct5lp-hightpu-4t", 1, 4, 4),
        ("v5e-8", "ct5lp-hightpu-8t", 1, 8, 8),
        ("v5litepod-16", "ct5lp-hightpu-4t", 4, 16, 4),
        ("v5litepod-256", "ct5lp-hightpu-4t", 64, 256, 4),
        ("v5p-8", "ct5p-hightpu-4t", 1, 4, 4),
        ("v5p-128", "ct5p-hightpu-4t", 16, 64, 4),
        ("v5p-24", "ct5p-hightpu-4t", 3, 12, 4),
        ("v5p-12288", "ct5p-hightpu-4t", 1536, 6144, 4),
        ("v6e-1", "ct6e-standard-1t", 1, 1, 1),
        ("v6e-8", "ct6e-standard-8t", 1, 8, 8),
        ("v6e-16", "ct6e-standard-4t", 4, 16, 4),
        # Its names count TensorCores, and so does JAX.
        ("tpu7x-8", "tpu7x-standard-4t", 1, 4, 8),
        ("tpu7x-128", "tpu7x-standard-4t", 16, 64, 8),
    ],
)
def test_names(name: str, machine_type: str, hosts: int, chips: int, devices: int) -> None:
    found = slices.parse(name)
    assert (found.name, found.host.name, found.hosts, found.chips) == (name, machine_type, hosts, chips)
    machine = Machine.of(found.host, found.hosts)
    assert (machine.hosts, machine.devices) == (hosts, devices)
    assert found.host.chip is not None
    assert machine.device_bytes is not None
    # All devices of a chip together get three quarters of its memory.
    assert machine.device_bytes * devices == found.host.chip.memory_gb * found.host.chips * GB * 3 // 4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e-2", "v5e has 1, 4, 8, 16, 32, 64, 128, 256."),
        ("v5e-512", "v5e has 1, 4, 8, 16, 32, 64, 128, 256."),
        ("v5e-0", "v5e has 1, 4"),
        ("v5p-4", "v5p has 8, 16, 32, "),
        ("v5p-9", "and other multiples of 8."),
        ("v5p-0", "v5p has 8"),
        ("v5p-12296", "v5p has 8"),
        ("tpu7x-4", "tpu7x has 8, 16, "),
        ("v7-8", "Generations: tpu7x, v4, v5e, v5litepod, v5p, v6e."),
        ("v5e", "an example is v5e-16"),
        ("n2-standard-33", "an example is v5e-16"),
    ],
)
def test_names_of_nothing(name: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        commands.machine_for_planning(Settings(hf_model_path="x", slice=name))
    assert f"--slice={name} is no TPU slice" in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_slice_has_its_own_name(generation: str) -> None:
    found = slices.of_generation(generation)
    assert [slices.parse(each.name) for each in found] == list(found)
    chips = [each.chips for each in found]
    assert chips == sorted(set(chips)) == list(GENERATIONS[generation].chips)
    for each in found:
        assert each.hosts == 1 or each.host == GENERATIONS[generation].host


def test_more_chips_have_more_of_everything() -> None:
    """Within a generation, every machine has the same chips, and processors, memory and network for each of them."""
    for generation in GENERATIONS.values():
        for host in (generation.host, *generation.single_hosts):
            assert host.chip == generation.host.chip
            assert host.network_gb_per_second is not None
            assert generation.host.network_gb_per_second is not None
            assert host.network_gb_per_second * generation.host.chips == (
                generation.host.network_gb_per_second * host.chips
            )


def test_a_slice_without_chips_has_no_memory() -> None:
    assert Slice("none", CPU_HOSTS["n2-standard-32"], 1).memory_gb == 0
    assert slices.parse("v5e-16").memory_gb == 16 * 16


def test_cpu_hosts() -> None:
    host = CPU_HOSTS["n2-standard-32"]
    assert (host.vcpus, host.memory_gb, host.network_gb_per_second) == (32, 128, 4)
    assert CPU_HOSTS["m3-ultramem-128"].memory_gb == 3904
    assert [each.memory_gb for each in CPU_HOSTS.values()] == sorted(each.memory_gb for each in CPU_HOSTS.values())
    settings = Settings(hf_model_path="x", slice="n2-standard-32", device_memory_gb=3)
    assert commands.machine_for_planning(settings) == Machine(1, 1, 96 * GB, None)
    settings = dataclasses.replace(settings, hosts=4, host_memory_gb=7.5)
    assert commands.machine_for_planning(settings) == Machine(4, 1, 15 * GB // 2, None)
