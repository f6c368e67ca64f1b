#!/usr/bin/env bash
# The demo, from nothing but bash and Python: makes .venv, installs requirements.txt, runs main.py.
# Arguments are main.py's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

make_environment requirements.txt
exec .venv/bin/python main.py "$@"
