#!/usr/bin/env bash
# Train the student from the cache, on N processes of this machine; see start.sh.
#   launch/train.sh N --config run.yaml [section.key=value ...]
set -euo pipefail

exec "$(dirname -- "${BASH_SOURCE[0]}")/start.sh" accel_distill.train "$@"
