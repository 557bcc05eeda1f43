"""The names of an operation's implementations."""

from typing import Literal

Implementation = Literal["auto", "xla", "pallas_tpu"]
"""`xla` is the definition, in plain JAX. `pallas_tpu` is the TPU kernel, which equals it bit for bit. `auto` is the
kernel where the program is compiled for a TPU and the kernel covers the shape, and the definition everywhere else."""
