#!/usr/bin/env bash
# Fetches Debian's stock kernels and makes an initramfs to try them with. Results, in
# ${OSPITE_CACHE:-.cache}/guests:
#
#   cloud/vmlinuz     linux-image-cloud-amd64 (virtio only, boots fast)
#   generic/vmlinuz   linux-image-amd64
#   {cloud,generic}/root   what is in the package, with modules.dep
#   busybox           a static busybox
#   busybox-i386      the same of 32-bit code
#   busybox.cpio.gz   initramfs with the virtio modules of both kernels; tools/guest-init.sh says what
#                     the command line can ask of it
#   busybox.cpio      the same unpacked: quicker to boot where the guest's CPU is slow
#
# What is there is not fetched again; remove the folder to get newer ones.
# Usage: tools/guest-kernels.sh
. "$(dirname "$0")/lib.sh"

virtio=(virtio_pci virtio_blk virtio_console virtio-rng virtio_net crc32c_generic crc32c-intel ext4)

# download PACKAGE FOLDER: unpacks the package, as newest in the host's apt, into FOLDER.
download() {
    mkdir -p "$2.deb"
    (cd "$2.deb" && apt-get -o APT::Sandbox::User=root download "$1") || return
    dpkg-deb -x "$2.deb"/*.deb "$2" || return
    rm -rf "$2.deb"
}

# The package that a kernel metapackage stands for.
real_package() {
    apt-cache show --no-all-versions "$1" | sed -n 's/^Depends: *\(linux-image-[^ ,]*\).*/\1/p' | head -n 1
}

kernel() {
    local name=$1 meta=$2 package dir=$scratch/$1
    [ -d "$guests/$name" ] && return
    apt_lists "$meta"
    package=$(real_package "$meta")
    [ -n "$package" ] || die "apt does not say which kernel $meta is; run 'apt-get update', then try again"
    mkdir "$dir"
    step "Fetching $package" download "$package" "$dir/root"
    cp "$dir"/root/boot/vmlinuz-* "$dir/vmlinuz"
    step "Indexing its modules" depmod -b "$dir/root" "$(ls "$dir/root/lib/modules")"
    mv -T "$dir" "$guests/$name"
}

busybox() {
    [ -f "$guests/busybox" ] && return
    apt_lists busybox-static
    step "Fetching busybox-static" download busybox-static "$scratch/busybox"
    mv "$scratch/busybox/bin/busybox" "$guests/busybox"
}

# Debian's packages for i386 have lists of their own, which the host's apt does not know of. Those of the
# release itself have it; mirrors may be late with the other suites of an architecture that few use.
busybox_i386() {
    [ -f "$guests/busybox-i386" ] && return
    local apt=$scratch/apt
    mkdir -p "$apt/lists/partial" "$scratch/busybox-i386.deb"
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 'Origin: Debian' \
        'Component: main' | sed -nE 's|^([^ ]+) ([a-z]+)$|deb [arch=i386] \1 \2 main|p' | sort -u >"$apt/sources.list"
    local options=(-o APT::Architecture=i386 -o APT::Architectures=i386 -o APT::Sandbox::User=root
        -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o Dir::State::status=/dev/null -o "Dir::Cache=$apt")
    step "Listing Debian's packages for i386" apt-get "${options[@]}" update
    (cd "$scratch/busybox-i386.deb" && step "Fetching busybox-static for i386" apt-get "${options[@]}" \
        download busybox-static)
    dpkg-deb -x "$scratch"/busybox-i386.deb/*.deb "$scratch/busybox-i386"
    mv "$scratch/busybox-i386/bin/busybox" "$guests/busybox-i386"
}

initramfs() {
    local out=$guests/busybox.cpio
    # Remade when its recipe has changed.
    [ "$out.gz" -nt "$tools/guest-init.sh" ] && [ "$out" -nt "$tools/guest-init.sh" ] && return
    step "Packing busybox.cpio.gz" "$tools/guest-initramfs.sh" "$scratch/busybox.cpio" "$guests/busybox" \
        "$guests/cloud/root" "$guests/generic/root" -- "${virtio[@]}"
    gzip -9 -n -k "$scratch/busybox.cpio"
    mv "$scratch/busybox.cpio" "$out"
    mv "$scratch/busybox.cpio.gz" "$out.gz"
}

need depmod kmod cpio cpio gzip gzip
begin
kernel cloud linux-image-cloud-amd64
kernel generic linux-image-amd64
busybox
busybox_i386
initramfs
say "Kernels and initramfs are in $guests"
