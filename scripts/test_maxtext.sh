#!/usr/bin/env bash
# Checks converted checkpoints with MaxText itself.
#
#   scripts/test_maxtext.sh [PYTEST ARGUMENTS]
#
# Writes tiny checkpoints of every model family with transformers, converts each of them in the layouts that MaxText has,
# and lets MaxText load them and compute: its tree, its two readers, its logits against those of transformers, and the
# bits that its own converter writes. Takes about a quarter of an hour on two cores. See tests/maxtext.
#
# Two environments are needed, because MaxText wants Python 3.12 and no torch, and the sources need torch. Both are built
# on first use, and reused while their requirements stay the same:
#   .venv           the environment of scripts/test.sh
#   .venv-maxtext   about three minutes, 2.2 GB
#
# Without Python 3.12 the checks do not run, which is said loudly and is no error, unless SLICECAST_REQUIRE_MAXTEXT=1.
# PYTHON312=/path/to/python3.12 says where it is. What was written stays in build/maxtext until the next run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

maxtext_version=0.2.5
environment=.venv-maxtext
work="$PWD/build/maxtext"
test_python=.venv/bin/python

runs_python312() {
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

find_python312() {
  local candidates=(python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12)
  if [[ -n "${PYTHON312:-}" ]]; then
    candidates=("$PYTHON312")
  fi
  local candidate
  for candidate in "${candidates[@]}"; do
    # A shim of pyenv is on the PATH even where it cannot run.
    if runs_python312 "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

stage() {
  echo "== $* (after ${SECONDS} s)"
}

# Each part of the environment is complete once its stamp is there, which therefore comes last.
build_environment() {
  local python="$1" pip=("$environment/bin/python" -m pip --disable-pip-version-check --quiet) stamp
  stamp="$({ "$python" --version; pwd; echo "$maxtext_version"; cat scripts/maxtext_requirements.py; } | sha256sum)"
  if [[ "$(cat "$environment/stamp" 2>/dev/null)" != "$stamp" ]]; then
    stage "building $environment"
    rm -rf "$environment"
    "$python" -m venv "$environment"
    "${pip[@]}" download --no-deps --dest "$environment" "maxtext==$maxtext_version"
    "$environment/bin/python" scripts/maxtext_requirements.py "$environment"/maxtext-*.whl >"$environment/requirements.txt"
    "${pip[@]}" install --requirement "$environment/requirements.txt" pytest
    "${pip[@]}" install --no-deps "$environment"/maxtext-*.whl
    echo "$stamp" >"$environment/stamp"
  fi
  stamp="$(sha256sum pyproject.toml)"
  if [[ "$(cat "$environment/stamp-project" 2>/dev/null)" != "$stamp" ]]; then
    stage "installing slicecast in $environment"
    "${pip[@]}" install --editable .
    echo "$stamp" >"$environment/stamp-project"
  fi
}

if ! python312="$(find_python312)"; then
  cat >&2 <<'END'
################################################################################
##
##  MAXTEXT TESTS DID NOT RUN: no Python 3.12 found.
##
##  MaxText needs it. Install it (for example with pyenv), or say where it is:
##  PYTHON312=/path/to/python3.12 scripts/test_maxtext.sh
##
################################################################################
END
  exit "$([[ "${SLICECAST_REQUIRE_MAXTEXT:-0}" == 1 ]] && echo 1 || echo 0)"
fi

# Nothing is to be fetched, and MaxText would otherwise wait for a TPU.
export HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu

. scripts/environment.sh
make_environment test
build_environment "$python312"

stage "writing the sources"
rm -rf "$work"
"$test_python" tests/maxtext/make_sources.py "$work"

stage "converting them with slicecast"
"$environment/bin/python" tests/maxtext/convert_with_slicecast.py "$work" >"$work/slicecast.log" 2>&1 ||
  { tail -n 30 "$work/slicecast.log"; exit 1; }

stage "converting them with MaxText"
"$environment/bin/python" tests/maxtext/convert_with_maxtext.py "$work" >"$work/maxtext.log" 2>&1 ||
  { tail -n 30 "$work/maxtext.log"; exit 1; }

stage "loading and computing in MaxText"
# Compiling takes most of the time, and it is done for models of a few thousand weights.
SLICECAST_MAXTEXT_SOURCES="$work" JAX_DISABLE_MOST_OPTIMIZATIONS=true \
  "$environment/bin/pytest" tests/maxtext -m maxtext -W ignore::DeprecationWarning "$@"
stage "done"
