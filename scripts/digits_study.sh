#!/usr/bin/env bash
# The comparison in miniature, on the embedded digits: learning rates chosen on validation images,
# then three methods at 1 to 16 shots, overfitting curves, the grid over density and T, the
# ablation, SO without its moments and with others at ten seeds, forgetting, and interpolation.
# Writes docs/digits/; runs lie in results/digits_study/. It takes some 80 minutes on two cores, an
# estimate from its parts. Stop it and start it again at any time; JOBS (2) runs go at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

make_environment requirements.txt
export JOBS=${JOBS:-2} LOGS=${LOGS:-results/digits_study/logs}
for part in rates compare overfitting grid ablation moments_rates moments; do
    .venv/bin/python scripts/experiment.py "configs/experiments/digits_$part.yaml" "$@"
done
.venv/bin/python scripts/digits_study.py "$@"
