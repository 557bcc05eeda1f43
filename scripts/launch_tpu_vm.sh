#!/usr/bin/env bash
# Runs slicecast on all hosts of a TPU slice, with gcloud alone.
#
#   scripts/launch_tpu_vm.sh --name=NAME --zone=ZONE [OPTIONS] -- SLICECAST'S COMMAND LINE
#
#   scripts/launch_tpu_vm.sh --name=kimi --zone=us-west4-a --accelerator-type=v5litepod-16 \
#     --runtime-version=v2-alpha-tpuv5-lite --spot --delete -- convert --hf_model_path=moonshotai/Kimi-K2.6 \
#     --base_output_directory=gs://bucket/kimi --model_name=kimi-k2-1t
#
# The slice:
#   --name=NAME               the TPU VM; also the queued resource, if one is created
#   --zone=ZONE, --project=PROJECT
#   --accelerator-type=TYPE   create the slice if it is not there, and again if it is preempted; without this the TPU VM
#                             must exist
#   --runtime-version=VERSION the slice's software, needed to create it: v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for
#                             v5p, v2-alpha-tpuv5-lite for v5e (v5litepod-*), tpu-ubuntu2204-base for v4
#   --spot, --reserved        its capacity; without either it is on demand
#   --create-flag=FLAG        another flag of `gcloud compute tpus queued-resources create`; may be repeated
#   --internal-ip             reach the hosts by their internal addresses, from a machine of the same network
#   --delete                  delete the slice at the end, whether slicecast succeeded or not
# The run:
#   --hf-token-file=FILE      a file with a Hub token, copied to the hosts; it never stands in a command or a log
#   --max-restarts=N          start again so often after a preemption or a lost host (default 10)
#   --dry-run                 print the commands, run nothing; gcloud need not be installed
#
# slicecast runs on the hosts apart from any SSH session; this script starts it, shows its output and waits. If this
# script or its machine goes away, the conversion goes on. The same command watches it again, or starts it again if it
# has ended meanwhile, which is harmless: slicecast goes on where it stopped, and returns at once if the checkpoint is
# finished. What needs this script is a new slice after a preemption, and --delete: until it has run, the slice costs
# money.
#
# Exit code: 0 if slicecast succeeded on all hosts; that of slicecast if it is 1 or 2, errors that would come again; 3
# if there is no slice, the restarts are used up, or slicecast was stopped; 130 after Ctrl-C, which ends the watching
# only.
#
# To reach several hosts, gcloud needs its key in an SSH agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launching.sh
. "$root/scripts/launching.sh"
# shellcheck source=environment.sh
. "$root/scripts/environment.sh"

# A restart loses no more than the work in flight, so it costs the minutes that a slice takes to come up. Ten of them
# outlast a bad hour on spot machines, and end a run that fails every time.
max_restarts=10

# How long a slice takes to change its state: minutes.
poll_seconds=30

name="" zone="" accelerator_type="" runtime_version="" token_file="" delete="" dry_run=""
place=() capacity=() create_flags=() route=()
while [[ $# -gt 0 && "$1" != -- ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) place+=("$1") ;;
    --accelerator-type=*) accelerator_type="${1#*=}" ;;
    --runtime-version=*) runtime_version="${1#*=}" ;;
    --spot | --reserved) capacity+=("$1") ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --internal-ip) route=("$1") ;;
    --delete) delete=yes ;;
    --hf-token-file=*) token_file="${1#*=}" ;;
    --max-restarts=*) max_restarts="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    --help | -h) show_help && exit ;;
    *) fail "'$1' is not understood; see --help. slicecast's own command line comes after --" ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || fail "--name and --zone are needed; see --help"
