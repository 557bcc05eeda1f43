"""Converts a Kimi-K2.6 checkpoint of any size with MaxText's own script, and measures it.

    MAXTEXT_PYTHON maxtext_baseline.py HF_MODEL_PATH WORK_DIRECTORY

MAXTEXT_PYTHON has MaxText 0.2.5 and torch, not slicecast: see bench_throughput.py. The script and its flags are
MaxText's (`convert_deepseek_family_ckpt`, scanned layers, float16 output in WORK_DIRECTORY/maxtext); only the entry of
its table of models is replaced by the sizes of config.json. It wants the three tensors of an int4 weight in one file:
a file that lacks one is copied with it to WORK_DIRECTORY/hf, the others are linked there, which is not timed. Neither
are the imports. The last line of the output is JSON: the seconds by the clock, those of all cores together, and the
peak of resident memory in bytes.

The script collects garbage after every leaf, 35 times, which takes about 0.4 s each because of the half a million
objects that its imports leave. This does not grow with the model: it is nothing for a whole Kimi-K2.6 and a large part
for a small one. So these objects are kept out of the collections here, in favor of MaxText; with KEEP_COLLECTIONS=1
they are not.
"""

import gc
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from maxtext.checkpoint_conversion.standalone_scripts import convert_deepseek_family_ckpt as script
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODEL = "kimi-k2.6-text"
# The entries of the script's table, as config.json calls them.
SIZES = {
    "num_layers": "num_hidden_layers",
    "first_num_dense_layers": "first_k_dense_replace",
    "base_num_query_heads": "num_attention_heads",
    "base_emb_dim": "hidden_size",
    "num_experts": "n_routed_experts",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# The script's default. It shards axis 0 or 1, and keeps a copy on each device of what cannot be divided.
DEVICES = 16


def main(source: Path, work: Path) -> None:
    """Converts the checkpoint and prints what it took."""
    text = json.loads((source / "config.json").read_text())["text_config"]
    script.MODEL_PARAMS_DICT[MODEL] |= {name: text[key] for name, key in SIZES.items()}
    gather_partners(source, work / "hf")
    flags: dict[str, Any] = {
        "base_model_path": work / "hf",
        "maxtext_model_path": work / "maxtext",
        "model_size": MODEL,
        "simulated_cpu_devices_count": math.gcd(DEVICES, text["n_routed_experts"]),
    }
    if not os.environ.get("KEEP_COLLECTIONS"):
        gc.freeze()
    os.sync()  # What was copied is not to be written in the time that is measured.
    Path("/proc/self/clear_refs").write_text("5")  # Starts the peak anew.
    start, processor_start = time.perf_counter(), time.process_time()
    with mock.patch.object(sys, "argv", [script.__file__, *(f"--{name}={value}" for name, value in flags.items())]):
        script.main()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor_start
    print(json.dumps({"seconds": seconds, "processor": processor, "peak": peak_resident_bytes()}))


def gather_partners(source: Path, target: Path) -> None:
    """Makes a copy of a checkpoint in which all partners of a `weight_packed` are in its file.

    Where that is so already, the file is a symbolic link.
    """
    target.mkdir(parents=True)
    weight_map: dict[str, str] = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    strays: dict[str, list[str]] = {file: [] for file in weight_map.values()}
    for name, file in weight_map.items():
        prefix, is_packed, _ = name.partition(".weight_packed")
        partners = [f"{prefix}.weight_scale", f"{prefix}.weight_shape"] if is_packed else []
        strays[file] += [partner for partner in partners if weight_map[partner] != file]
    for file, names in strays.items():
        if not names:
            (target / file).symlink_to((source / file).resolve())
            continue
        tensors = load_file(source / file)
        for name in names:
            with safe_open(source / weight_map[name], framework="pt") as other:
                tensors[name] = other.get_tensor(name)
        save_file(tensors, target / file)


def peak_resident_bytes() -> int:
    """The most memory that was resident; unlike `getrusage`, without that of the process that started this one."""
    (kibibytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) << 10


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve())  # Orbax wants an absolute path.
