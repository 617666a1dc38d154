#!/usr/bin/env bash
# What the hardware engine costs, beside QEMU with KVM, in turns in the same nested machine
# (tools/test-kvm.sh): time from the program's start to the guest's init, exits under disk load, and
# memory beyond the guest's. Everything there is emulated: quote the ratios.
#
# OSPITE_BENCH_ROUNDS   how often each runs (3)
# Usage: tools/bench-kvm.sh
. "$(dirname "$0")/lib.sh"

"$tools/install-qemu.sh"
extra=$(mktemp -d "${TMPDIR:-/tmp}/ospite-bench.XXXXXX")
trap 'stop_step; rm -rf "$extra"' EXIT
mkdir -p "$extra/kvm"
sed "s/^rounds=.*/rounds=${OSPITE_BENCH_ROUNDS:-3}/" "$tools/bench-kvm-inside.sh" >"$extra/kvm/bench.sh"
# QEMU with everything that it loads.
qemu=$(command -v qemu-system-x86_64)
cp --parents -L "$qemu" "$extra"
ldd "$qemu" | grep -o '/[^ ]*' | while read -r file; do cp --parents -L "$file" "$extra"; done
for rom in seabios/bios-256k.bin qemu/linuxboot.bin qemu/linuxboot_dma.bin qemu/kvmvapic.bin; do
    cp --parents -L "/usr/share/$rom" "$extra"
done
OSPITE_TEST_KVM_EXTRA=$extra OSPITE_TEST_KVM_LIMIT=${OSPITE_TEST_KVM_LIMIT:-$((900 * ${OSPITE_PATIENCE:-1}))} \
    "$tools/test-kvm.sh" 'sh /kvm/bench.sh'
