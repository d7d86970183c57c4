#!/usr/bin/env bash
# A Slurm of one node, this machine, to try launch/slurm.sbatch on: brought up, and down again, as root.
#
#   launch/local_slurm.sh up FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf; sbatch, squeue, ...
#   launch/local_slurm.sh down FOLDER
#
# Needs slurm-wlm and munge (apt-get install slurm-wlm munge). All it writes is in FOLDER; a Slurm of the
# system's own is not touched.
set -euo pipefail

[[ $# == 2 && $1 == @(up|down) ]] || {
    sed -n '4,5p' "$0" | cut -c3-
    exit 2
} >&2
mkdir -p "$2"
folder=$(cd "$2" && pwd)

end() {
    for name in slurmd slurmctld munged; do
        [[ ! -f $folder/$name.pid ]] || kill "$(<"$folder/$name.pid")" 2>/dev/null || true
    done
}

if [[ $1 == down ]]; then
    end
    exit
fi

for program in munged mungekey slurmctld slurmd sbatch; do
    command -v $program >/dev/null || {
        echo "error: $program is missing; install it with: apt-get install slurm-wlm munge" >&2
        exit 2
    }
done
read -r controller daemon < <(
    python3 - <<'PYTHON'
import socket

held = [socket.socket() for _ in range(2)]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PYTHON
)
mkdir -p "$folder"/{state,spool}
[[ -f $folder/munge.key ]] || mungekey --create --keyfile="$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
host=$(hostname -s)
cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$daemon
# JAX makes its port of a job's number: no two Slurms of one machine count alike.
FirstJobId=$controller
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
# A job of `urgent` takes the place of one of `main`, which is told by the signal that it asked for.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,batch_sched_delay=0
RebootProgram=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=$host State=UP PriorityTier=2
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd -N "$host"
for ((tenth = 0; tenth < 200; tenth++)); do
    if [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]]; then
        echo "export SLURM_CONF=$SLURM_CONF"
        exit
    fi
    sleep 0.1
done
echo "error: the node does not come up; see the logs in $folder" >&2
end
exit 1
