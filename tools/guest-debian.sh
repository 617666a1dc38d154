#!/usr/bin/env bash
# Makes a small Debian 12 on a disk, from the packages of the mirror that the host's apt uses.
# Results, in ${OSPITE_CACHE:-.cache}/guests:
#
#   debian12.raw      ext4 without partitions; root has no password and logs in on ttyS0 and hvc0
#   debian12.qcow2    the same, where qemu-img is installed
#   debian12.cpio     initramfs that loads the disk's modules and starts the system on it
#   cloud/vmlinuz     the kernel to start it with (made by guest-kernels.sh)
#
# With "programs", debian12-programs.raw instead of the first two: the same with what the tests of real
# programs run (debuggers, JITs, stress-ng, a 32-bit busybox).
#
# Boot it with the command line "console=ttyS0 root=/dev/vda quiet". The images are masters: boot copies
# (cp --reflink=auto --sparse=always), or what one guest writes is in the next one's system.
#
# What is there is not made again, unless its list of packages has changed; remove the file to get a newer
# one.
# OSPITE_DISK_SIZE   size of the disk (1G, with programs 2G; it is sparse, some 300 MiB are used)
# OSPITE_SOURCES     an apt sources file to use instead of the host's
# Usage: tools/guest-debian.sh [programs]
. "$(dirname "$0")/lib.sh"

suite=bookworm
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
include=systemd,systemd-sysv,udev,kmod,dbus,iproute2,login,procps,pciutils,util-linux,qemu-guest-agent
disk_modules=(virtio_pci virtio_blk crc32c-intel ext4)
disk=debian12
architectures=amd64
size=1G
if [ "${1:-}" = programs ]; then
    disk=debian12-programs
    architectures=amd64,i386
    size=2G
    include+=,bc,bzip2,busybox-static:i386,gdb,luajit,nodejs,openssl,strace,stress-ng,xz-utils
fi

# Prints the Debian 12 sources of the host's apt, whatever files and formats they are in. A host with
# another Debian lends its mirrors.
sources() {
    local known
    # shellcheck disable=SC2016 # apt's own variables
    known=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' \
        'Created-By: Packages' 'Origin: Debian' 'Component: main' | sort -u)
    if ! grep -q " $suite" <<<"$known"; then
        known=$(sed -nE "s/ [^- ]+(-updates|-security)?\$/ $suite\1/p" <<<"$known" | sort -u)
    fi
    sed -nE "s|^([^ ]+) ($suite(-updates\|-security)?)\$|deb [arch=amd64 signed-by=$keyring] \1 \2 main|p" \
        <<<"$known"
    [ "$architectures" = amd64 ] ||
        sed -nE "s|^([^ ]+) $suite\$|deb [arch=i386 signed-by=$keyring] \1 $suite main|p" <<<"$known"
}

# What apt needs to be told to reach its mirror from here.
network_options() {
    apt-config dump | grep -E '^Acquire::(https?::Proxy|Check-Valid-Until)' || true
}

bootstrap() {
    as_root mmdebstrap --variant=minbase --architectures="$architectures" --format=directory \
        --include="$include" --aptopt="$scratch/apt.conf" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        "$suite" "$scratch/system" "$scratch/sources.list"
    as_root "$tools/guest-debian-setup.sh" "$scratch/system" "$guests/cloud/root"
}

# Everything that can be done now is not left to the guest's first boot: inode tables and journal are
# initialized.
file_system() {
    truncate -s "${OSPITE_DISK_SIZE:-$size}" "$scratch/$disk.raw"
    as_root mke2fs -q -F -t ext4 -L debian12 -m 1 -E lazy_itable_init=0,lazy_journal_init=0 \
        -d "$scratch/system" "$scratch/$disk.raw"
    e2fsck -fn "$scratch/$disk.raw"
}

raw() {
    [ -f "$guests/$disk.raw" ] && [ "$include" = "$(cat "$guests/$disk.packages" 2>/dev/null)" ] && return
    root_ready
    if [ -n "${OSPITE_SOURCES:-}" ]; then
        cp "$OSPITE_SOURCES" "$scratch/sources.list"
    else
        apt_lists systemd
        sources >"$scratch/sources.list"
    fi
    [ -s "$scratch/sources.list" ] ||
        die "the host's apt has no Debian sources; name a file with Debian 12's in OSPITE_SOURCES"
    network_options >"$scratch/apt.conf"
    step "Installing Debian 12 into a folder (about a minute)" bootstrap
    step "Putting it on a disk" file_system
    mv "$scratch/$disk.raw" "$guests/$disk.raw"
    echo "$include" >"$guests/$disk.packages"
}

qcow2() {
    command -v qemu-img >/dev/null || return 0
    [ "$guests/debian12.qcow2" -nt "$guests/$disk.raw" ] && return
    step "Converting it to qcow2" qemu-img convert -O qcow2 "$guests/debian12.raw" "$scratch/debian12.qcow2"
    mv "$scratch/debian12.qcow2" "$guests/debian12.qcow2"
}

# Not compressed: the guest's CPU unpacks it, and that may be a slow one.
initramfs() {
    [ "$guests/debian12.cpio" -nt "$tools/guest-init.sh" ] && return
    step "Packing its initramfs" "$tools/guest-initramfs.sh" "$scratch/debian12.cpio" "$guests/busybox" \
        "$guests/cloud/root" -- "${disk_modules[@]}"
    mv "$scratch/debian12.cpio" "$guests/debian12.cpio"
}

"$tools/guest-kernels.sh"
need mmdebstrap mmdebstrap mke2fs e2fsprogs depmod kmod
[ -f "$keyring" ] || need no-such-command debian-archive-keyring
begin
raw
[ "$disk" = debian12 ] && qcow2
initramfs
say "Debian 12 is in $guests"
