#!/usr/bin/env bash
# One run on a Ray cluster in a Slurm allocation, from an environment that has dpo-ray:
#   sbatch --nodes=4 cluster/slurm.sh jobs/my-run.yaml [--set section.key=value ...]
# Given again, and after a requeue, the run goes on where it stands. $HOME must be a folder that all nodes share.
# Never yet run under Slurm: the tests put stand-ins in place of scontrol, srun and Ray.
#SBATCH --job-name=dpo-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch cluster/slurm.sh CONFIG [--set SECTION.KEY=VALUE ...]" >&2
    exit 2
fi
readonly port=6379 patience_s=180

# A token for this job alone: Ray reads the file, so that no command line or environment shows it.
folder=$(mktemp -d "$HOME/.dpo-ray-job-XXXXXXXX")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/auth_token
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

started=()
end() {
    local status=$?
    trap - EXIT TERM INT
    kill "${started[@]}" 2>/dev/null || true
    wait
    rm -rf "$folder"
    exit "$status"
}
trap end EXIT
# Before the time is up, and when the job is cancelled: the driver has a checkpoint written first.
driver=
stop() {
    if [[ -n $driver ]]; then
        kill -TERM "$driver" 2>/dev/null || true
        wait "$driver" || true
    fi
    exit 143
}
trap stop TERM INT

start_ray() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="/tmp/ray-$SLURM_JOB_ID" --block "$@" &
    started+=($!)
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# This script runs on the first node, whose name may stand for 127.0.1.1 there.
read -r head_ip _ < <(hostname --all-ip-addresses)
address=$head_ip:$port

start_ray "${nodes[0]}" --head --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1
until ray health-check --address "$address" >/dev/null 2>&1; do
    if ((SECONDS > patience_s)) || ! kill -0 "${started[0]}" 2>/dev/null; then
        echo "error: Ray's head did not start on ${nodes[0]}; its output is above" >&2
        exit 1
    fi
    sleep 0.5
done
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$address"
done

RAY_ADDRESS=$address dpo-ray train "$@" &
driver=$!
started+=("$driver")
wait "$driver"
