#!/usr/bin/env bash
# Train: ./run_train.sh [--section.key value …], from any directory.
#   NGPU           ranks on this machine (default 1)
#   CONFIG_FILE    TOML file (default train_configs/flux_digits.toml)
#   LOG_RANK       ranks whose output is shown, e.g. 0,1 (default 0)
#   NNODES         machines (default 1); then RDZV_ENDPOINT, host:port of the first, on all of them,
#                  and NODE_RANK, 0 to NNODES - 1
#   GRACE          seconds to save in after SIGTERM or Ctrl-C (default 600)
#   PYTHON         interpreter (default python)
# --help lists every key, --check only checks the configuration, --print-config prints it as resolved.
# Exit status: 0 done, or stopped on request and saved; 2 wrong configuration; 1 anything else.
set -euo pipefail
repo=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# Threads that wait by spinning make a shared machine three times slower, and gain nothing here.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PYTHONPATH="${repo}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${PYTHON:-python}" -m torchtitan_flux.launch train "$@"
