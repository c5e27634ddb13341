#!/usr/bin/env bash
# A Slurm of one real node, this machine, without systemd: munged, slurmctld and slurmd, started by hand as root.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge     (Debian; once)
#   tests/slurm_node.sh start FOLDER [CPUS]   everything lies in FOLDER; /etc/slurm/slurm.conf becomes a link into it
#   tests/slurm_node.sh stop FOLDER           ends its daemons, removes the link
# The node claims one GPU, a file that is none: enough to see that a rule's `gpu` reaches the scheduler. There is no
# accounting database, so Snakemake must ask squeue (profiles/slurm says how).
set -euo pipefail

usage() { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
command=$1 cpus=${3:-$(nproc)} host=$(hostname -s)
mkdir -p "$2"
place=$(cd "$2" && pwd)
system=/etc/slurm/slurm.conf # where commands inside a job look: the plugin hands no SLURM_CONF on
export SLURM_CONF=$place/slurm.conf

# A daemon in the background, cut off from the caller, who would wait for its output to end.
daemon() { "$@" </dev/null >>"$place/daemons.txt" 2>&1; }

configure() {
    if [ -e "$system" ] && [ "$(readlink "$system")" != "$SLURM_CONF" ]; then
        echo "$system: expected none, found one of another Slurm; use that" >&2
        exit 1
    fi
    mkdir -p "$place/state" "$place/spool"
    chmod 755 "$place"
    (umask 077 && head -c 128 /dev/urandom >"$place/munge.key")
    cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) * 9 / 10240)) Gres=gpu:1
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    echo "NodeName=$host Name=gpu File=/dev/null" >"$place/gres.conf"
    ln -sfn "$SLURM_CONF" "$system"
}

start() {
    configure
    daemon munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" \
        --pid-file="$place/munged.pid" --log-file="$place/munged.log" --seed-file="$place/munge.seed"
    daemon slurmctld
    daemon slurmd
    for _ in $(seq 60); do
        if sinfo --noheader --format=%T 2>/dev/null | grep -qx idle; then
            sinfo
            return
        fi
        sleep 1
    done
    echo "the node is not idle after a minute; see $place/*.log" >&2
    exit 1
}

stop() {
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    for name in slurmd slurmctld munged; do
        if [ -s "$place/$name.pid" ]; then
            kill "$(cat "$place/$name.pid")" 2>/dev/null || true
        fi
    done
    if [ "$(readlink "$system")" = "$SLURM_CONF" ]; then
        rm "$system"
    fi
}

case $command in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
