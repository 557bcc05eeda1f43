"""Prints how MaxText cuts every leaf of a model over some meshes, as JSON: by flags of the mesh, and by path.

Or, in place of the paths of a mesh, why MaxText refuses it.

    python shardings_of_maxtext.py MODEL SCAN_LAYERS '["ici_fsdp_parallelism=16", ...]'

A process of its own, for it has as many devices as the meshes. Only abstract models are built.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DEVICES = 16


def main(model_name: str, scan_layers: str, meshes: list[str]) -> None:
    """Prints the specs."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    import maxtext
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils

    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = ["attention=dot_product", "enable_checkpointing=false", "hardware=cpu", "run_name=shardings"]
    settings += ["skip_jax_distributed_system=true", "use_multimodal=false"]
    settings += ["context_parallel_load_balance=false"]  # Recurrent layers, as Qwen3-Next's, refuse it.
    settings += ["override_model_config=true", f"model_name={model_name}", f"scan_layers={scan_layers}"]
    found: dict[str, Any] = {}
    for flags in meshes:
        with tempfile.TemporaryDirectory() as scratch:  # MaxText wants a place for its output.
            config = pyconfig.initialize(["", str(base), *settings, *flags.split(), f"base_output_directory={scratch}"])
        mesh = maxtext_utils.get_mesh_from_config(config)
        try:
            _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
        except ValueError as error:  # There are fewer heads than parts.
            found[flags] = str(error)
            continue
        transient = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.BatchStat)
        found[flags] = {
            "/".join(map(str, path)): [
                [] if axes is None else [axes] if isinstance(axes, str) else list(axes)
                for axes in variable.get_value().sharding.spec
            ]
            for path, variable in nnx.to_flat_state(nnx.state(model))
            if not isinstance(variable, transient)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
