#!/usr/bin/env bash
# Entry point on Replit: the environment lives outside the workspace tree, which is packaged into an 8 GiB image.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${OLYMPUS_SERVER__API_KEY:?set the secret OLYMPUS_SERVER__API_KEY: the server is reachable from the internet}"
export VENV="${OLYMPUS_VENV:-$HOME/.olympus-venv}"
export OLYMPUS_CACHE_DIR="${OLYMPUS_CACHE_DIR:-$HOME/.cache/olympus}"
exec make serve
