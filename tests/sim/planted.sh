#!/usr/bin/env bash
# Plants one bug at a time into a copy of the source and runs the simulator:
# planted.sh [RUNS]. Fails if a bug is not found within RUNS (1000).
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:-1000}
root=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
export CARGO_TARGET_DIR=$root/target/planted
# A full build takes minutes; the next ones change little.
export CARGO_INCREMENTAL=1
cd "$copy"
missed=0
for bug in tests/sim/planted/*.patch; do
    name=$(basename "$bug" .patch)
    patch --quiet -p1 <"$bug"
    cargo build --quiet --locked -p gradestore-sim
    if found=$("$CARGO_TARGET_DIR/debug/gradestore-sim" --seeds "$runs" --failures 1 2>&1); then
        echo "$name: MISSED in $runs runs"
        missed=1
    else
        echo "$name: found in run $(grep -oE '^[0-9]+ runs' <<<"$found" | cut -d' ' -f1): $(tail -1 <<<"$found")"
    fi
    patch --quiet -p1 --reverse <"$bug"
done
exit $missed
