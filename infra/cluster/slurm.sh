#!/usr/bin/env bash
#SBATCH --job-name=clcr
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --no-kill
# A Ray cluster for the time of one job, on the hosts that Slurm gives: the head node on the first, workers on the others.
#   sbatch --nodes=4 --gpus-per-node=1 infra/cluster/slurm.sh python pipelines/train.py --workers 4 --store ... --out ...
# Run it from this checkout, on a file system that every host sees; what the job needs (AWS_*, MLFLOW_TRACKING_URI) is
# taken from the environment. A host that dies takes its work with it, no more; sbatch it again to resume after a stop.
set -euo pipefail
[ $# -gt 0 ] || { echo "error: give the job: sbatch infra/cluster/slurm.sh python pipelines/extract.py ..." >&2; exit 2; }
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export PATH RAY_AUTH_TOKEN RAY_AUTH_MODE=token
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take over the job's own since Slurm 22.05

# Hosts may be shared with other jobs: ports and folders of this job's own, from its number.
base=$((20000 + SLURM_JOB_ID % 1000 * 10))
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap hostname --ip-address | awk '{print $1}')
start="ray start --block --disable-usage-stats --temp-dir=/tmp/ray-$SLURM_JOB_ID --num-cpus=$SRUN_CPUS_PER_TASK"
start+=" --dashboard-agent-listen-port=$((base + 2)) --metrics-export-port=$((base + 3))"
start+=" --dashboard-agent-grpc-port=$((base + 4)) --runtime-env-agent-port=$((base + 5)) --min-worker-port=0 --max-worker-port=0"

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap $start --head --node-ip-address="$ip" --port="$base" \
  --dashboard-host="$ip" --dashboard-port=$((base + 1)) --ray-client-server-port=$((base + 6)) &
started=($!)
require_running() {
  for pid in "${started[@]}"; do
    kill -0 "$pid" 2>/dev/null || { echo "error: Ray did not start on $1" >&2; exit 1; }
  done
}
others=$((${#hosts[@]} - 1))
until ray health-check --address="$ip:$base" 2>/dev/null; do
  require_running "$head"
  sleep 2
done
if [ "$others" -gt 0 ]; then
  srun --nodes="$others" --ntasks="$others" --exclude="$head" --overlap --kill-on-bad-exit=0 \
    $start --address="$ip:$base" &
  started+=($!)
fi
export RAY_API_SERVER_ADDRESS="http://$ip:$((base + 1))"
until [ "$(ray list nodes --address="$RAY_API_SERVER_ADDRESS" --filter state=ALIVE --format json 2>/dev/null |
  python -c 'import json, sys; print(len(json.load(sys.stdin)))' 2>/dev/null)" = "${#hosts[@]}" ]; do
  require_running "all of ${hosts[*]}"
  sleep 2
done
ray job submit --working-dir . -- "$@"
