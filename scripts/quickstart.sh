#!/usr/bin/env bash
# Converts a small, made-up Kimi-K2.6 checkpoint over eight simulated devices, and verifies the result.
# Needs Python 3.11 or newer and nothing else. Everything goes below quickstart-output/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment

output=quickstart-output
rm -rf "$output"
mkdir "$output"
export JAX_PLATFORMS=cpu

echo "== Making a small checkpoint with the tensors of Kimi-K2.6"
.venv/bin/python scripts/make_checkpoint.py --out "$output/hf" \
  --layers 4 --experts 32 --hidden 1024 --moe_intermediate 256 --files 5
ls -sh "$output/hf"

echo "== Converting it"
.venv/bin/slicecast convert --hf_model_path="$output/hf" --base_output_directory="$output/maxtext" \
  --simulated_cpu_devices_count=8 --host_memory_gb=1

echo "== Comparing every value with the source"
.venv/bin/slicecast verify "$output/maxtext" --hf_model_path="$output/hf" --requantize

echo "== To load it, give MaxText"
echo "load_parameters_path=$PWD/$output/maxtext/0/items"
