"""What encoders of images and audio have in common: blocks with biases, of whose axes MaxText names few.

MaxText never scans over the layers of an encoder: each is a leaf of its own in scanned trees too, so rules name each.
"""

from slicecast.configs.families import blocks
from slicecast.convert.mapping.table import RuleTable


def layer_norm(table: RuleTable, source: str, target: str, size: str = "width") -> None:
    """A layer norm, with a bias."""
    table.add(f"{source}.weight", f":{size}", f"{target}/scale")
    table.add(f"{source}.bias", f":{size}", f"{target}/bias")


def linear(table: RuleTable, source: str, inputs: str, outputs: str, target: str, *, bias: bool = True) -> None:
    """A linear layer for whose axes MaxText has no names; the sizes of its inputs and outputs."""
    table.add(f"{source}.weight", f":{outputs} :{inputs} -> :{inputs} :{outputs}", f"{target}/kernel")
    if bias:
        table.add(f"{source}.bias", f":{outputs}", f"{target}/bias")


def attention(table: RuleTable, out: str) -> None:
    """Attention in which all projections have biases; `out` is what the one of the result is called."""
    blocks.attention(table, biases=True, names=("q_proj", "k_proj", "v_proj", out))
    table.add(f"{out}.bias", "embed_attn", "out/bias")
