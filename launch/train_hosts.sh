#!/bin/bash
# Trains on given hosts without Slurm: torchrun on each, started over ssh.
#
#   launch/train_hosts.sh [OPTIONS] HOST1,HOST2,... CONFIG --run-dir runs/NAME [--set key=value ...] [--resume]
#
#   --ranks N          processes on each host (gpu: one for each GPU of it)
#   --port P           where they meet, on HOST1 (29500)
#   --address A        what the other hosts call HOST1 (its name in the list, without USER@)
#   --python PATH      interpreter on the hosts (.venv/bin/python of this folder)
#   --env NAME=VALUE   a variable of the ranks, NCCL_SOCKET_IFNAME=ib0 for example; may be given many times
#
# Run it in the checkout: the hosts must see this folder, the run's directory and the shards under the same names, and
# ssh must reach them without asking. SSH="ssh -p 2222" changes the command.
#
# Ctrl-C, or TERM, has every rank save and stop; --resume goes on from there. A second Ctrl-C ends all at once. When one
# host fails, the others are ended too, and nothing is left running on any. It does not start again by itself: that, and
# nodes that are checked and replaced, is what `piip-scale submit` does under Slurm.
set -euo pipefail

# The others learn of a rank's failure from the run's directory, and end by themselves well within that.
PATIENCE_S=${PATIENCE_S:-60}

fail() {
  echo "train_hosts: $*" >&2
  exit 2
}

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# A word that any login shell reads back as it was.
quoted() {
  printf "'%s' " "${1//\'/\'\\\'\'}"
}

read_arguments() {
  RANKS=gpu PORT=29500 ADDRESS='' PYTHON=$PWD/.venv/bin/python VARIABLES=()
  while (($#)) && [[ $1 == --* ]]; do
    (($# > 1)) || fail "$1 needs a value"
    case $1 in
    --ranks) RANKS=$2 ;;
    --port) PORT=$2 ;;
    --address) ADDRESS=$2 ;;
    --python) PYTHON=$2 ;;
    --env)
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env: got '$2'; it reads NAME=VALUE"
      VARIABLES+=("$2")
      ;;
    *) fail "unknown option '$1'; there are --ranks, --port, --address, --python, --env; those of the training follow CONFIG" ;;
    esac
    shift 2
  done
  (($# >= 2)) || usage
  [[ $RANKS =~ ^([1-9][0-9]{0,3}|gpu)$ ]] || fail "--ranks: got '$RANKS'; a whole number, or gpu"
  if ! [[ $PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((PORT > 65535)); then
    fail "--port: got '$PORT'; 1 to 65535"
  fi
  IFS=, read -r -a HOSTS <<<"$1"
  local host
  for host in "${HOSTS[@]}"; do
    [[ $host =~ ^[A-Za-z0-9@._:-]+$ && $host != -* ]] || fail "hosts: got '$1'; names with commas between them"
  done
  [[ -f $2 ]] || fail "config file not found: '$2'"
  : "${ADDRESS:=${HOSTS[0]#*@}}"
  shift
  TRAINING=("$@")
}

# What runs on a host. It reads words from here: `stop` has the ranks save; the end of them, which also comes when this
# script or the connection is gone, ends them.
host_script() { # INDEX
  local word
  printf 'cd %s && exec 3<&0 || exit 1\n' "$(quoted "$PWD")"
  printf 'env '
  for word in "${VARIABLES[@]}" \
    "$PYTHON" -m torch.distributed.run --nnodes="${#HOSTS[@]}" --node-rank="$1" --nproc-per-node="$RANKS" \
    --master-addr="$ADDRESS" --master-port="$PORT" --max-restarts=0 \
    -m piip_scale.cli.main train "${TRAINING[@]}"; do
    quoted "$word"
  done
  cat <<'END'
</dev/null &
ranks=$!
{
  while read -r word <&3; do
    [ "$word" = stop ] && pkill -USR2 -P "$ranks"
  done
  kill -TERM "$ranks"
  for ((try = 0; try < 100; try++)); do
    kill -0 "$ranks" || exit
    sleep 0.2
  done
  pkill -KILL -P "$ranks"
  kill -KILL "$ranks"
} 2>/dev/null &
reader=$!
wait "$ranks"
code=$?
kill "$reader"
exit "$code"
END
}

start() {
  local index ssh pipe writer
  read -r -a ssh <<<"${SSH:-ssh}"
  PIDS=() WRITERS=()
  for index in "${!HOSTS[@]}"; do
    pipe=$FOLDER/$index
    mkfifo "$pipe"
    {
      # A connection must not hold the others' pipes open, nor get a terminal's Ctrl-C.
      for writer in "${WRITERS[@]}"; do exec {writer}>&-; done
      exec setsid "${ssh[@]}" "${HOSTS[index]}" "bash -c $(quoted "$(host_script "$index")")"
    } <"$pipe" &
    PIDS+=($!)
    exec {writer}>"$pipe"
    WRITERS+=("$writer")
  done
}

tell_all() {
  local writer
  for writer in "${WRITERS[@]}"; do echo "$1" >&"$writer" || true; done 2>/dev/null
}

hang_up() {
  local writer
  for writer in "${WRITERS[@]}"; do exec {writer}>&-; done
  WRITERS=()
}

asked=0
ask_to_stop() {
  ((asked += 1))
  if ((asked == 1)); then
    echo "train_hosts: asking all ranks to save and stop; once more ends them at once" >&2
    tell_all stop
  else
    hang_up
  fi
}

# Waits for all hosts; the first that fails gives the exit code, and the others some time.
await() {
  local index code first=0 deadline=0 left
  while :; do
    left=0
    for index in "${!PIDS[@]}"; do
      if kill -0 "${PIDS[index]}" 2>/dev/null; then
        left=1
        continue
      fi
      code=0
      wait "${PIDS[index]}" || code=$?
      unset "PIDS[index]"
      ((code == 0)) && continue
      echo "train_hosts: ${HOSTS[index]} ended with exit code $code" >&2
      ((first)) || first=$code deadline=$((SECONDS + PATIENCE_S))
    done
    ((left)) || return "$first"
    ((deadline && SECONDS > deadline)) && hang_up
    sleep 0.3 || true
  done
}

read_arguments "$@"
FOLDER=$(mktemp -d)
trap 'hang_up; rm -rf "$FOLDER"' EXIT
trap ask_to_stop INT TERM USR2
start
await
