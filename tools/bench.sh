#!/usr/bin/env bash
# How fast guests are: boots, a whole Debian's too, work and a second vCPU in ospite, beside the metal and
# beside QEMU's translator, in turns in one run. Machines differ and drift: quote the ratios.
#
# OSPITE_BENCH_ROUNDS   how often each runs (3)
# OSPITE_BENCH_DIVIDE   do one part in so many of the work (1)
# Usage: tools/bench.sh [--quick] [OSPITE-BENCH-OPTIONS...]     some 8 minutes; with --quick, 2
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin
cd "$tools/.."

"$tools/install-qemu.sh"
"$tools/guest-debian.sh"
cargo build --release --locked --package ospite --package ospite-bench

say "The engine alone, in millions of guest instructions a second:"
{ cargo test --release --locked --quiet --package engine-soft speed -- --ignored --nocapture --test-threads=1 || true; } |
    sed -n "s/^\.*\(.*\): \([0-9]*\) million instructions.*/  \2\t\1/p"

say "Whole guests, the interpreter alone (the reference, one round of little work):"
target/release/ospite-bench --ospite-args='--engine soft,tier=interpreter' --cache "$guests" --rounds 1 --divide 64 \
    --items-only "$@"

say "Whole guests, as they are run:"
target/release/ospite-bench --cache "$guests" --rounds "${OSPITE_BENCH_ROUNDS:-3}" \
    --divide "${OSPITE_BENCH_DIVIDE:-1}" "$@"

say "The same by a busybox of 32-bit code (i386 programs on a 64-bit kernel), one round:"
target/release/ospite-bench --cache "$guests" --rounds 1 --divide "${OSPITE_BENCH_DIVIDE:-1}" \
    --items-only --busybox busybox-i386 "$@"
