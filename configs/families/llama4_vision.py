"""The encoder of images of Llama 4: a vision tower, a pixel shuffle, and a projector behind it."""

from slicecast.configs.families import blocks, encoder_blocks
from slicecast.convert.mapping.hf_config import HfConfig
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
        "",
        "vision_encoder",
        None,
        **blocks.heads(c),
        embed_attn=width,
        width=width,
        inner=c.integer("intermediate_size"),
        projected=c.integer("projector_input_dim"),
        projected_out=c.integer("projector_output_dim"),
        vision_output=c.integer("vision_output_dim"),
        hidden=hidden,
        # Hugging Face and MaxText both flatten patches by colors, rows and columns, in this order.
        pixels=c.integer("num_channels", 3) * patch**2,
        # One for the class token.
        positions=(c.integer("image_size") // patch) ** 2 + 1,
    )
    tower = encoder.within("vision_model", "Llama4VisionModel_0")
    tower.add("class_embedding", ":width", "class_embedding")
    tower.add("positional_embedding_vlm", ":positions :width", "positional_embedding_vlm")
    unfold = "Llama4UnfoldConvolution_0/vit_unfold_linear"
    encoder_blocks.linear(tower, "patch_embedding.linear", "pixels", "width", unfold, bias=False)
    encoder_blocks.layer_norm(tower, "layernorm_pre", "layernorm_pre")
    encoder_blocks.layer_norm(tower, "layernorm_post", "layernorm_post")
    for layer in range(c.integer("num_hidden_layers")):
        block = tower.within(f"model.layers.{layer}", f"Llama4VisionEncoder_0/layers_{layer}")
        encoder_blocks.layer_norm(block, "input_layernorm", "input_layer_norm")
        encoder_blocks.layer_norm(block, "post_attention_layernorm", "post_attention_layer_norm")
        encoder_blocks.attention(block.within("self_attn", "self_attention_vision"), "o_proj")
        mlp = block.within("mlp", "Llama4VisionMLP_0")
        encoder_blocks.linear(mlp, "fc1", "width", "inner", "vit_encoder_layer_mlp_fc1")
        encoder_blocks.linear(mlp, "fc2", "inner", "width", "vit_encoder_layer_mlp_fc2")
    shuffle = tower.within("vision_adapter.mlp", "Llama4VisionPixelShuffleMLP_0/pixel_shuffle_mlp")
    encoder_blocks.linear(shuffle, "fc1", "inner", "projected", "vit_pixel_shuffle_mlp_fc1", bias=False)
    encoder_blocks.linear(shuffle, "fc2", "projected", "projected_out", "vit_pixel_shuffle_mlp_fc2", bias=False)
    projector = encoder.within("multi_modal_projector", "Llama4MultiModalProjector_0")
    encoder_blocks.linear(projector, "linear_1", "vision_output", "hidden", "vit_multi_modal_projector", bias=False)
