"""Checks that tensors which are left out because they repeat others do repeat them.

Some releases store the output layer though `config.json` ties it to the embedding. Where the two differ, as after a
fine-tune of the output layer alone, leaving it out would make another model of it.
"""

import jax

from slicecast.convert import hosts
from slicecast.convert.errors import ConfigError
from slicecast.convert.plan import Plan
from slicecast.convert.source.reader import Reader, Span
from slicecast.convert.source.safetensors_header import TensorInfo

# Read at once of each of the two: long reads, in less memory than the smallest budget.
_PIECE_BYTES = 64 << 20


def check(plan: Plan) -> None:
    """Compares each such tensor with the one that it repeats; called by all processes, each of which has a share.

    Raises:
        ConfigError: If two differ.
        ReadError: If storage fails.
    """
    pairs = [pair for ignored in plan.ignored for pair in ignored.copies]
    if pairs:
        hosts.on_all(lambda: _check(plan, pairs, jax.process_index(), jax.process_count()))


def _check(plan: Plan, pairs: list[tuple[TensorInfo, TensorInfo]], process: int, processes: int) -> str:
    reader = Reader(plan.checkpoint.storage)
    for left_out, original in pairs:
        alike = (left_out.dtype, left_out.shape) == (original.dtype, original.shape)
        starts = range(0, left_out.nbytes if alike else 0, _PIECE_BYTES)[process::processes]
        if not alike or not all(_equal(reader, left_out, original, start) for start in starts):
            raise ConfigError(
                f"{left_out.file}: tensor '{left_out.name}' is left out because it should repeat '{original.name}', "
                "but they differ. If the model computes with it, config.json is wrong: an output layer of its own "
                f'needs "tie_word_embeddings": false. If it does not, add --ignore_extra={left_out.name}.'
            )
    return ""


def _equal(reader: Reader, a: TensorInfo, b: TensorInfo, start: int) -> bool:
    nbytes = min(_PIECE_BYTES, a.nbytes - start)
    found, expected = reader.read([Span(tensor.file, tensor.offset + start, nbytes) for tensor in (a, b)])
    return bool((found == expected).all())
