#!/usr/bin/env bash
# run.sh SECONDS LEVEL...: every target in build/fuzz at every level that this machine has, a quarter of SECONDS each,
# from tests/fuzz/corpus and what earlier runs added in build/fuzz/corpus. Ends at the first finding; its input and its
# log stay in build/fuzz.
set -euo pipefail
cd "$(dirname "$0")/../../build/fuzz"
each=$((($1 + 3) / 4)) # 0 would mean for ever
for level in "${@:2}"; do
  in_use=$(LEPTON_MAX_ISA=$level ../../.venv/bin/python -c "from lepton_kernels._runtime import C; print(C.isa())")
  if [ "$in_use" != "$level" ]; then
    echo "$level: not on this machine"
    continue
  fi
  for target in huffman lzw round_trip; do
    run=$target-$level
    mkdir -p "corpus/$target"
    LEPTON_MAX_ISA=$level "./fuzz_$target" -max_total_time="$each" -max_len=20000 -timeout=20 -print_final_stats=1 \
      -artifact_prefix="$run-" "corpus/$target" "../../tests/fuzz/corpus/$target" > "$run.log" 2>&1 || {
      code=$?
      tail -n 50 "$run.log" >&2
      echo "Found at $level, see build/fuzz/$run.log. Again: LEPTON_MAX_ISA=$level build/fuzz/fuzz_$target build/fuzz/$run-*" >&2
      exit "$code"
    }
    echo "$target $level: $(sed -n 's/^stat::number_of_executed_units: *//p' "$run.log") executions"
  done
done
