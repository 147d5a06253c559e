#!/usr/bin/env bash
# Make a cache of the teacher's distributions, on N processes of this machine; see start.sh.
#   launch/generate.sh N --config run.yaml [section.key=value ...]
set -euo pipefail

exec "$(dirname -- "${BASH_SOURCE[0]}")/start.sh" accel_distill.generate "$@"
