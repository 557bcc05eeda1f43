"""A converted checkpoint has the bits that MaxText's own converter writes, for the models that it can convert.

MaxText 0.2.5 does not convert Gemma 1, Llama 2, 3 and 4, and Mistral; it fails with the scanned layers of Mixtral and
of DeepSeek V2, V3 and V3.2. All others are compared, in both dtypes. Every difference that there is stands here:

* Without torch, which would not fit beside it, MaxText's converter leaves float32 weights as they are. They are cast.
* A few leaves are float32 here whatever is asked for, and in MaxText as in the source; their values are the same.
* MaxText's converter scales the queries of Gemma 2 27B as those of the smaller ones, by the width of a head.
* Some variables are in collections of their own, where MaxText 0.2.5 itself does not find them.
"""

from pathlib import Path

import numpy as np
import oracle
import pytest
from case import SAVE_DTYPES, Case, Layout, SaveDtype, items
from cases import CASES
from safetensors.numpy import load_file

pytestmark = pytest.mark.maxtext

# MaxText's converter has the first two in the source's dtype, and the experts of a token as integers.
_FLOAT32_HERE = ("A_log", "dt_bias", "tid2eid")


@pytest.mark.parametrize("save_dtype", SAVE_DTYPES)
@pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(case, layout, id=f"{case.name}-{layout}") for case in CASES for layout in case.own_converter],
)
def test_bits_equal_maxtexts_own_conversion(case: Case, layout: Layout, save_dtype: SaveDtype, sources: Path) -> None:
    folder = sources / case.name
    ours = oracle.read_disk(items(folder, "slicecast", save_dtype, layout))
    written = oracle.read_collections(items(folder, "maxtext", save_dtype, layout))
    theirs = {path.partition("/")[2]: array for path, array in written.items()}
    assert len(theirs) == len(written)
    assert ours.keys() == theirs.keys()
    if case.name == "gemma2_27b":
        queries = _queries_scaled_by_head_dim(case, layout, folder)
        assert {path for path in ours if path.endswith("query/kernel")} == queries.keys()
        ours |= {path: query.astype(ours[path].dtype) for path, query in queries.items()}
    for path, array in theirs.items():
        mine = ours[path]
        if path.endswith(_FLOAT32_HERE):
            assert mine.dtype == np.float32, path
            mine = mine.astype(array.dtype)
        elif case.dtype == "float32" and array.dtype == np.float32:
            array = array.astype(mine.dtype)
        assert mine.dtype == array.dtype, path
        np.testing.assert_array_equal(mine, array, err_msg=path)


def _queries_scaled_by_head_dim(case: Case, layout: Layout, folder: Path) -> oracle.Tree:
    """Returns what MaxText's converter makes of the queries of Gemma 2."""
    tensors = {name: tensor for path in folder.glob("hf/*.safetensors") for name, tensor in load_file(path).items()}
    heads, head_dim = case.config["num_attention_heads"], case.config["head_dim"]
    queries = {}
    for place, kind in enumerate(("local", "global")):
        pairs = []
        for layer in range(place, case.config["num_hidden_layers"], 2):
            weight = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
            pairs.append(weight.T.reshape(-1, heads, head_dim) * np.float32(head_dim**-0.5))
        leaf = f"self_attention_{kind}/query/kernel"
        if layout == "scanned":
            queries[f"decoder/layers/{leaf}"] = np.stack(pairs, 1)
        else:
            queries |= {f"decoder/layers_{pair}/{leaf}": query for pair, query in enumerate(pairs)}
    return queries
