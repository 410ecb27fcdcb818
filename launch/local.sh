#!/usr/bin/env bash
# Runs any command on this machine, as one process or as several that form one job, and restarts what was preempted.
#
#   launch/local.sh [FLAGS] -- python train_vqgan.py --config=configs/demo_vqgan.py --workdir=runs/vqgan
#
#   --processes=N   so many processes, which meet on the loopback interface (1)
#   --devices=N     so many devices a process: CPUs are simulated, of GPUs each process sees its own (all)
#   --port=N        where several processes meet (a free one)
#   --restarts=N    how often a crash is restarted (3); exit code 42 (preempted, saved) always is, 2 (a user's error) never
#   --lasting=SECONDS   crashes count anew after an attempt that lasted so long (3600)
#   --grace=SECONDS how long processes may go on once one of them has failed (120)
#   --with-parent   stop as after SIGTERM when what has started this has ended
#   --name=NAME     shown in messages
#   --dry-run       print what would run
set -euo pipefail

processes=1 devices='' port='' restarts=3 lasting=3600 grace=120 name=job with_parent='' dry_run=''

fail() {
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --lasting=*) lasting=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --with-parent) with_parent=$PPID ;;
    --dry-run) dry_run=1 ;;
    --help) exec sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
    --) shift && break ;;
    *) fail "unknown flag '$1'; --help lists all, the command stands behind --" ;;
  esac
  shift
done
(($#)) || fail 'no command; write it behind --'
for number in "$processes" "$restarts" "$lasting" "$grace" "${devices:-1}" "${port:-1}"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "'$number' is no whole number"
done
((processes > 0)) || fail '--processes=0 runs nothing'

free_port() { # one above 20000 on which nothing listens
  local port
  while port=$((20000 + RANDOM % 12000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

variables=()
variables_of() { # the environment of process $1
  variables=()
  if ((processes > 1)); then
    local address=127.0.0.1:$port
    variables+=(VQGAN_JAX_DISTRIBUTED=1 "JAX_COORDINATOR_ADDRESS=$address" "JAX_COORDINATOR_BIND_ADDRESS=$address")
    variables+=("JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  fi
  if [[ $devices ]]; then
    variables+=("JAX_NUM_CPU_DEVICES=$devices")
    ((processes == 1)) || variables+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * devices)) $((($1 + 1) * devices - 1)))")
  fi
}

stopped='' pids=()
stop() {
  stopped=1
  kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true
}
trap stop TERM INT # as SIGTERM both: a shell without job control lets its children ignore SIGINT

run() { # starts all processes and sets `code`: 0, or how the first that failed has ended
  local i pid running failed_at='' ended
  code=0 pids=()
  for ((i = 0; i < processes; i++)); do
    variables_of "$i"
    env ${variables[@]+"${variables[@]}"} "$@" &
    pids+=($!)
  done
  [[ ! $stopped ]] || stop # told to between two starts
  while :; do
    running=0
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running=$((running + 1))
      else
        ended=0
        wait "$pid" || ended=$?
        if ((ended && !code)); then code=$ended failed_at=$SECONDS; fi
      fi
    done
    ((running)) || return 0
    if [[ $with_parent && ! $stopped ]] && ! kill -0 "$with_parent" 2>/dev/null; then stop; fi
    if [[ $failed_at ]] && ((SECONDS - failed_at >= grace)); then
      echo "$name: a process ended with $code $grace s ago, the others are killed" >&2
      kill -KILL "${pids[@]}" 2>/dev/null || true
      failed_at=''
    fi
    sleep 0.2 & wait $! || true # a signal ends the wait at once
  done
}

if [[ $dry_run ]]; then
  port=${port:-20000}
  for ((i = 0; i < processes; i++)); do
    variables_of "$i"
    words=(${variables[@]+"${variables[@]}"} "$@")
    printf '%q ' "${words[@]:0:${#words[@]}-1}"
    printf '%q%s\n' "${words[${#words[@]}-1]}" "$([[ $i -lt $((processes - 1)) ]] && echo ' &')"
  done
  exit
fi

given_port=$port crashes=0
while :; do
  ((processes == 1)) || port=${given_port:-$(free_port)}
  began=$SECONDS
  run "$@"
  ((code)) || exit 0
  if [[ $stopped ]] || ((code == 2)); then exit "$code"; fi
  if ((SECONDS - began >= lasting)); then crashes=0; fi
  if ((code == 42)); then
    echo "$name: preempted and saved; restarted" >&2
  elif ((crashes < restarts)); then
    crashes=$((crashes + 1))
    echo "$name: ended with $code; restart $crashes of $restarts" >&2
  else
    exit "$code"
  fi
done
