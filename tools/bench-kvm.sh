#!/usr/bin/env bash
# What the hardware engine costs, beside QEMU with KVM, in turns in the same nested machine
# (tools/test-kvm.sh): time and exits from the program's start to the guest's init, exits under disk load (at
# the same rate for both, and as fast as each can), and memory beyond the guest's. Everything there is
# emulated: quote the ratios.
#
# OSPITE_BENCH_ROUNDS   how often each runs (5)
# Usage: tools/bench-kvm.sh
. "$(dirname "$0")/lib.sh"

"$tools/install-qemu.sh"
"$tools/guest-kernels.sh"
need cpio cpio
extra=$(mktemp -d "${TMPDIR:-/tmp}/ospite-bench.XXXXXX")
trap 'stop_step; rm -rf "$extra"' EXIT
mkdir -p "$extra/kvm"
sed "s/^rounds=.*/rounds=${OSPITE_BENCH_ROUNDS:-5}/" "$tools/bench-kvm-inside.sh" >"$extra/kvm/bench.sh"
# The guest's initramfs, and behind it a first program that says so.
printf '#!/bin/busybox sh\necho bench-init\nexec /init\n' >"$extra/bench-init"
chmod +x "$extra/bench-init"
cp "$guests/busybox.cpio" "$extra/kvm/bench.cpio"
(cd "$extra" && echo bench-init | cpio --quiet --create --format=newc --owner=0:0) >>"$extra/kvm/bench.cpio"
# QEMU with everything that it loads.
qemu=$(command -v qemu-system-x86_64)
cp --parents -L "$qemu" "$extra"
ldd "$qemu" | grep -o '/[^ ]*' | while read -r file; do cp --parents -L "$file" "$extra"; done
for rom in seabios/bios-256k.bin qemu/linuxboot.bin qemu/linuxboot_dma.bin qemu/kvmvapic.bin; do
    cp --parents -L "/usr/share/$rom" "$extra"
done
OSPITE_TEST_KVM_EXTRA=$extra OSPITE_TEST_KVM_LIMIT=${OSPITE_TEST_KVM_LIMIT:-$((900 * ${OSPITE_PATIENCE:-1}))} \
    "$tools/test-kvm.sh" 'sh /kvm/bench.sh'
