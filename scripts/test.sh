#!/usr/bin/env bash
# Makes an environment and runs the tests.
#
#   scripts/test.sh                  all tests but those of the next three
#   scripts/test.sh --kernels        the tests of the Pallas kernels
#   scripts/test.sh --campaign       the long campaigns
#   scripts/test.sh --oldest         the tests of the writer, with the oldest versions that pyproject.toml allows
#   scripts/test.sh tests/test_x.py  arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
export JAX_PLATFORMS=cpu

case "${1:-}" in
  --oldest)
    make_environment oldest .venv-oldest scripts/oldest.txt
    exec .venv-oldest/bin/python -m pytest -m "not campaign" tests/test_device.py tests/test_hub.py \
      tests/test_orbax_readers.py tests/test_processes.py tests/test_resume.py "${@:2}"
    ;;
  --kernels)
    make_environment test
    exec .venv/bin/python -m pytest -m "kernel and not campaign" --numprocesses 2 "${@:2}"
    ;;
  --campaign)
    make_environment test
    exec .venv/bin/python -m pytest -m campaign "${@:2}"
    ;;
  *)
    make_environment test
    exec .venv/bin/python -m pytest -m "not campaign and not kernel" --numprocesses 2 "$@"
    ;;
esac
