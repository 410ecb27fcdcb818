#!/usr/bin/env bash
# Runs any command on all workers of a Cloud TPU slice (queued resources, v4 to v6e): creates it, waits, installs the
# lock file and this source, runs, follows the log of the first worker, deletes. Given again, it goes on where it is.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --tpu=v5e-16 [FLAGS] -- python train_vqgan.py --workdir=gs://BUCKET/runs/x ...
#
#   --tpu=TYPE      v4-32, v5e-16, v5p-64, v6e-16, ...
#   --project=ID    of Google Cloud (that of gcloud's configuration)
#   --spot          preemptible; a slice that is taken away is created anew and the command goes on
#   --restarts=N    how often a crash is restarted (3); exit code 42 (preempted, saved) always is, 2 (a user's error) never
#   --lasting=SECONDS   crashes count anew after an attempt that lasted so long (3600)
#   --env=K=V       an environment variable of the command; any number of them. Unless JAX_COMPILATION_CACHE_DIR is one,
#                   what is compiled is kept beside a --workdir or --out in a bucket, for a new slice to find
#   --runtime=NAME  another software version of the VM than the type's usual one
#   --poll=SECONDS  between two looks at whether the slice is there (30)
#   --keep          do not delete the slice at the end
#   --only=ACTION   create (and wait), install, run (and follow), or delete, alone
#   --dry-run       print what would run
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
name='' zone='' tpu='' project='' runtime='' spot='' restarts=3 lasting=3600 poll=30 keep='' only='' dry_run='' variables=()

fail() {
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --lasting=*) lasting=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --only=*) only=${1#*=} ;;
    --env=*=*) variables+=("${1#*=}") ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry_run=1 ;;
    --help) exec sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
    --) shift && break ;;
    *) fail "unknown flag '$1'; --help lists all, the command stands behind --" ;;
  esac
  shift
done
[[ $name ]] || fail '--name is missing: what to call the slice'
[[ $lasting =~ ^[0-9]+$ ]] || fail "--lasting=$lasting is no whole number"
[[ $zone ]] || fail '--zone is missing: where the slice shall be, such as us-central1-a'
[[ $only =~ ^(|create|install|run|delete)$ ]] || fail "--only=$only: create, install, run or delete"
if [[ ! $only || $only == run ]] && ((!$#)); then fail 'no command; write it behind --'; fi
case $tpu in
  v4-*) type=$tpu usual=tpu-ubuntu2204-base ;;
  v5e-*) type=v5litepod-${tpu#*-} usual=v2-alpha-tpuv5-lite ;;
  v5litepod-*) type=$tpu usual=v2-alpha-tpuv5-lite ;;
  v5p-*) type=$tpu usual=v2-alpha-tpuv5 ;;
  v6e-*) type=$tpu usual=v2-alpha-tpuv6e ;;
  '') [[ $only && $only != create ]] || fail '--tpu is missing: such as v5e-16' ;;
  *) fail "--tpu=$tpu: v4-N, v5e-N, v5p-N or v6e-N; newer ones are on GKE alone (launch/gke.py)" ;;
esac

where=("--zone=$zone")
[[ ! $project ]] || where+=("--project=$project")
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

say() { echo "$name: $*" >&2; }

run() { # runs a command, or prints it
  if [[ $dry_run ]]; then
    printf '%q ' "${@:1:$#-1}" && printf '%q\n' "${!#}"
  else
    "$@"
  fi
}

on_workers() { run "${vm[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

cache_of() { # a new slice has an empty disk: keeps what is compiled beside what the command writes to a bucket
  local word before='' place=''
  for word in ${variables[@]+"${variables[@]}"}; do
    [[ $word != JAX_COMPILATION_CACHE_DIR=* ]] || return 0
  done
  for word in "$@"; do
    case $before$word in
      --workdir=gs://?*/?* | --out=gs://?*/?* | --workdirgs://?*/?* | --outgs://?*/?*)
        place=gs://${word#*gs://}
        break
        ;;
    esac
    before=''
    if [[ $word == --workdir || $word == --out ]]; then before=$word; fi
  done
  place=${place%/}
  [[ ! $place ]] || variables+=("JAX_COMPILATION_CACHE_DIR=${place%/*}/compiled")
}

seen='' now=''
state() { # sets `now`: ACTIVE, FAILED, ..., NONE where there is no such slice, UNKNOWN where gcloud does not say
  local errors
  errors=$(mktemp)
  if now=$("${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$errors"); then
    now=${now:-UNKNOWN}
  elif grep -qE 'NOT_FOUND|was not found' "$errors"; then
    now=NONE
  else
    now=UNKNOWN
    if [[ $seen != UNKNOWN ]]; then cat "$errors" >&2; fi
  fi
  rm -f "$errors"
  # What never answered is a mistake (no login, no such project); what answered before comes back.
  [[ $now != UNKNOWN || $seen ]] || fail 'gcloud does not answer; look above'
  seen=$now
}

await_answer() { # `state`, again and again until gcloud answers
  while state && [[ $now == UNKNOWN ]]; do sleep "$poll"; done
}

create() {
  local flags=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=${runtime:-$usual}")
  [[ ! $spot ]] || flags+=(--spot)
  if [[ $dry_run ]]; then
    run "${queued[@]}" create "$name" "${where[@]}" "${flags[@]}"
    run "${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local before=''
  while state && [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || say "$now"
    before=$now
    case $now in
      NONE)
        "${queued[@]}" create "$name" "${where[@]}" "${flags[@]}"
        installed=''
        ;;
      FAILED | SUSPENDED) delete ;;
      *) sleep "$poll" ;;
    esac
  done
}

