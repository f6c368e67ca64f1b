#!/usr/bin/env bash
# The demo, from nothing but bash and Python: makes .venv, installs requirements.txt, runs main.py.
# Arguments are main.py's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

make_environment requirements.txt
.venv/bin/python main.py --save_weights "$@"
cat <<'END'

Next, in your shell:  source .venv/bin/activate
Your own images:      docs/custom_datasets.md
END
