#!/usr/bin/env bash
# The path that torchtitan users know; the work is done by run_infer.sh at the top.
exec "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../run_infer.sh" "$@"
