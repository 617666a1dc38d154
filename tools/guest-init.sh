#!/bin/busybox sh
# shellcheck shell=dash
# /init of the guests' initramfs. What it does is said on the kernel command line:
#
#   ospite.modules=A,B,C   load these modules, in this order, with what they depend on ("virtio" means
#                          all of virtio's and ext4)
#   ospite.run="COMMAND"   run COMMAND with sh, then power off
#   ospite.shell           a shell on ttyS0, then power off
#   root=DEVICE            load what is needed for a virtio disk, mount DEVICE and start its init
#                          (init=PATH names another one, ro mounts it read-only)

export PATH=/bin:/sbin HOME=/root TERM=linux
/bin/busybox mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys

cmdline=$(/bin/busybox cat /proc/cmdline)
modules='' shell='' root='' mode=rw init=/sbin/init

# The command may hold blanks, so it is cut out before the rest is split at them.
run=$(echo "$cmdline" | /bin/busybox sed -n 's/.*ospite\.run="\([^"]*\)".*/\1/p;t;s/.*ospite\.run=\([^ ]*\).*/\1/p')
set -f
for word in $(echo "$cmdline" | /bin/busybox sed 's/ospite\.run="[^"]*"//'); do
    case $word in
    ospite.modules=*) modules=${word#*=} ;;
    ospite.shell) shell=1 ;;
    root=*) root=${word#root=} ;;
    init=*) init=${word#init=} ;;
    ro) mode=ro ;;
    rw) mode=rw ;;
    esac
done
set +f

# A disk's modules are few; crc32c-intel is not for CPUs without SSE4.2, where it fails to load.
disk="virtio_pci virtio_blk crc32c_generic crc32c-intel ext4"
load() {
    for module in $(echo "$1" | /bin/busybox tr ',' ' '); do
        /bin/busybox modprobe -q "$module" || case $module in
        crc32c*) ;; # ext4 needs one of the two
        *) echo "ospite-init: module $module does not load" ;;
        esac
    done
}

if [ -n "$root" ]; then
    load "$disk"
    tries=100
    until device=$(/bin/busybox findfs "$root" 2>/dev/null || echo "$root") && [ -b "$device" ]; do
        tries=$((tries - 1))
        if [ $tries = 0 ]; then
            echo "ospite-init: there is no disk $root; is it passed with --disk?"
            /bin/busybox poweroff -f
        fi
        /bin/busybox usleep 50000
    done
    if ! /bin/busybox mount -t ext4 -o "$mode" "$device" /root; then
        echo "ospite-init: cannot mount $device"
        /bin/busybox poweroff -f
    fi
    for dir in dev proc sys; do
        /bin/busybox mount -o move /$dir /root/$dir
    done
    exec /bin/busybox switch_root /root "$init"
fi

/bin/busybox --install -s /bin
[ "$modules" = virtio ] && modules="$disk virtio_console virtio_rng virtio_net"
load "$modules"

memory=$(awk '/^MemTotal:/ { print $2 $3 }' /proc/meminfo)
echo "ospite-init: ready nproc=$(nproc) MemTotal=$memory release=$(uname -r) uptime=$(cut -d' ' -f1 /proc/uptime)"
if [ -n "$run" ]; then
    sh -c "$run"
    echo "ospite-init: exit status $?"
fi
if [ -n "$shell" ]; then
    setsid -c sh -c 'exec sh -l </dev/ttyS0 >/dev/ttyS0 2>&1'
fi
poweroff -f
