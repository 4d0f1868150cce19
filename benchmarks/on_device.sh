#!/usr/bin/env bash
# What to run first on a machine with a GPU or a TPU, in this order, each part within its minutes:
# tests on the device, benchmarks, then CIFAR-10 by the paper's protocol (VGG-19, 160 epochs).
#
#     benchmarks/on_device.sh OUT DATA_DIR [MINUTES]
#
# OUT gets a log of each part, records (OUT/results) and checkpoints: started again, it goes on
# with the training that was cut off, and leaves out what is recorded. DATA_DIR holds cifar10 in
# array_record form. MINUTES are for the training in all, 240 without; tests and benchmarks take
# at most 45. Needs pip install -e '.[test]' and jax for the device; nothing of it has been tried
# on a device yet.
set -uo pipefail
out=${1:?usage: benchmarks/on_device.sh OUT DATA_DIR [MINUTES]}
data=${2:?usage: benchmarks/on_device.sh OUT DATA_DIR [MINUTES]}
end=$((SECONDS + 60 * (${3:-240} + 45)))
mkdir -p "$out/results"
out=$(realpath "$out")
data=$(realpath "$data")
cd "$(dirname "$0")/.."

part() { # NAME MINUTES COMMAND...: its output goes to a log, its failure stops nothing
    local name=$1 minutes=$2
    shift 2
    echo "$name: $*"
    timeout "${minutes}m" "$@" >"$out/$name.log" 2>&1 && return
    echo "$name: exit status $?, see $out/$name.log"
    return 1
}

# JAX_PLATFORMS= : on the device, where the tests otherwise take the CPU. These need one device.
JAX_PLATFORMS='' part tests 20 python -m pytest tests/test_selection.py tests/test_transform.py \
    tests/test_methods.py tests/test_optimizers.py tests/test_tiles.py tests/test_structures.py
for benchmark in step_overhead mask_update packed_step tiles; do
    part "$benchmark" 6 python -m "benchmarks.$benchmark"
done

train() { # METHOD SPARSITY SEED
    local name=$1_$2_$3 left=$(((end - SECONDS) / 60))
    [ -e "$out/$name.done" ] && return
    [ "$left" -gt 0 ] || return
    part "$name" "$left" python -m experiments.cifar --model vgg19 --method "$1" --sparsity "$2" \
        --seed "$3" --data_dir "$data" --work_dir "$out/$name" --resume \
        --results "$out/results/cifar.jsonl" && touch "$out/$name.done"
}

for seed in 0 1 2; do
    train dense 0 "$seed"
    for sparsity in 0.95 0.98; do
        for method in dst_ee rigl set static; do
            train "$method" "$sparsity" "$seed"
        done
    done
done
