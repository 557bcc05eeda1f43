"""What a piece of work costs in memory, and what a host has. Pure, but for `available_host_bytes`."""

import math
import os
from dataclasses import dataclass, field

from slicecast.configs.hosts import Host
from slicecast.convert.box import Shape

GB = 10**9

# The part of free memory that is used where the user gives no budget; the rest is for the program itself and for
# others.
_DEFAULT_SHARE = 0.75

# Waves in flight at most: one being read, one on the chips, one being compressed, and one waiting, so that no stage
# starves.
MAX_WAVES_IN_FLIGHT = 4

# Larger boxes gain nothing: their reads are long already and their chunks keep every core compressing.
MAX_BOX_BYTES = 512 << 20

# A box takes at most this part of the host's budget, so that several waves fit (see `Costs.host_bytes` for the
# factors).
BOX_SHARE_OF_BUDGET = 16

# Programs on the chips at once: one computing while the next one's bytes go in and the last one's come out.
MAX_DEVICE_SLOTS = 2


@dataclass(frozen=True)
class Machine:
    """The machines that a conversion runs on. All hosts are alike.

    Attributes:
        hosts: How many processes convert, one a host.
        devices: Chips of each host.
        host_bytes: The budget of each host for bytes in flight.
        device_bytes: The budget of each chip; None where devices use the host's memory (a CPU backend).
        host: What each host is, where it matters: for how long a conversion will take.
    """

    hosts: int
    devices: int
    host_bytes: int
    device_bytes: int | None
    host: Host | None = field(default=None, compare=False)

    @classmethod
    def of(cls, host: Host, hosts: int) -> "Machine":
        """So many of these hosts, with the default budgets."""
        host_bytes = default_budget(host.memory_gb * GB)
        if host.chip is None:
            return cls(hosts, 1, host_bytes, None, host)
        device_bytes = default_budget(host.chip.memory_gb * GB / host.chip.devices)
        return cls(hosts, host.chips * host.chip.devices, host_bytes, device_bytes, host)


def default_budget(available_bytes: float) -> int:
    """The budget where the user gives none."""
    return int(available_bytes * _DEFAULT_SHARE)


def budget(gigabytes: float | None, available_bytes: int) -> int:
    """The budget that the user gives in GB, or the default one."""
    return default_budget(available_bytes) if gigabytes is None else int(gigabytes * GB)


@dataclass(frozen=True)
class Costs:
    """The memory that one box needs while it is in flight.

    Attributes:
        in_bytes: Source bytes.
        prepared_bytes: Bytes that go to the chips, after the host's part of decoding.
        out_bytes: Bytes of the output chunks, before compression.
        on_device: Whether the box passes through the chips; a box that only has to be copied does not.
    """

    in_bytes: int
    prepared_bytes: int
    out_bytes: int
    on_device: bool

    def host_bytes(self, machine: Machine) -> int:
        """Peak bytes on the host.

        The source is held once as read, or as prepared where that is more, and once more stacked for the chips; the
        output is held once as it comes back and once compressed, until its transaction is committed (incompressible
        data does not shrink). Where the devices are the host's own CPU, their input is the stacked copy, but their
        output is another copy.
        """
        if not self.on_device:
            return self.in_bytes + self.out_bytes
        device = 0 if machine.device_bytes is not None else self.out_bytes
        return max(self.in_bytes, self.prepared_bytes) + self.prepared_bytes + 2 * self.out_bytes + device

    def device_bytes(self, chips: int) -> int:
        """Peak bytes on each of `chips` chips: input, output, and one intermediate of the output's size."""
        return (self.prepared_bytes + 2 * self.out_bytes) // chips if self.on_device else 0


def chips_used(batch: int, rows: int | None, devices: int) -> Shape:
    """How many chips share a batch of tensors: `(over the batch, over each tensor's rows)`.

    Every chip gets the same share. The batch is divided first, for that leaves whole tensors together.

    Args:
        batch: How many tensors.
        rows: Into how many shares their rows can be divided at most, or None if they cannot.
        devices: The chips there are.
    """
    over_batch = math.gcd(batch, devices)
    over_rows = math.gcd(rows, devices // over_batch) if rows else 1
    return over_batch, over_rows


def row_shares(rows: int | None, unit: int) -> int | None:
    """Into how many shares rows can be divided at most, if `unit` neighbors stay together; None if they cannot."""
    return None if rows is None or rows % unit else rows // unit


def available_host_bytes() -> int:
    """The memory that this host can still give out: of the machine, and of the container if there is a limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass  # Not Linux: the free pages are the best there is.
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(limit_file) as limit:
                available = min(available, int(limit.read()))
        except (OSError, ValueError):
            continue  # No such cgroup version here, or no limit ("max").
    return available
