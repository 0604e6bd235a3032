#!/usr/bin/env bash
# Train on several nodes under Slurm; run in the repository:
#   CONFIG_FILE=train_configs/flux_schnell_model.toml \
#       sbatch --nodes 4 --gpus-per-node 8 --time 8:00:00 scripts/slurm.sh --training.steps 100000
# One launcher for each node. Five minutes before the time limit, or when Slurm pre-empts the job,
# the ranks finish their step and save, and the job is put back into the queue; started again, it
# goes on from there. Variables as in run_train.sh; NGPU defaults to the GPUs of a node.
#SBATCH --job-name=flux
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=flux-%j.txt
set -euo pipefail
# Slurm runs a copy of this file from its spool folder.
cd "${SLURM_SUBMIT_DIR:?sbatch sets it: start me by sbatch, in the repository}"

export NNODES="${SLURM_JOB_NUM_NODES}"
export NGPU="${NGPU:-${SLURM_GPUS_ON_NODE:-1}}"
hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST}")
first=${hosts%%$'\n'*}
# a port of its own for each job, should two share a node
export RDZV_ENDPOINT="${RDZV_ENDPOINT:-${first}:$((20000 + SLURM_JOB_ID % 10000))}"

asked=""
interrupted=""
stop() {
    asked=yes
    interrupted=yes
    # To the job's steps. A SIGTERM to srun itself would kill them.
    scancel --signal=TERM "${SLURM_JOB_ID}" || true
}
trap stop USR1 TERM

# --kill-on-bad-exit: when the ranks of one node fail, those of the others must not wait for them.
srun --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run_train "$@" &
step=$!
while true; do
    interrupted=""
    status=0
    wait "$step" || status=$?
    [[ -n "$interrupted" ]] || break # a trapped signal ends the wait, not the step
done
if [[ -n "$asked" && "$status" == 0 ]]; then
    scontrol requeue "${SLURM_JOB_ID}"
fi
exit "$status"
