#!/usr/bin/env bash
# The study on the embedded digits, and on Greek letters that a script draws: learning rates chosen on
# validation images, methods and bias corrections at 1 to 16 shots, overfitting, the grid over density
# and T, ablations of supports and moments, forgetting, and interpolation. Writes docs/digits/; runs
# are in results/digits_study/. It takes some two and a half hours on two cores, an estimate from its
# parts. Stop and restart it at any time; JOBS (2) runs go at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/environment.sh

make_environment requirements.txt
export JOBS=${JOBS:-2} LOGS=${LOGS:-results/digits_study/logs}
[ -d data/greek ] || .venv/bin/python scripts/digits/greek.py --out data/greek
for part in lr compare moments overfitting grid ablation greek_lr greek greek_rates; do
    .venv/bin/python scripts/experiment.py "configs/experiments/digits_$part.yaml"
done
.venv/bin/python scripts/digits/collect.py
.venv/bin/python scripts/digits/study.py
