#!/usr/bin/env bash
# Packs an initramfs: a static busybox, guest-init.sh as /init, and modules of any number of kernels.
#
# Usage: tools/guest-initramfs.sh OUT.cpio BUSYBOX MODULES-ROOT... -- MODULE...
# MODULES-ROOT is a folder with lib/modules/VERSION and its modules.dep. MODULEs that a kernel has
# built in are left out.
. "$(dirname "$0")/lib.sh"

out=$1 busybox=$2
shift 2
roots=()
while [ "$1" != -- ]; do
    roots+=("$1")
    shift
done
shift

tree=$out.tree
mkdir -p "$tree"/{bin,sbin,dev,proc,sys,root,tmp,etc}
ln -s bin "$tree/usr"
cp "$busybox" "$tree/bin/busybox"
for applet in modprobe insmod; do ln -s /bin/busybox "$tree/sbin/$applet"; done
ln -s busybox "$tree/bin/sh"
install -m 755 "$tools/guest-init.sh" "$tree/init"

for root in "${roots[@]}"; do
    for dir in "$root"/lib/modules/*; do
        version=${dir##*/}
        to=$tree/lib/modules/$version
        mkdir -p "$to"
        for module in "$@"; do
            # Lists the module after everything that it needs, as "insmod PATH".
            modprobe --ignore-install --dirname "$root" --set-version "$version" --show-depends "$module" |
                sed -n 's/^insmod \([^ ]*\).*/\1/p'
        done | sort -u | while read -r file; do
            install -D -m 644 "$file" "$to/${file#"$dir"/}"
        done
        cp "$dir"/modules.{order,builtin} "$to/" 2>/dev/null || true
        depmod -b "$tree" "$version"
        # busybox reads these two; the rest is for kmod.
        find "$to" -maxdepth 1 -type f ! -name modules.dep ! -name modules.builtin -delete
    done
done
(cd "$tree" && find . -print0 | sort -z | cpio --quiet --null --create --format=newc --owner=0:0 --reproducible) >"$out"
rm -rf "$tree"
