#!/usr/bin/env bash
# Runs slicecast on a TPU slice of a cluster that XPK made.
#
#   scripts/launch_xpk.sh [--dry-run] FLAGS OF xpk workload create -- SLICECAST'S COMMAND LINE
#
#   scripts/launch_xpk.sh --cluster=CLUSTER --workload=kimi --tpu-type=v5litepod-16 --docker-image=IMAGE --spot -- \
#     convert --hf_model_path=gs://bucket/Kimi-K2.6 --base_output_directory=gs://bucket/kimi --model_name=kimi-k2-1t
#
# Every flag before -- goes to xpk as it is: --cluster, --workload, --tpu-type and an image are needed, --project,
# --zone, --priority, --spot, --reservation, --on-demand, --storage, --env-file and the others may be given. The image
# is that of container/Dockerfile as --docker-image, or another one with slicecast in it as --base-docker-image with
# --script-dir. --dry-run prints the xpk command and runs nothing; xpk need not be installed. A Hub token goes through
# --env-file; see docs/launching.md.
#
# A run that was preempted (exit code 143), or that lost another host (134), is started again and goes on where it
# stopped: XPK starts again after the exit codes 42 and 127 to 255. slicecast's errors (1 and 2) end the workload,
# because they would come again.
set -euo pipefail
# shellcheck source=launching.sh
. "$(dirname "${BASH_SOURCE[0]}")/launching.sh"

# XPK's own default is to start nothing again. A restart loses no more than the work in flight; ten of them outlast a
# bad hour on spot machines, and end a run that fails every time.
max_restarts=10

dry_run=""
flags=()
while [[ $# -gt 0 && "$1" != -- ]]; do
  case "$1" in
    --dry-run) dry_run=yes ;;
    --command | --command=*) fail "the command is what comes after --" ;;
    --help | -h) show_help && exit ;;
    *) flags+=("$1") ;;
  esac
  shift
done
[[ ${#flags[@]} -gt 0 ]] || fail "--cluster, --workload, --tpu-type and an image are needed; see --help"
shift || true
check_arguments "$@"

# `exec`, because XPK sends SIGTERM to the shell that it gives the command to. A flag that is given twice has the last
# value, so that the user's come after ours.
run xpk workload create --num-slices=1 --max-restarts="$max_restarts" "${flags[@]}" \
  --command="exec slicecast $(quoted "$@")"
