#!/usr/bin/env bash
# Train: ./run_train.sh [--section.key value …], from any directory.
#   NGPU         ranks on this machine (default 1)
#   CONFIG_FILE  TOML file (default train_configs/flux_digits.toml)
#   LOG_RANK     ranks whose output is shown, e.g. 0,1 (default 0)
#   PYTHON       interpreter (default python)
set -euo pipefail
repo=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# Threads that wait by spinning make a shared machine three times slower, and gain nothing here.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PYTHONPATH="${repo}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nproc_per_node="${NGPU:-1}" --rdzv_backend c10d --rdzv_endpoint=localhost:0 \
    --local-ranks-filter "${LOG_RANK:-0}" \
    -m torchtitan_flux.training.trainer \
    --job.config_file "${CONFIG_FILE:-train_configs/flux_digits.toml}" "$@"
