"""Converts checkpoints that the formats' own libraries have written, with the command line.

Each result equals, leaf by leaf and bit by bit, the conversion of the same weights dequantized by the library, and
`verify` agrees. Run by scripts/test_oracles.sh. The numbers are new in each run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import jax
import numpy as np
import oracle_compressed_tensors
import oracle_gptqmodel
import oracle_mlx
import oracle_modelopt
import oracle_transformers
import orbax.checkpoint as ocp
import pytest
import torch
from compare import differing
from formats import Format, write_checkpoint
from models import (
    DEEPSEEK,
    GPT_OSS,
    LLAMA,
    Write,
    bitsandbytes,
    build,
    compressed_tensors,
    every_matrix,
    experts,
    modelopt,
    tensor_by_tensor,
    tensors_on_disk,
)

pytestmark = pytest.mark.oracle

LIBRARIES = (oracle_compressed_tensors, oracle_transformers, oracle_modelopt, oracle_gptqmodel, oracle_mlx)
FORMATS: dict[str, Format] = {form.name: form for library in LIBRARIES for form in library.FORMATS}


@dataclass(frozen=True)
class Case:
    """A model in a format.

    Attributes:
        name: What the test is called.
        write: Who writes it.
        model_type: What transformers calls the model.
        config: Its sizes.
        zeros_have_signs: False if the library makes every zero positive.
    """

    name: str
    write: Write
    model_type: str = "llama"
    config: Mapping[str, Any] | None = None
    zeros_have_signs: bool = True


def deepseek(name: str) -> Case:
    """DeepSeek-V3 with all layers but the router quantized, tensor by tensor."""
    form = FORMATS[name]
    return Case(f"deepseek-{name}", tensor_by_tensor(form), "deepseek_v3", DEEPSEEK, form.zeros_have_signs)


CASES = (
    *(
        Case(f"compressed-tensors-{preset}", compressed_tensors(preset))
        for preset in (
            "W3A16",
            "W4A16",
            "W4A16_ASYM",
            "W8A16",
            "W8A8",
            "FP8",
            "FP8_DYNAMIC",
            "FP8_BLOCK",
            "NVFP4A16",
            "NVFP4",
            "MXFP4A16",
            "MXFP8A16",
        )
    ),
    *(
        Case(f"modelopt-{recipe}", modelopt(recipe), zeros_have_signs=False)
        for recipe in (
            "FP8_DEFAULT_CFG",
            "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
            "MXFP8_DEFAULT_CFG",
            "NVFP4_DEFAULT_CFG",
        )
    ),
    *(
        Case(f"bitsandbytes-{kind}-{'nested' if nested else 'flat'}", bitsandbytes(kind, nested))
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    ),
    *(
        Case(name, tensor_by_tensor(FORMATS[name]))
        for name in (
            "transformers-fp8-float32",
            "transformers-fp8-ue8m0",
            "gptq-v1-int4-in-order-group128-symmetric",
            "gptq-v1-int4-desc_act-group128-symmetric",
            "gptq-v2-int4-in-order-group32-asymmetric",
            "gptq-v1-int8-in-order-group128-symmetric",
            "awq-group128",
        )
    ),
    *(
        Case(name, tensor_by_tensor(FORMATS[name], every_matrix))
        for name in ("mlx-4-group64-bf16", "mlx-6-group64-f16")
    ),
    deepseek("deepseek-128x128-float32"),
    deepseek("deepseek-32x32-float8_e8m0fnu"),
    deepseek("pack-quantized-4-symmetric-group32-bf16"),
    deepseek("mxfp4-pack-quantized"),
    deepseek("nvfp4-pack-quantized"),
    deepseek("modelopt-nvfp4"),
    deepseek("deepseek-v4-fp4"),
    Case("gpt-oss", tensor_by_tensor(FORMATS["gpt-oss"], experts), "gpt_oss", GPT_OSS),
)


def read_leaves(directory: Path) -> dict[str, np.ndarray]:
    """The leaves of a converted checkpoint by path, read by Orbax."""
    items = directory / "0" / "items"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {"params": {"params": checkpointer.metadata(items).item_metadata.tree["params"]["params"]}}
        to_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(items, item=tree, restore_args=to_numpy, transforms={})
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def converted(
    run_slicecast: Callable[..., CompletedProcess[str]], source: Path, out: Path, save_dtype: str
) -> dict[str, np.ndarray]:
    """The leaves that the command line makes of a checkpoint, which `verify` has agreed to."""
    arguments = (f"--base_output_directory={out}", f"--save_dtype={save_dtype}", "--simulated_cpu_devices_count=2")
    run_slicecast("convert", f"--hf_model_path={source}", *arguments)
    run_slicecast("verify", out, f"--hf_model_path={source}")
    return read_leaves(out)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_conversion_of_what_the_library_dequantizes(
    case: Case, seed: int, tmp_path: Path, run_slicecast: Callable[..., CompletedProcess[str]]
) -> None:
    random = torch.Generator().manual_seed(seed)
    model = build(case.model_type, case.config or LLAMA, random)
    plain, config = tensors_on_disk(model)
    weights = case.write(model, tmp_path / "quantized", random)
    assert weights.keys() == plain.keys()
    changed = [name for name in weights if not torch.equal(weights[name].float(), plain[name].float())]
    assert changed, "nothing is quantized"
    write_checkpoint(tmp_path / "dequantized", weights, config)

    save_dtype = "bfloat16" if any(weights[name].dtype == torch.bfloat16 for name in changed) else "float32"
    found = converted(run_slicecast, tmp_path / "quantized", tmp_path / "found", save_dtype)
    wanted = converted(run_slicecast, tmp_path / "dequantized", tmp_path / "wanted", save_dtype)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert differing(found[path], leaf, zeros_have_signs=case.zeros_have_signs) == 0, path
