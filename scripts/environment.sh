# Sourced by the other scripts: makes the environment .venv in the root of the repository.
#
#   make_environment            slicecast alone
#   make_environment test       ... with all that the tests need
#
# What is installed is remembered, so that a second call returns at once.

# Prints a Python of at least 3.11 that can make environments.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer with venv was found; set PYTHON to one." >&2
  return 1
}

make_environment() {
  local extra="${1:-}" environment="${2:-.venv}" constraints="${3:-}"
  local stamp="$environment/installed${extra:+-$extra}"
  local wanted
  wanted=$(cat pyproject.toml scripts/environment.sh ${constraints:+"$constraints"} | cksum)
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  echo "Making the environment $environment ..." >&2
  [ -x "$environment/bin/python" ] || "$(find_python)" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  if [ "$extra" = test ]; then
    # First and pinned: left to its dependents, pip takes a build with several GB of CUDA libraries.
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
  fi
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${constraints:+--constraint "$constraints"} --editable ".${extra:+[$extra]}"
  echo "$wanted" >"$stamp"
}
