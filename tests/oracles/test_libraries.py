"""Every format decodes what its own library decodes, from tensors that the library has just written.

Run by scripts/test_oracles.sh. The numbers are new in each run.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import oracle_bitsandbytes
import oracle_compressed_tensors
import oracle_gptqmodel
import oracle_mlx
import oracle_modelopt
import oracle_transformers
import pytest
import stored
import torch
from compare import differing
from formats import Format, Shape, random_weight, write_checkpoint
from torch import Tensor

pytestmark = pytest.mark.oracle

LIBRARIES = (
    oracle_compressed_tensors,
    oracle_transformers,
    oracle_modelopt,
    oracle_gptqmodel,
    oracle_bitsandbytes,
    oracle_mlx,
)
CASES = [
    pytest.param(form, shape, id=f"{form.name}-{'x'.join(map(str, shape))}")
    for library in LIBRARIES
    for form in library.FORMATS
    for shape in form.shapes
]


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A float32 or bfloat16 tensor as an array of that dtype."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_decodes_what_the_library_decodes(form: Format, shape: Shape, seed: int, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(seed)
    quantized = form.quantize(random_weight(shape, random), random)
    tensors = {f"m.{name}": tensor for name, tensor in quantized.tensors.items()}
    directory = write_checkpoint(tmp_path / "checkpoint", tensors, form.config)
    name, weight = f"m.{form.parameter}", quantized.weight
    assert weight.shape == shape
    assert weight.count_nonzero() > 0, "a weight of zeros shows nothing"

    options = {"zeros_have_signs": form.zeros_have_signs}
    rounded = as_numpy(weight.bfloat16())
    expected = stored.expected(directory, name, shape)
    assert differing(stored.decode(directory, name, shape), rounded, **options) == 0
    assert differing(expected.astype(ml_dtypes.bfloat16), rounded, **options) == 0
    if weight.dtype == torch.float32:
        assert differing(stored.decode(directory, name, shape, dtype="float32"), as_numpy(weight), **options) == 0
        assert differing(expected, as_numpy(weight), **options) == 0
