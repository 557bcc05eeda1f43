"""An operation's implementations: their names, and the choice between them."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
from jax import lax

Implementation = Literal["auto", "xla", "pallas_tpu"]
"""`xla` is the definition, in plain JAX. `pallas_tpu` is the TPU kernel, which equals it bit for bit. `auto` is the
kernel where the program is compiled for a TPU and the kernel covers the shape, and the definition everywhere else."""


def choose(
    implementation: Implementation,
    *operands: jax.Array,
    xla: Callable[..., jax.Array],
    pallas_tpu: Callable[..., jax.Array],
    unsupported: str | None,
) -> jax.Array:
    """Calls the implementation that was asked for.

    Args:
      implementation: Which one.
      *operands: What it takes.
      xla: The definition.
      pallas_tpu: The TPU kernel.
      unsupported: Why the TPU kernel does not apply, or None if it does.

    Raises:
      ValueError: "pallas_tpu" does not apply, or there is no such implementation.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {get_args(Implementation)}, not {implementation!r}")
    if implementation == "pallas_tpu":
        if unsupported is not None:
            raise ValueError(f"The Pallas TPU kernel does not apply: {unsupported}.")
        # A kernel that asks for memory spaces cannot run outside of a program.
        y: jax.Array = jax.jit(pallas_tpu)(*operands)
        return y
    if implementation == "xla" or unsupported is not None:
        return xla(*operands)
    # Decided when the program is lowered, so that ahead-of-time compilation for a TPU chooses as the TPU itself would.
    y = lax.platform_dependent(*operands, tpu=pallas_tpu, default=xla)
    return y
