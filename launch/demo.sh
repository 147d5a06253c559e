#!/usr/bin/env bash
# The whole way on a small example that needs no download of data or weights: minutes on two CPU cores.
#   launch/demo.sh [arguments of accel-distill demo]
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh"
exec "$root/.venv/bin/accel-distill" demo "$@"
