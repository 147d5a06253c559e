#!/usr/bin/env bash
# The tests, from any directory; the network is used to install, and by no test.
#   launch/test.sh [arguments of pytest]
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" test
cd -- "$root"
exec "$root/.venv/bin/python" -m pytest "$@"