delete() { run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet; }

install() { # what git knows or would add, without the tests, and the packages of the lock file
  local archive=${TMPDIR:-/tmp}/$name.tgz
  # shellcheck disable=SC2016 # expanded by the inner shell
  run bash -c 'cd "$1" && git ls-files -co --exclude-standard -- . ":!tests" | while IFS= read -r file; do
if [ -e "$file" ]; then printf "%s\n" "$file"; fi; done | tar -czf "$2" -T -' pack "$root" "$archive" || return
  run "${vm[@]}" scp "$archive" "$name:$name.tgz" "${where[@]}" --worker=all || return
  on_workers all "set -e; mkdir -p $name && tar -xzf $name.tgz -C $name && cd $name
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv
VIRTUAL_ENV=\$PWD/.venv ~/.local/bin/uv pip install --quiet -r requirements-tpu.lock"
}

start() { # on every worker, without a terminal, so that it survives the connection; one that runs already goes on
  local words=(env VQGAN_JAX_DISTRIBUTED=1 ${variables[@]+"${variables[@]}"} "$@") inner clear=''
  inner="PATH=\$PWD/.venv/bin:\$PATH $(printf '%q ' "${words[@]}"); echo \$? > launch.code"
  # Workers end up to 100 s after the first one has crashed: that is when JAX misses its heartbeat.
  [[ ! $again ]] || clear="timeout 120 tail --pid=\$(cat launch.pid) -f /dev/null; kill -KILL -- -\$(cat launch.pid)
"
  on_workers all "cd $name; told=$(printf '%q' "$inner")
${clear}if ! { [ -e launch.pid ] && kill -0 \$(cat launch.pid); } 2>/dev/null; then
rm -f launch.code; printf %s \"\$told\" > launch.command
setsid nohup bash -c \"\$told\" > launch.log 2>&1 < /dev/null & echo \$! > launch.pid
elif [ \"\$(cat launch.command)\" != \"\$told\" ]; then echo 'another command runs here; give another --name' >&2; exit 1; fi"
}

follow() { # shows the first worker's log and sets `code`; empty where the slice has gone
  code=''
  local pid="\$(cat $name/launch.pid)"
  local tail="tail -n +1 -F --pid=$pid $name/launch.log"
  local look="cat $name/launch.code 2>/dev/null || kill -0 $pid 2>/dev/null || echo 137" # it was killed with its shell
  if [[ $dry_run ]]; then
    on_workers 0 "$tail"
    on_workers 0 "$look"
    return
  fi
  while [[ ! $code ]]; do
    on_workers 0 "$tail" || say 'the connection is lost'
    code=$(on_workers 0 "$look" 2>/dev/null || true)
    if [[ ! $code ]]; then
      await_answer
      [[ $now == ACTIVE ]] || return 0
      sleep "$poll"
    fi
  done
}

if [[ $only && $only != run ]]; then
  "$only"
  exit
fi
crashes=0 code='' again='' installed=''
cache_of "$@"
while :; do
  [[ $only ]] || create
  if [[ ! $only && ! $installed ]] && ! install; then
    await_answer
    [[ $now != ACTIVE ]] || fail 'could not install; look above, or go on with --only=install'
    continue # taken away meanwhile
  fi
  installed=1
  if ! start "$@"; then
    await_answer
    [[ $now != ACTIVE ]] || fail 'could not start the command; look above'
  fi
  began=$SECONDS
  follow
  if [[ $dry_run ]]; then break; fi
  if ((SECONDS - began >= lasting)); then crashes=0; fi
  case $code in
    0 | 2) break ;;
    '')
      [[ ! $only ]] || fail 'the slice has gone'
      say 'the slice was taken away; another is asked for'
      again=''
      continue
      ;;
    42) say 'preempted and saved; restarted' ;;
    *)
      if ((crashes >= restarts)); then break; fi
      crashes=$((crashes + 1))
      say "ended with $code; restart $crashes of $restarts"
      ;;
  esac
  again=1
done
[[ $only || $keep ]] || delete
exit "${code:-0}"
