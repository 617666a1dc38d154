#!/usr/bin/env bash
# Installs QEMU's x86-64 system emulator, which the benchmarks run beside ospite.
#
# apt takes no newer qemu-utils for an older qemu-system-x86, as is the case where qemu-utils came
# from backports: both are set to the one version that apt offers for the emulator.
#
# Usage: tools/install-qemu.sh [MORE-PACKAGES...]     e.g. qemu-system-arm
. "$(dirname "$0")/lib.sh"

if [ $# = 0 ] && command -v qemu-system-x86_64 >/dev/null; then
    say "Already there: $(qemu-system-x86_64 --version | head -n 1)"
    exit
fi
root_ready
apt_lists qemu-system-x86
version=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: //p')
packages=("qemu-system-x86=$version" "qemu-utils=$version" seabios "$@")
step "Installing QEMU $version" \
    apt_get install -y --no-install-recommends --allow-downgrades "${packages[@]}"
say "Installed: $(qemu-system-x86_64 --version | head -n 1)"
