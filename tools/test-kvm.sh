#!/usr/bin/env bash
# Tests the hardware engine on nested page tables, on a machine that needs none of its own: QEMU's
# translator emulates AMD-V, Debian's kernel has KVM on it, and in there ospite boots Debian's cloud
# kernel. tools/test-kvm-inside.sh says what is tested there. Takes half a minute once everything is built
# and fetched.
#
# Usage: tools/test-kvm.sh [COMMAND]     COMMAND for the inside's shell instead of the tests; what it
#                                        needs is in /kvm: ospite, tests/*, vmlinuz, busybox.cpio
# OSPITE_PATIENCE        how many times as long everything may take
# OSPITE_TEST_KVM_EXTRA  a folder that is put into the nested machine's / as it is
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin
cd "$tools/.."
command="export OSPITE_PATIENCE=${OSPITE_PATIENCE:-1}; ${1:-sh /kvm/inside.sh}"
limit=${OSPITE_TEST_KVM_LIMIT:-$((300 * ${OSPITE_PATIENCE:-1}))}

"$tools/install-qemu.sh"
"$tools/guest-kernels.sh"
need cpio cpio

# Nothing in the nested machine but these files: everything is linked statically. A target named
# explicitly keeps the flags away from build scripts and macros.
triple=x86_64-unknown-linux-gnu
static=(--locked --release --target "$triple" --config 'build.rustflags=["-Ctarget-feature=+crt-static"]')
say "Building ospite and the engine's tests, linked statically"
cargo build --quiet "${static[@]}" --package ospite
# The paths of the test programs, as cargo names them; what is wrong with them comes on standard error.
built=$(cargo test --quiet "${static[@]}" --package engine-kvm --package guest-tests \
    --test agree --test tiny --test moves --no-run --message-format=json-render-diagnostics)
mapfile -t tests < <(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' <<<"$built")
[ ${#tests[@]} -ge 3 ] || die "cargo does not say where the tests are"

begin
tree=$scratch/tree
mkdir -p "$tree/kvm/tests"
strip -o "$tree/kvm/ospite" "${CARGO_TARGET_DIR:-target}/$triple/release/ospite"
for test in "${tests[@]}"; do
    name=${test##*/}
    strip -o "$tree/kvm/tests/${name%-*}" "$test"
done
cp "$guests/cloud/vmlinuz" "$guests/busybox.cpio" "$tree/kvm/"
cp "$tools/test-kvm-inside.sh" "$tree/kvm/inside.sh"
[ -z "${OSPITE_TEST_KVM_EXTRA:-}" ] || cp -a "$OSPITE_TEST_KVM_EXTRA/." "$tree/"
"$tools/guest-initramfs.sh" "$scratch/kvm.cpio" "$guests/busybox" "$guests/generic/root" -- kvm-amd
(cd "$tree" && find . | cpio --quiet --create --format=newc --owner=0:0) >>"$scratch/kvm.cpio"

# One CPU: with two, QEMU 7.2's translator now and then keeps a breakpoint that the kernel has already
# taken out of its scheduler (KVM has it patched, each time a first VM comes and a last one goes), and one
# CPU then takes breakpoint after breakpoint, for ever. A kernel that locks up says why, and ends.
say "Starting the nested machine"
status=0
# shellcheck disable=SC2054 # commas belong to QEMU
qemu=(qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 1 -m 3072 -nodefaults -no-user-config
    -display none -serial stdio -no-reboot -kernel "$guests/generic/vmlinuz" -initrd "$scratch/kvm.cpio"
    -append "console=ttyS0 quiet panic=-1 softlockup_panic=1 ospite.modules=kvm-amd ospite.run=\"$command\"")
timeout "$limit" "${qemu[@]}" </dev/null 2>&1 | tee "$scratch/log" || status=$?
[ "$status" = 0 ] || die "the nested machine did not end by itself within $limit s (status $status)"
grep -q 'ospite-init: exit status 0' "$scratch/log" || die "tests failed in the nested machine"
