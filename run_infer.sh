#!/usr/bin/env bash
# Draw: ./run_infer.sh --prompt "a handwritten seven" [--out seven.png] [--section.key value …]
# Uses the newest checkpoint of the run that CONFIG_FILE describes; variables as in run_train.sh.
set -euo pipefail
repo=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# Threads that wait by spinning make a shared machine three times slower, and gain nothing here.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PYTHONPATH="${repo}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${PYTHON:-python}" -m torchtitan_flux.launch infer "$@"
