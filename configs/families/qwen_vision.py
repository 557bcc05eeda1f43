"""The vision tower of Qwen 3-VL, and the audio tower that Qwen 3-Omni has beside it."""

from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import LayerAxis, Layers
from slicecast.convert.mapping.table import RuleTable


def add(c: HfConfig, table: RuleTable, hidden: int, *, omni: bool) -> None:
    """Adds the rules of the towers that a config has.

    Args:
        c: The config with the section `vision_config`, and `audio_config` where there is one.
        table: The table of the whole model.
        hidden: The size of the text model's hidden state.
        omni: Whether it is Qwen 3-Omni, in which MaxText and Hugging Face call some parts otherwise.
    """
    _vision(c.require_section("vision_config"), table, hidden, omni=omni)
    if omni:
        _audio(c.require_section("audio_config"), table, hidden)


def _vision(c: HfConfig, table: RuleTable, hidden: int, *, omni: bool) -> None:
    width, heads, merge = c.integer("hidden_size"), c.integer("num_heads"), c.integer("spatial_merge_size") ** 2
    tower = table.within(
        "thinker.visual" if omni else "model.visual",
        "vision_encoder",
        embed_attn=width,
        width=width,
        heads=heads,
        q_heads=heads,
        kv_heads=heads,
        kv=width // heads,
        kv_head_dim=width // heads,
        inner=c.integer("intermediate_size"),
        merged=merge * width,
        hidden=hidden,
        positions=c.integer("num_position_embeddings"),
        channels=c.integer("in_channels"),
        frames=c.integer("temporal_patch_size"),
        patch=c.integer("patch_size"),
        patch_width=c.integer("patch_size"),
    )
    name = "Qwen3OmniMoe" if omni else "Qwen3VL"
    encoder = tower.within("", f"{name}VisionEncoder_0")
    encoder.add(
        "patch_embed.proj.weight",
        ":width :channels :frames :patch :patch_width -> :frames :patch :patch_width :channels :width",
        "patch_embed/proj/kernel",
    )
    encoder.add("patch_embed.proj.bias", ":width", "patch_embed/proj/bias")
    encoder.add("pos_embed.weight", ":positions :width", "pos_embed_interpolate/pos_embed")
    layers = Layers(0, (LayerAxis("layers", c.integer("depth")),), "blocks", "blocks_{layer}")
    block = encoder.within("blocks.{layer}", "{layers}", layers)
    for norm, leaf in (("norm1", "ln1"), ("norm2", "ln2")):
        block.add(f"{norm}.weight", ":width", f"{leaf}/scale")
        block.add(f"{norm}.bias", ":width", f"{leaf}/bias")
    for part, (leaf, axes) in enumerate(
        (("query", "q_heads kv"), ("key", "kv_heads kv_head_dim"), ("value", "kv_heads kv_head_dim"))
    ):
        block.add("attn.qkv.weight", f"({part}/3 {axes}) embed_attn -> embed_attn {axes}", f"attn/attn/{leaf}/kernel")
        block.add("attn.qkv.bias", f"({part}/3 {axes})", f"attn/attn/{leaf}/bias")
    block.add("attn.proj.weight", "embed_attn (heads kv) -> heads kv embed_attn", "attn/attn/out/kernel")
    block.add("attn.proj.bias", "embed_attn", "attn/attn/out/bias")
    _linear(block, "mlp.linear_fc1", "width", "inner", "mlp")
    _linear(block, "mlp.linear_fc2", "inner", "width", "mlp_out")
    fc1, fc2, norm = ("mlp.0", "mlp.2", "ln_q") if omni else ("linear_fc1", "linear_fc2", "norm")
    mergers = "merger_list" if omni else "deepstack_merger_list"
    for index, _ in enumerate(c.values.get("deepstack_visual_indexes") or ()):
        _merger(encoder.within(f"{mergers}.{index}", f"merger_{index}"), norm, fc1, fc2, "merged")
    _merger(tower.within("merger", f"{name}VisionProjector_0/merger"), norm, fc1, fc2, "width")


def _merger(table: RuleTable, norm: str, fc1: str, fc2: str, width: str) -> None:
    table.add(f"{norm}.weight", f":{width}", "ln_q/scale")
    table.add(f"{norm}.bias", f":{width}", "ln_q/bias")
    table = table.within("", "", merged_out=table.sizes["merged"])
    _linear(table, fc1, "merged", "merged_out", "mlp_0")
    _linear(table, fc2, "merged", "hidden", "mlp_2")


def _audio(c: HfConfig, table: RuleTable, hidden: int) -> None:
    width, heads = c.integer("d_model"), c.integer("encoder_attention_heads")
    channels = c.integer("downsample_hidden_size")
    tower = table.within(
        "thinker.audio_tower",
        "audio_encoder",
        embed=width,
        embed_attn=width,
        width=width,
        width_out=width,
        heads=heads,
        q_heads=heads,
        kv_heads=heads,
        kv=width // heads,
        kv_head_dim=width // heads,
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
    encoder.add("conv_out.weight", ":width :frequencies -> :frequencies :width", "conv_out/kernel")
    encoder.add("ln_post.weight", ":width", "layernorm_post/scale")
    encoder.add("ln_post.bias", ":width", "layernorm_post/bias")
    depth = c.integer("encoder_layers")
    layer = encoder.within("layers.{layer}", "{layers}", Layers(0, (LayerAxis("layers", depth),), "layers"))
    for norm, leaf in (("self_attn_layer_norm", "input"), ("final_layer_norm", "post_attention")):
        layer.add(f"{norm}.weight", ":width", f"{leaf}_layer_norm/scale")
        layer.add(f"{norm}.bias", ":width", f"{leaf}_layer_norm/bias")
    for projection, leaf, axes in (
        ("q_proj", "query", "q_heads kv"),
        ("k_proj", "key", "kv_heads kv_head_dim"),
        ("v_proj", "value", "kv_heads kv_head_dim"),
    ):
        target = f"self_attention_audio/{leaf}"
        layer.add(f"self_attn.{projection}.weight", f"({axes}) embed_attn -> embed_attn {axes}", f"{target}/kernel")
        layer.add(f"self_attn.{projection}.bias", f"({axes})", f"{target}/bias")
    out = layer.within("self_attn.out_proj", "self_attention_audio/out")
    out.add("weight", "embed_attn (heads kv) -> heads kv embed_attn", "kernel")
    out.add("bias", "embed_attn", "bias")
    layer.add("fc1.weight", "mlp embed -> embed mlp", "AudioMLP/wi/kernel")
    layer.add("fc1.bias", "mlp", "AudioMLP/wi/bias")
    layer.add("fc2.weight", "embed mlp -> mlp embed", "AudioMLP/wo/kernel")
    layer.add("fc2.bias", "embed", "AudioMLP/wo/bias")
    projector = tower.within("", "Qwen3OmniAudioProjector_0")
    _linear(projector, "proj1", "width", "width_out", "proj1")
    _linear(projector, "proj2", "width", "hidden", "proj2")


def _linear(table: RuleTable, source: str, inputs: str, outputs: str, target: str) -> None:
    """A linear layer with bias, for whose axes MaxText has no names."""
    table.add(f"{source}.weight", f":{outputs} :{inputs} -> :{inputs} :{outputs}", f"{target}/kernel")
    table.add(f"{source}.bias", f":{outputs}", f"{target}/bias")
