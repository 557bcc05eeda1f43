"""The encoder of images of Gemma 4: a tower like the text model, and a projector behind it."""

from slicecast.configs.families import blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.table import RuleTable


def add(c: HfConfig, table: RuleTable, hidden: int) -> None:
    """Adds the rules of the tower and the projector.

    Args:
        c: The section `vision_config`.
        table: The table of the whole model.
        hidden: The size of the text model's hidden state.
    """
    c.refuse("attention_bias", False, why="MaxText's Gemma attention has no bias.")
    c.refuse("standardize", True, why="MaxText's Gemma 4 standardizes what its vision tower gives.")
    c.refuse("use_clipped_linears", False, why="MaxText's vision tower does not clip.")
    width = c.integer("hidden_size")
    encoder = table.within(
        "model",
        "vision_encoder",
        None,
        **blocks.heads(c),
        **dict.fromkeys(("embed", "embed_attn", "norm", "width"), width),
        mlp=c.integer("intermediate_size"),
        hidden=hidden,
        # Hugging Face and MaxText both flatten patches by rows, columns and colors, in this order.
        pixels=3 * c.integer("patch_size") ** 2,
        positions=c.integer("position_embedding_size"),
    )
    tower = encoder.within("vision_tower", "Gemma4VisionEncoderLayer_0")
    tower.add(
        "patch_embedder.input_proj.weight", ":width :pixels -> :pixels :width", "vision_entry/input_projection/kernel"
    )
    tower.add(
        "patch_embedder.position_embedding_table",
        ":2 :positions :width -> :positions :2 :width",
        "vision_entry/pos_emb_param",
    )
    tower.add("std_bias", ":width", "std_bias")
    tower.add("std_scale", ":width", "std_scale")
    # MaxText does not scan over these layers: each is a leaf of its own in scanned trees too.
    for layer in range(c.integer("num_hidden_layers")):
        block = tower.within(f"encoder.layers.{layer}", f"layer_{layer}")
        block.add("input_layernorm.weight", "norm", "pre_attention_norm/scale")
        block.add("post_attention_layernorm.weight", "norm", "post_attention_norm/scale")
        block.add("pre_feedforward_layernorm.weight", "norm", "pre_ffw_norm/scale")
        block.add("post_feedforward_layernorm.weight", "norm", "post_ffw_norm/scale")
        attention = block.within("self_attn", "attention")
        blocks.attention(attention, names=("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"))
        attention.add("q_norm.weight", "norm:kv", "query_norm/scale")
        attention.add("k_norm.weight", "norm:kv", "key_norm/scale")
        blocks.mlp(block.within("mlp", "mlp"), ("gate_proj.linear", "up_proj.linear", "down_proj.linear"))
    encoder.add(
        "embed_vision.embedding_projection.weight",
        "mlp:hidden embed -> embed mlp:hidden",
        "Gemma4VisionProjector_0/projection/kernel",
    )