[[ -z "$accelerator_type" || -n "$runtime_version" ]] || fail "--accelerator-type needs --runtime-version; see --help"
[[ -n "$accelerator_type" || ${#capacity[@]} -eq 0 ]] || fail "${capacity[0]} needs --accelerator-type"
[[ ${#capacity[@]} -le 1 ]] || fail "--spot and --reserved exclude each other"
[[ "$max_restarts" =~ ^[0-9]+$ ]] || fail "--max-restarts=$max_restarts is not a number"
[[ -z "$token_file" || -r "$token_file" ]] || fail "--hf-token-file=$token_file cannot be read"
place+=(--zone="$zone")
shift || true
check_arguments "$@"

wheels="$root/build/wheels"
version="$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")"

queued_resource() {
  run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"
}

create_slice() {
  queued_resource create --node-id="$name" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" ${capacity[@]+"${capacity[@]}"} ${create_flags[@]+"${create_flags[@]}"} \
    ${route[@]+"${route[@]/%/s}"}
}

delete_slice() {
  if [[ -n "$accelerator_type" ]]; then
    queued_resource delete --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

slice_state() {
  if [[ -n "$accelerator_type" ]]; then
    queued_resource describe --format="value(state.state)" 2>/dev/null || echo ABSENT
  else
    run gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format="value(state)"
  fi
}

# Returns once the slice can be used; creates it where that is needed.
wait_for_slice() {
  local state
  while true; do
    state="$(slice_state)" || return 1
    case "$state" in
      ACTIVE | READY) return ;;
      ABSENT) create_slice || return 1 ;;
      SUSPENDED) delete_slice || return 1 ;; # Preempted. Such a request does not come back; it is made anew.
      FAILED | STOPPED | PREEMPTED | TERMINATED)
        echo "$name is $state. It can be deleted with: $(dry_run=yes delete_slice)" >&2
        exit 3
        ;;
      *)
        echo "$name is $state" >&2
        sleep "$poll_seconds"
        ;;
    esac
  done
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all ${route[@]+"${route[@]}"} --command="$1"
}

# Runs a subcommand of tpu_vm_worker.sh.
worker() {
  on_all_workers "bash .slicecast/tpu_vm_worker.sh $(quoted "$@")"
}

copy_to_workers() {
  run gcloud compute tpus tpu-vm scp "${@:2}" "$name:.slicecast/$1" "${place[@]}" --worker=all \
    ${route[@]+"${route[@]}"}
}

build_wheel() {
  run rm -rf "$root/build/lib" # Otherwise the wheel gets modules that are no longer there.
  run "$(find_python)" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$root"
}

# Copies what the workers need and starts slicecast on them, with the words after it.
start() {
  on_all_workers "mkdir -p -m 700 .slicecast && rm -f .slicecast/*.whl" &&
    copy_to_workers "" "$wheels/slicecast-$version-py3-none-any.whl" "$root/scripts/tpu_vm_worker.sh" &&
    { [[ -z "$token_file" ]] || copy_to_workers hf_token "$token_file"; } &&
    worker start "$@"
}

# Waits for the end of the run, and sets `result`: done, a final exit code, stopped, or lost.
#
# Exit codes of gcloud do not tell: 1 may be its own or slicecast's, and it is one for all workers.
watch() {
  local words
  result=lost
  while true; do
    worker follow || true # It also ends when the connection is lost.
    words="$(worker status | grep -xE 'running|stopped|lost|[0-9]+')" || return 0
    grep -qx running <<<"$words" || break
  done
  if grep -qx stopped <<<"$words"; then
    result=stopped
  elif grep -qx '[12]' <<<"$words"; then
    result="$(grep -xm1 '[12]' <<<"$words")"
  elif ! grep -qvx 0 <<<"$words"; then
    result="done"
  fi
}

finish() {
  if [[ -n "$delete" ]]; then
    delete_slice
  else
    echo "The slice costs money until it is deleted: $(dry_run=yes delete_slice)" >&2
  fi
  exit "$1"
}

show_dry_run() {
  build_wheel
  if [[ -n "$accelerator_type" ]]; then
    echo "# If there is no slice of this name:"
    create_slice
  fi
  echo "# Until it is ACTIVE or READY; a slice that is SUSPENDED is deleted and created again:"
  slice_state
  echo "# Again, from here, after a preemption or a lost host, at most $max_restarts times:"
  start "$@"
  worker follow
  worker status
  if [[ -n "$delete" ]]; then
    echo "# At the end:"
    delete_slice
  fi
}

if [[ -n "$dry_run" ]]; then
  show_dry_run "$@"
  exit
fi

trap 'echo "slicecast goes on. To watch it, run this again; to end it: $(dry_run=yes worker stop)" >&2; exit 130' INT
build_wheel
wait_for_slice || exit 3
for ((restarts = 0; restarts <= max_restarts; restarts++)); do
  result=lost
  wait_for_slice && start "$@" && watch
  case "$result" in
    done) finish 0 ;;
    1 | 2) finish "$result" ;;
    stopped) finish 3 ;;
  esac
  echo "The slice was preempted, a host was lost, or it cannot be reached. Going on in $poll_seconds s." >&2
  sleep "$poll_seconds"
done
echo "Started again $max_restarts times without an end. The same command goes on where it stopped." >&2
finish 3
