#!/usr/bin/env bash
# Datasets x shots x seeds, one run of main.py each. Finished runs are skipped, failed ones are
# listed at the end. Stop and start again at any time.
#
#     DATA=/path/to/data bash scripts/all_datasets.sh
#     DATA=/path/to/data DATASETS="eurosat dtd" SHOTS="1 4" SEEDS="1 2 3" \
#         bash scripts/all_datasets.sh --backbone ViT-B/32 --save_path results
#
# Arguments are passed on to main.py. PYTHON names the interpreter (.venv's where there is one).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

all="imagenet sun397 fgvc eurosat stanford_cars food101 oxford_pets oxford_flowers caltech101 dtd ucf101"
read -ra datasets <<<"${DATASETS:-$all}"
read -ra shots <<<"${SHOTS:-1 2 4 8 16}"
read -ra seeds <<<"${SEEDS:-1 2 3}"
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
fi
if [ -z "${DATA:-}" ]; then
    echo "$0: set DATA to the folder of the datasets (DATASETS.md)" >&2
    exit 2
fi

trap 'echo "stopped; the same command goes on from here" >&2; exit 130' INT TERM
failed=()
for dataset in "${datasets[@]}"; do
    for shot in "${shots[@]}"; do
        for seed in "${seeds[@]}"; do
            run=(--dataset "$dataset" --shots "$shot" --seed "$seed")
            echo "==> ${run[*]}"
            "$python" main.py --root_path "$DATA" "${run[@]}" "$@"
            status=$?
            if [ $status -ge 128 ]; then # stopped by a signal, as Ctrl-C is
                kill -INT $$
            elif [ $status -ne 0 ]; then
                failed+=("${run[*]}")
            fi
        done
    done
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "${#failed[@]} runs failed:" >&2
    printf '    %s\n' "${failed[@]}" >&2
    exit 1
fi
