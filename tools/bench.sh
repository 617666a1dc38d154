#!/usr/bin/env bash
# How fast guests are: boot time and instructions per second in ospite, beside the metal and beside
# QEMU's translator, in turns in one run. Machines differ and drift: quote the ratios.
#
# OSPITE_BENCH_ROUNDS   how often each runs (3)
# OSPITE_BENCH_DIVIDE   do one part in so many of the work (4)
# Usage: tools/bench.sh [OSPITE-BENCH-OPTIONS...]
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin
cd "$tools/.."

"$tools/install-qemu.sh"
"$tools/guest-kernels.sh"
cargo build --release --locked --package ospite --package ospite-bench

say "The engine alone, in millions of guest instructions a second:"
{ cargo test --release --locked --quiet --package engine-soft speed -- --ignored --nocapture --test-threads=1 || true; } |
    sed -n "s/^\.*\(.*\): \([0-9]*\) million instructions.*/  \2\t\1/p"

say "Whole guests, the interpreter alone (the reference, one round of little work):"
target/release/ospite-bench --ospite-args='--engine soft,tier=interpreter' --cache "$guests" --rounds 1 --divide 64 "$@"

say "Whole guests, as they are run:"
target/release/ospite-bench --cache "$guests" --rounds "${OSPITE_BENCH_ROUNDS:-3}" \
    --divide "${OSPITE_BENCH_DIVIDE:-4}" "$@"

say "The same by a busybox of 32-bit code (i386 programs on a 64-bit kernel), one round:"
target/release/ospite-bench --cache "$guests" --rounds 1 --divide "${OSPITE_BENCH_DIVIDE:-4}" \
    --busybox busybox-i386 "$@"
