#!/usr/bin/env bash
# The paper's table from the data to the report: SO and LoRA on eleven datasets, 4 shots, 3 seeds.
#
#     DATA=/path/to/data bash scripts/reproduce.sh
#     DATA=/path/to/data SHOTS="1 4 16" GPUS="0 1" bash scripts/reproduce.sh --precision bf16
#
# It checks the data and prints how to get what is missing, makes a run of each method, estimates the
# time of all others from these, makes them, and writes a report beside the published figures. The
# same command continues what was stopped. Variables are those of sweep.sh, with other defaults for
# METHODS, SHOTS and CONFIG_lora, and
#     RESULTS     folder of the runs and the report (results)
#     INCOMPLETE  1: go on where splits or numbers of images are not the published ones
# Arguments are passed on to main.py.
set -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
. scripts/environment.sh
[ -n "$PYTHON" ] || make_environment requirements.txt
export METHODS=${METHODS:-so lora} SHOTS=${SHOTS:-4}
export CONFIG_lora=${CONFIG_lora:-configs/clip_lora.yaml}
. scripts/sweep_common.sh
set -- --save_path "${RESULTS:=results}" "$@"

# Prints how to get dataset $1: torchvision's command, where there is one, and the source.
print_source() {
    local class=
    case $1 in
        sun397) class=SUN397 ;;
        fgvc) class=FGVCAircraft ;;
        eurosat) class=EuroSAT ;;
        food101) class=Food101 ;;
        oxford_pets) class=OxfordIIITPet ;;
        oxford_flowers) class=Flowers102 ;;
        caltech101) class=Caltech101 ;;
        dtd) class=DTD ;;
    esac
    [ -z "$class" ] ||
        echo "    $PYTHON -c 'from torchvision.datasets import *; $class(\"$DATA\", download=True)'"
    sed -n "s/^\`$1\`: //p" DATASETS.md | sed 's/.*Source: //; s/.*test images[.:] //; s/^/    /'
}

# Prints what is wrong with the datasets; fails if one is missing or, without INCOMPLETE, is not what
# the published figures were measured on.
check_datasets() {
    local table dataset problem status=0
    table=$("$PYTHON" -m datasets --root_path "$DATA")
    [ $? -le 1 ] || exit 2
    for dataset in $DATASETS; do
        if problem=$(grep "^\* $dataset: " <<<"$table"); then
            echo "$problem"
            [[ $problem == *"; move "* || $problem == *"; rename "* ]] || print_source "$dataset"
            [[ -n $INCOMPLETE && $problem == *"not the published numbers"* ]] || status=1
        elif grep -qE "^$dataset +[^ ]+ +made " <<<"$table"; then
            echo "* $dataset: the split was made here; get the published one from CoOp's page:"
            echo "    https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
            [ -n "$INCOMPLETE" ] || status=1
        fi
    done
    [ $status -eq 0 ] ||
        echo "$0: get these first (INCOMPLETE=1 goes on with other splits and numbers)" >&2
    return $status
}

runs=$(print_runs) || exit
check_datasets || exit 1
first=$(mktemp)
trap 'rm -f "$first"' EXIT
read -ra methods <<<"$METHODS"
tail -n ${#methods[@]} <<<"$runs" >"$first" # of UCF101, which is of middling size
echo "== First runs"
RUNS=$first bash scripts/sweep.sh "$@" || exit
echo "== All runs"
bash scripts/sweep.sh "$@"
status=$?
[ $status -le 1 ] || exit $status
echo "== Report"
"$PYTHON" scripts/report.py "$RESULTS" || status=$?
exit $status
