#!/usr/bin/env bash
# Checks every format against its own library: what the library has stored is decoded to what the library decodes.
#
#   scripts/test_oracles.sh [PYTEST ARGUMENTS]
#
# The numbers are new in each run. SLICECAST_ORACLE_SEED=N gives those of the run that printed N.
#
# Needs an environment of its own, .venv-oracles (about two minutes, 2.1 GB), because the libraries want versions of each
# other that the tests of the program should not depend on. It is made on first use, and again when what it is made of
# changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=.venv-oracles
requirements=scripts/oracle_requirements.txt

. scripts/environment.sh

build_environment() {
  local python="$environment/bin/python" wanted
  wanted=$(cat pyproject.toml "$requirements" scripts/test_oracles.sh | cksum)
  if [[ "$(cat "$environment/installed" 2>/dev/null)" == "$wanted" ]]; then
    return
  fi
  echo "Making the environment $environment ..." >&2
  rm -rf "$environment"
  "$(find_python)" -m venv "$environment"
  local pip=("$python" -m pip --quiet --disable-pip-version-check)
  "${pip[@]}" install --upgrade pip
  # First and pinned: see scripts/environment.sh.
  "${pip[@]}" install "torch==2.13.0"
  "${pip[@]}" install --requirement "$requirements" --editable .
  # Its requirements name another torch, and much that only quantizing needs. Building it needs the torch that is there.
  "${pip[@]}" install --no-deps --no-build-isolation "gptqmodel==7.7.0"
  # AutoAWQ needs a GPU and a transformers of its time; the file that defines the format needs torch alone.
  local archives="$environment/archives"
  "${pip[@]}" download --no-deps --no-build-isolation --no-binary :all: --dest "$archives" "autoawq==0.2.9"
  mkdir "$environment/autoawq"
  tar -xzf "$archives"/autoawq-0.2.9.tar.gz -C "$environment/autoawq" --strip-components=3 \
    autoawq-0.2.9/awq/utils/packing_utils.py
  echo "$wanted" >"$environment/installed"
}

build_environment

# Nothing is to be fetched.
export HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu
export SLICECAST_ORACLE_SEED="${SLICECAST_ORACLE_SEED:-$RANDOM}"
echo "SLICECAST_ORACLE_SEED=$SLICECAST_ORACLE_SEED"
# Not `python -m pytest`: the folder `kernels` of this repository must not pass for the package of that name.
exec "$environment/bin/pytest" tests/oracles -m oracle --numprocesses 2 \
  -W ignore::DeprecationWarning -W ignore::UserWarning "$@"
