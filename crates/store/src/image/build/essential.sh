# Run as root when apt works in the new system "$1" and the kernel is not there yet: the initial RAM disk is
# made once, and holds what finds a virtio disk. gzip is in every Debian; the packing step unpacks it.
root=$1
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=gzip\nCOMPRESSLEVEL=1\n' >"$root/etc/initramfs-tools/conf.d/ospite"
printf '%s\n' virtio_pci virtio_blk crc32c_generic crc32c_intel ext4 \
    >"$root/usr/share/initramfs-tools/modules.d/ospite"
