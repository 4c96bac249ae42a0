#!/usr/bin/env bash
# Tables of one NVIDIA GPU, in eight minutes at most: BERT-base and ModernBERT-base in bfloat16, 64
# full rows of 512 tokens, and LoRA on 32 rows of 128, each beside transformers or peft.
#
#   pip install -e ".[cuda,kernels,bench]" && scripts/benchmark_gpu.sh FOLDER
#
# A table that does not come in time leaves what it has said, and the next one begins.
set -uo pipefail

[ $# = 1 ] || { sed -n '2,/^set/{/^# /s/^# //p}' "$0"; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")" || exit
failed=0

table() { # NAME, its seconds, and what benchmark.py is told
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" python benchmark.py "$@" --rounds 3 --output "$out/$name.json" \
    >"$out/$name.md" 2>"$out/$name.log"
  local code=$?
  cat "$out/$name.md"
  [ $code = 0 ] && return
  failed=1
  [ $code = 124 ] && echo "$name: not done in $seconds s; $out/$name.log" && return
  echo "$name: ended with $code; $out/$name.log"
  tail -n 3 "$out/$name.log"
}

rows=(--sizes base --row-length 512 --batch-size.base 64)
table bert 170 mlm "${rows[@]}"
table modernbert 180 modern "${rows[@]}"
table lora 130 finetune --sizes base --tunings lora --batch-size.base 32
exit $failed
