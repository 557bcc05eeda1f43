#!/usr/bin/env bash
# What launch_tpu_vm.sh runs on each worker of a slice, in ~/.slicecast. `start` takes slicecast's command line.
#
#   start ...   installs slicecast and starts it, apart from the SSH session; nothing if it runs already
#   follow      shows its output until it ends
#   status      prints "running", "stopped", its exit code, or "lost" if the machine went down meanwhile
#   stop        ends it as a preemption would, so that it can go on later
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The runtimes of TPU VMs come with Python 3.10. uv brings a newer one; its version is fixed so that every worker, and
# the next run too, has the same.
uv_version=0.13.9

install() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl -LsSf "https://astral.sh/uv/$uv_version/install.sh" | sh
  [[ -x venv/bin/python ]] || uv venv --quiet --python 3.12 venv
  uv pip install --quiet --python venv/bin/python --reinstall-package slicecast "$(echo ./slicecast-*.whl)[tpu]"
}

# The program holds the lock as long as it lives: unlike a process id in a file, that cannot be out of date.
start() {
  exec 9>lock
  if ! flock --timeout 5 9; then
    echo "It runs already: $(grep '^== ' log | tail --lines=1)"
    return
  fi
  rm -f group status stopped
  install
  echo "== $(date -u +%FT%TZ) slicecast $*" >>log
  setsid nohup "$BASH" "${BASH_SOURCE[0]##*/}" run "$@" >>log 2>&1 </dev/null &
  echo $! >group
}

run() {
  # `stop` and a shutdown send SIGTERM to this shell too, which is still to note what became of the program.
  trap : TERM
  if [[ -e hf_token ]]; then
    export HF_TOKEN_PATH="$PWD/hf_token"
  fi
  local exit_code=0
  venv/bin/slicecast "$@" || exit_code=$?
  echo "$exit_code" >status
}

follow() {
  flock --shared lock true &
  tail --lines=100 --follow --pid=$! log
}

status() {
  if ! flock --nonblock --shared lock true; then
    echo running
  elif [[ -e stopped ]]; then
    echo stopped
  else
    cat status 2>/dev/null || echo lost
  fi
}

stop() {
  if [[ "$(status)" == running ]]; then
    touch stopped
    kill -TERM -- "-$(cat group)"
    flock --shared lock true
  fi
}

"$@"
