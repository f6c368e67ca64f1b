#!/usr/bin/env bash
# The tests, from nothing but bash and Python: makes .venv, installs requirements, runs pytest.
# Arguments are pytest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

make_environment requirements.txt tests/requirements.txt
exec .venv/bin/python -m pytest "$@"
