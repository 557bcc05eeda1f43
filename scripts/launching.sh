# Sourced by launch_tpu_vm.sh and launch_xpk.sh.

# Ends the script because its command line is wrong.
fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Prints the comment at the top of the script.
show_help() {
  sed -n '2,/^[^#]/{ s/^# \{0,1\}//p; }' "$0"
}

# Prints words as one line that a shell reads as these words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Runs a command and shows it, or only shows it.
run() {
  if [[ -n "$dry_run" ]]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# Checks slicecast's words: there are some, and none of them is a token, which would be shown here, in lists of
# processes and in logs.
check_arguments() {
  [[ $# -gt 0 ]] || fail "slicecast's own command line is missing: -- convert --hf_model_path=..."
  local word
  for word in "$@"; do
    case "$word" in
      --hf_access_token* | hf_access_token=*)
        fail "a token on the command line would be shown in logs; see 'The token' in docs/launching.md"
        ;;
    esac
  done
}
