#!/usr/bin/env bash
# Checks style and types. `scripts/lint.sh --fix` mends what can be mended.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment test

if [ "${1:-}" = --fix ]; then
  .venv/bin/ruff check --quiet --fix .
  .venv/bin/ruff format --quiet .
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The folders are subpackages of slicecast (see pyproject.toml); mypy needs to see them under that name.
mkdir -p build/typecheck/slicecast
for folder in configs convert kernels; do
  ln -sfn "../../../$folder" "build/typecheck/slicecast/$folder"
done
MYPYPATH=build/typecheck .venv/bin/mypy --package slicecast
