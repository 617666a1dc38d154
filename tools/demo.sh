#!/usr/bin/env bash
# A Debian 12 in a VM: builds ospite, makes the guest's disk, boots it. On a terminal it leaves you at
# the guest's shell; without one it looks around in the guest, prints what it sees and powers off.
#
# The disk is a copy of yours: what you do in it stays, until you remove .cache/demo.raw.
# OSPITE_DEMO_CPUS, OSPITE_DEMO_MEMORY   size of the guest (2, 1G)
# Usage: tools/demo.sh
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin
cd "$tools/.."

say "Building ospite ..."
cargo build --release --locked
"$tools/guest-debian.sh"

disk=$cache/demo.raw
[ -t 0 ] && [ -t 1 ] || disk=$cache/demo-look.raw
if [ ! -f "$disk" ] || [ "$disk" = "$cache/demo-look.raw" ]; then
    step "Copying the disk" cp --reflink=auto --sparse=always "$guests/debian12.raw" "$disk.new"
    mv "$disk.new" "$disk"
fi
options=(--name demo --cpus "${OSPITE_DEMO_CPUS:-2}" --memory "${OSPITE_DEMO_MEMORY:-1G}"
    --disk "$disk,format=raw" --kernel "$guests/cloud/vmlinuz" --initrd "$guests/debian12.cpio")

if [ -t 0 ] && [ -t 1 ]; then
    say ""
    say "  target/release/ospite run ${options[*]@Q}"
    say ""
    say "You will be root in the guest. 'poweroff' there ends it, Ctrl-] opens ospite's menu."
    exec target/release/ospite run "${options[@]}" \
        --append "console=ttyS0 root=/dev/vda ospite.autologin"
fi
cargo xtask look "${options[@]}" --append "console=ttyS0 root=/dev/vda" -- 'uname -a' 'systemd-analyze'
rm -f "$disk"
