"""The settings of a command, as the command line gives them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for. Names are MaxText's wherever MaxText has one.

    Attributes:
        hf_model_path: The directory, URL or repository of the Hugging Face checkpoint.
        revision: The branch, tag or commit of the repository; None for its main branch.
        base_output_directory: Where the result goes; None for `plan`.
        staging_directory: Where a checkpoint for the Hub is converted before it is uploaded; None for the user's cache.
        overwrite: Whether what is there may be removed.
        checkpoint_storage_use_ocdbt: Whether chunks are stored in databases, and not as files.
        checkpoint_storage_use_zarr3: Whether chunks are those of zarr3, and not of zarr 2.
        scan_layers: Whether layers are stacked.
        param_scan_axis: The position of the layer axis.
        save_dtype: `bfloat16`, `float32` or `float8_e4m3fn`.
        model_name: MaxText's name of the model, or None.
        rope_type: MaxText's rotary embedding that the model will run with, or None.
        enable_mtp: Whether to convert the layers for multi-token prediction.
        use_multimodal: Whether to convert vision and audio; None for what MaxText does with this model.
        vocab_size: The vocabulary of the MaxText model; None for the checkpoint's, or what MaxText has for the model.
        maxtext_version: The MaxText release whose tree is written.
        parallelism: MaxText's flags for the mesh that will load the result, such as `ici_fsdp_parallelism`, and their
            values; None for chunks that suit most meshes.
        ignore_extra: A regular expression; tensors that no rule reads are left out if it matches their whole name.
        override_model_config: Whether the sizes may differ from those that MaxText has for `model_name`.
        host_memory_gb: The budget for bytes in flight on each host, in GB (10**9 bytes); None for three quarters of
            what is free.
        device_memory_gb: The budget of each chip in GB; None for three quarters of what it has.
        slice: The TPU slice to plan for, such as `v5e-16`; None for this machine.
        hosts: How many hosts to plan for; None for those that there are.
    """

    hf_model_path: str
    revision: str | None = None
    base_output_directory: str | None = None
    staging_directory: str | None = None
    overwrite: bool = False
    checkpoint_storage_use_ocdbt: bool = True
    checkpoint_storage_use_zarr3: bool = True
    scan_layers: bool = True
    param_scan_axis: int = 1
    save_dtype: str = "bfloat16"
    model_name: str | None = None
    rope_type: str | None = None
    enable_mtp: bool = False
    use_multimodal: bool | None = None
    vocab_size: int | None = None
    maxtext_version: str | None = None
    parallelism: Mapping[str, int] | None = None
    ignore_extra: str | None = None
    override_model_config: bool = False
    host_memory_gb: float | None = None
    device_memory_gb: float | None = None
    slice: str | None = None
    hosts: int | None = None
