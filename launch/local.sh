#!/usr/bin/env bash
# Trains in several processes on this machine, as a cluster would.
#
#   launch/local.sh -n N [-d D] CONFIG [overrides]
#
#   -n N   processes
#   -d D   run on CPU, with D virtual devices in each process
#
# Without -d the GPUs of the machine are dealt out evenly, in order: -n 8 on eight GPUs gives each process
# one; -n 1 gives one process all. Without GPUs each process has one CPU device.
#
# Process 0 has the screen; what the others write is shown if they fail, but for a config that all refuse. If
# one process fails, the others are ended and its exit status is this script's. Ctrl-C, SIGTERM and SIGUSR1 are
# passed on: all save at the same step and stop, with status 130 after Ctrl-C and 75 after the others; a second
# Ctrl-C ends all at once. If this script is killed, its processes do the same as after SIGTERM.
set -euo pipefail

usage() {
    sed -n '4,7p' "$0" | cut -c3-
    exit 2
} >&2

processes='' devices=''
while getopts n:d: option; do
    case $option in
        n) processes=$OPTARG ;;
        d) devices=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^([1-9][0-9]*)?$ && $# -gt 0 ]] || usage

stop() {
    echo "error: $1" >&2
    exit 2
}

python3 -c 'import stack' 2>/dev/null || stop "this Python has no stack; run: uv run $0 ..."

gpus=()
if [[ -n $devices ]]; then
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
elif [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
    while read -r gpu; do gpus+=("$gpu"); done < <(nvidia-smi -L 2>/dev/null | grep '^GPU ')
fi
share=$((${#gpus[@]} / processes))
((share * processes == ${#gpus[@]})) || stop "${#gpus[@]} GPUs cannot be dealt out to $processes processes"

JAX_COORDINATOR_ADDRESS=127.0.0.1:$(
    python3 -c 'from stack.parallel.ports import free_port; print(free_port())'
)
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$processes STACK_LAUNCHER=$$

logs=$(mktemp -d "${TMPDIR:-/tmp}/stack-logs.XXXXXX")
pids=()

# Waits so many seconds for all to go by themselves, then kills them.
end() {
    for ((tenth = 0; tenth < 10 * $1; tenth++)); do
        kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null
    [[ ! -t 1 ]] || printf '\e[?25h' # The bar of process 0 hides the cursor.
}

# Passes a signal on; the loop below waits for what it leads to.
pass() {
    if [[ $1 == INT && $stopping ]]; then
        trap '' INT TERM USR1
        end 0
        rm -rf "$logs"
        exit 130
    fi
    stopping=$1
    kill -"$1" "${pids[@]}" 2>/dev/null || true
}

# Ends the run for the processes in `failed`; of their statuses the highest, a signal before an error.
give_up() {
    # Asked to stop, all save and go by themselves.
    if [[ $highest == 75 || ($stopping && $highest == 130) ]]; then
        end 60
        rm -rf "$logs"
        [[ $stopping != INT ]] || exit 130
        exit 75
    fi
    # A config that cannot be is refused by all, each in its time, and told by process 0 on the screen; the
    # others only say it again.
    for ((tenth = 0; highest == 2 && tenth < 200; tenth++)); do
        look
        [[ ! ${statuses[0]-} ]] || break
        sleep 0.1
    done
    end 2
    if [[ ${statuses[0]-0} == 2 ]]; then
        rm -rf "$logs"
        exit 2
    fi
    for process in "${failed[@]}"; do
        ((process == 0)) || tail -n 30 "$logs/$process" | sed "s/^/[process $process] /"
        echo "error: process $process of $processes failed with status ${statuses[process]}"
    done >&2
    echo "error: what the others than process 0 wrote is in $logs" >&2
    exit "$highest"
}

# Job control gives each process its own group: the terminal's Ctrl-C then comes here alone, and is not
# ignored there.
set -m
stopping=''
trap 'pass INT' INT
trap 'pass TERM' TERM
trap 'pass USR1' USR1
for ((process = 0; process < processes; process++)); do
    export JAX_PROCESS_ID=$process
    if ((share)); then
        JAX_LOCAL_DEVICE_IDS=$(seq -s, $((process * share)) $((process * share + share - 1)))
        export JAX_LOCAL_DEVICE_IDS
    fi
    if ((process)); then
        python3 -m stack train "$@" </dev/null >"$logs/$process" 2>&1 &
    else
        python3 -m stack train "$@" </dev/null &
    fi
    pids+=($!)
done

# Notes the processes that have ended.
look() {
    running=0
    for process in "${!pids[@]}"; do
        [[ ! ${statuses[process]-} ]] || continue
        if kill -0 "${pids[process]}" 2>/dev/null; then
            running=$((running + 1))
            continue
        fi
        statuses[process]=0
        wait "${pids[process]}" 2>/dev/null || statuses[process]=$?
        if ((statuses[process])); then
            failed+=("$process")
            highest=$((statuses[process] > highest ? statuses[process] : highest))
        fi
    done
}

running=$processes failed=() statuses=() highest=0
while ((running)); do
    sleep 0.2 || true # A signal may end it.
    look
    ((!highest)) || give_up
done
rm -rf "$logs"
