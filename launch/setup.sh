#!/usr/bin/env bash
# Make .venv in this checkout and install the package into it, with the versions of constraints.txt.
#   launch/setup.sh [EXTRA]         EXTRA: test, deepspeed, lora or tensorboard
# Run again, it answers at once, until setup.cfg or the constraints change.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
extra=${1:-}
venv=$root/.venv
stamp=$venv/.installed${extra:+-$extra}
wanted="$root $(cat -- "$root/setup.cfg" "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum)"

find_python() {
  local candidate
  for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer on the PATH (found: $(python3 --version 2>&1)); install one, then run this again" >&2
  return 2
}

if [ "$(cat -- "$stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  python=$(find_python)
  echo "Making $venv with $("$python" --version)"
  if ! "$python" -m venv --clear "$venv"; then
    echo "error: $python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
    exit 2
  fi
fi

echo "Installing accel-distill${extra:+ [$extra]} into $venv: PyTorch and more, once, some minutes"
if ! command -v nvidia-smi >/dev/null 2>&1; then
  echo "(No NVIDIA driver here. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets a much smaller PyTorch.)"
fi
# editable_mode=compat puts the checkout on the path. The other way, a hook, loses against the folder of the checkout itself
# where Python starts beside it: that folder is called accel_distill too.
"$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$root/launch/constraints.txt" \
  --config-settings editable_mode=compat --editable "$root${extra:+[$extra]}"
printf '%s\n' "$wanted" >"$stamp"
