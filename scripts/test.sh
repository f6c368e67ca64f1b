#!/usr/bin/env bash
# The tests, from nothing but bash and Python: makes .venv, installs requirements, runs pytest on
# the cores that there are, four at most. Arguments are pytest's; -n 0 runs all in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

make_environment requirements.txt tests/requirements.txt
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
