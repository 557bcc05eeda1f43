"""The encoder of images of Gemma 3: SigLIP's vision tower, and a projector behind it."""

from slicecast.configs.families import blocks, encoder_blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Offset
from slicecast.convert.mapping.table import RuleTable


def add(c: HfConfig, table: RuleTable, hidden: int) -> None:
    """Adds the rules of the tower and the projector.

    Args:
        c: The section `vision_config`.
        table: The table of the whole model.
        hidden: The size of the text model's hidden state.
    """
    width, patch = c.integer("hidden_size"), c.integer("patch_size")
    encoder = table.within(
        "model",
        "vision_encoder",
        None,
        **blocks.heads(c),
        embed_attn=width,
        width=width,
        inner=c.integer("intermediate_size"),
        hidden=hidden,
        positions=(c.integer("image_size") // patch) ** 2,
        # Published configs leave out what transformers has as a default.
        channels=c.integer("num_channels", 3),
        rows=patch,
        columns=patch,
    )
    tower = encoder.within("vision_tower.vision_model", "Gemma3VisionEncoderLayer_0")
    tower.add(
        "embeddings.patch_embedding.weight",
        ":width :channels :rows :columns -> :rows :columns :channels :width",
        "embedding/kernel",
    )
    tower.add("embeddings.patch_embedding.bias", ":width", "embedding/bias")
    tower.add("embeddings.position_embedding.weight", "(:1 :positions) :width -> :1 :positions :width", "pos_embedding")
    for layer in range(c.integer("num_hidden_layers")):
        block = tower.within(f"encoder.layers.{layer}", f"Transformer/encoderblock_{layer}")
        encoder_blocks.layer_norm(block, "layer_norm1", "LayerNorm_0")
        encoder_blocks.layer_norm(block, "layer_norm2", "LayerNorm_1")
        encoder_blocks.attention(block.within("self_attn", "MultiHeadDotProductAttention_0"), "out_proj")
        encoder_blocks.linear(block, "mlp.fc1", "width", "inner", "MlpBlockViT_0/Dense_0")
        encoder_blocks.linear(block, "mlp.fc2", "inner", "width", "MlpBlockViT_0/Dense_1")
    encoder_blocks.layer_norm(tower, "post_layernorm", "Transformer/encoder_norm")
    projector = encoder.within("multi_modal_projector", "VisionEmbedder_0")
    projector.add("mm_input_projection_weight", ":width :hidden", "mm_input_projection/w")
    # A norm of Gemma: published as one less than what it multiplies with, and kept in float32 as those of the text.
    projector.add("mm_soft_emb_norm.weight", "norm:width", "mm_soft_embedding_norm/scale", Offset(1.0), dtype="float32")
