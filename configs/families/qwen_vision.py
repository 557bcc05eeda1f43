"""The encoder of images of Qwen 3-VL and Qwen 3.5, and the encoder of audio that Qwen 3-Omni has beside it."""

from slicecast.configs.families import blocks, encoder_blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.table import RuleTable

_OMNI = "Qwen3OmniMoe"


def add(c: HfConfig, table: RuleTable, prefix: str, hidden: int, *, omni: bool) -> None:
    """Adds the rules of the towers of Qwen 3-VL or Qwen 3-Omni.

    Args:
        c: The config with the section `vision_config`, and `audio_config` where there is one.
        table: The table of the whole model.
        prefix: The prefix of the vision tower's names.
        hidden: The size of the text model's hidden state.
        omni: Whether it is Qwen 3-Omni, in which MaxText and Hugging Face call some parts otherwise.
    """
    add_vision(c.require_section("vision_config"), table, prefix, hidden, _OMNI if omni else "Qwen3VL")
    if omni:
        _add_audio(c.require_section("audio_config"), table, hidden)


def add_vision(c: HfConfig, table: RuleTable, prefix: str, hidden: int, name: str) -> None:
    """Adds the rules of the vision tower, which MaxText calls by the name of the model.

    Args:
        c: The section `vision_config`.
        table: The table of the whole model.
        prefix: The prefix of the tower's names.
        hidden: The size of the text model's hidden state.
        name: How MaxText's names of the tower and of the projector begin.
    """
    width, heads, merge = c.integer("hidden_size"), c.integer("num_heads"), c.integer("spatial_merge_size") ** 2
    tower = table.within(
        prefix,
        "vision_encoder",
        None,
        embed_attn=width,
        width=width,
        **blocks.head_sizes(heads, heads, c.quotient("hidden_size", "num_heads")),
        inner=c.integer("intermediate_size"),
        merged=merge * width,
        hidden=hidden,
        positions=c.integer("num_position_embeddings"),
        channels=c.integer("in_channels"),
        frames=c.integer("temporal_patch_size"),
        rows=c.integer("patch_size"),
        columns=c.integer("patch_size"),
    )
    encoder = tower.within("", f"{name}VisionEncoder_0")
    encoder.add(
        "patch_embed.proj.weight",
        ":width :channels :frames :rows :columns -> :frames :rows :columns :channels :width",
        "patch_embed/proj/kernel",
    )
    encoder.add("patch_embed.proj.bias", ":width", "patch_embed/proj/bias")
    encoder.add("pos_embed.weight", ":positions :width", "pos_embed_interpolate/pos_embed")
    for layer in range(c.integer("depth")):
        block = encoder.within(f"blocks.{layer}", f"blocks_{layer}")
        encoder_blocks.layer_norm(block, "norm1", "ln1")
        encoder_blocks.layer_norm(block, "norm2", "ln2")
        _attention(block.within("attn", "attn/attn"))
        encoder_blocks.linear(block, "mlp.linear_fc1", "width", "inner", "mlp")
        encoder_blocks.linear(block, "mlp.linear_fc2", "inner", "width", "mlp_out")
    omni = name == _OMNI
    parts = ("mlp.0", "mlp.2", "ln_q") if omni else ("linear_fc1", "linear_fc2", "norm")
    mergers = "merger_list" if omni else "deepstack_merger_list"
    for index, _ in enumerate(c.sequence("deepstack_visual_indexes")):
        _merger(encoder.within(f"{mergers}.{index}", f"merger_{index}"), *parts, normed="merged")
    _merger(tower.within("merger", f"{name}VisionProjector_0/merger"), *parts, normed="width")


def _attention(table: RuleTable) -> None:
    """Queries, keys and values are one tensor, whose rows are those of all heads' queries, keys and values."""
    query, key_or_value = "q_heads kv", "kv_heads kv_head_dim"
    for part, (leaf, axes) in enumerate((("query", query), ("key", key_or_value), ("value", key_or_value))):
        table.add("qkv.weight", f"({part}/3 {axes}) embed_attn -> embed_attn {axes}", f"{leaf}/kernel")
        table.add("qkv.bias", f"({part}/3 {axes})", f"{leaf}/bias")
    table.add("proj.weight", "embed_attn (heads kv) -> heads kv embed_attn", "out/kernel")
    table.add("proj.bias", "embed_attn", "out/bias")


def _merger(table: RuleTable, fc1: str, fc2: str, norm: str, *, normed: str) -> None:
    """Merges neighboring patches; `normed` is the size of what is normed, before or after they are merged."""
    table = table.within("", "", merged_out=table.sizes["merged"])
    encoder_blocks.layer_norm(table, norm, "ln_q", normed)
    encoder_blocks.linear(table, fc1, "merged", "merged_out", "mlp_0")
    encoder_blocks.linear(table, fc2, "merged", "hidden", "mlp_2")


def _add_audio(c: HfConfig, table: RuleTable, hidden: int) -> None:
    width, heads = c.integer("d_model"), c.integer("encoder_attention_heads")
    channels = c.integer("downsample_hidden_size")
    tower = table.within(
        "thinker.audio_tower",
        "audio_encoder",
        None,
        embed=width,
        embed_attn=width,
        width=width,
        width_out=width,
        **blocks.head_sizes(heads, heads, c.quotient("d_model", "encoder_attention_heads")),
        mlp=c.integer("encoder_ffn_dim"),
        channels=channels,
        channels_out=channels,
        hidden=hidden,
        # Three convolutions of stride 2 leave an eighth of the mel bins, rounded up each time.
        frequencies=channels * -(-c.integer("num_mel_bins") // 8),
    )
    encoder = tower.within("", "Qwen3OmniAudioEncoder_0")
    for index, channels_in in ((1, ":1"), (2, ":channels"), (3, ":channels")):
        # 3 x 3 kernels; `:3` and `:03` are two axes of the same length.
        encoder.add(
            f"conv2d{index}.weight", f":channels_out {channels_in} :3 :03 -> :3 :03 {channels_in} :channels_out",
            f"conv2d{index}/kernel",
        )  # fmt: skip
        encoder.add(f"conv2d{index}.bias", ":channels_out", f"conv2d{index}/bias")
    encoder_blocks.linear(encoder, "conv_out", "frequencies", "width", "conv_out", bias=False)
    encoder_blocks.layer_norm(encoder, "ln_post", "layernorm_post")
    for number in range(c.integer("encoder_layers")):
        layer = encoder.within(f"layers.{number}", f"layers_{number}")
        encoder_blocks.layer_norm(layer, "self_attn_layer_norm", "input_layer_norm")
        encoder_blocks.layer_norm(layer, "final_layer_norm", "post_attention_layer_norm")
        encoder_blocks.attention(layer.within("self_attn", "self_attention_audio"), "out_proj")
        layer.add("fc1.weight", "mlp embed -> embed mlp", "AudioMLP/wi/kernel")
        layer.add("fc1.bias", "mlp", "AudioMLP/wi/bias")
        layer.add("fc2.weight", "embed mlp -> mlp embed", "AudioMLP/wo/kernel")
        layer.add("fc2.bias", "embed", "AudioMLP/wo/bias")
    projector = tower.within("", "Qwen3OmniAudioProjector_0")
    encoder_blocks.linear(projector, "proj1", "width", "width_out", "proj1")
    encoder_blocks.linear(projector, "proj2", "width", "hidden", "proj2")
