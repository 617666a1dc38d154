#!/usr/bin/env bash
# Turns a bootstrapped Debian folder into the demo guest: who logs in, and nothing that a guest on a slow
# CPU would wait for in vain. Part of guest-debian.sh; runs as root.
#
# Usage: guest-debian-setup.sh SYSTEM KERNEL-ROOT
set -euo pipefail
system=$1 kernel=$2
units=$system/etc/systemd/system

# The kernel comes from outside; its modules must match. Its package would also bring initramfs-tools.
mkdir -p "$system/usr/lib/modules"
cp -a "$kernel"/lib/modules/* "$system/usr/lib/modules/"
cp "$kernel"/boot/vmlinuz-* "$kernel"/boot/config-* "$system/boot/"
chown -R 0:0 "$system/usr/lib/modules" "$system/boot"

echo ospite >"$system/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 ospite\n::1 localhost\n' >"$system/etc/hosts"
echo 'LABEL=debian12 / ext4 noatime,errors=remount-ro 0 1' >"$system/etc/fstab"
echo 'LANG=C.UTF-8' >"$system/etc/default/locale"
# Empty: each copy gets an id of its own, and without systemd's first-boot questions.
: >"$system/etc/machine-id"
rm -f "$system/var/lib/dbus/machine-id"

# A demo: root logs in without a password, where the host's user is the only one who can.
sed -i 's/^root:[^:]*:/root::/' "$system/etc/shadow"
mkdir -p "$units/getty.target.wants"
rm -f "$units/getty.target.wants/getty@tty1.service"
ln -sf /lib/systemd/system/serial-getty@.service "$units/getty.target.wants/serial-getty@ttyS0.service"
# On request, the demo leaves people at a shell instead of a login prompt: ospite.autologin on the kernel
# command line.
mkdir -p "$units/serial-getty@ttyS0.service.d"
cat >"$units/serial-getty@ttyS0.service.d/autologin.conf" <<'UNIT'
[Service]
ExecStart=
ExecStart=-/bin/sh -c 'grep -qw ospite.autologin /proc/cmdline && set -- --autologin root; \
    exec /sbin/agetty "$$@" -o "-p -- \\\\u" --keep-baud 115200,57600,38400,9600 %I "$$TERM"' agetty
UNIT
# hvc0 exists only in guests with a virtio console; a wanted unit would be waited for in the others.
cat >"$system/etc/udev/rules.d/90-ospite-console.rules" <<'RULE'
SUBSYSTEM=="tty", KERNEL=="hvc0", TAG+="systemd", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
RULE

mkdir -p "$system/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n' >"$system/etc/systemd/journald.conf.d/volatile.conf"
rm -rf "$system/var/log/journal"

rm -f "$system/etc/modules-load.d/modules.conf" # it names no module, but costs a process

# Maintenance of long-lived machines, and kernel file systems and modules that nothing here uses.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-pstore.service sys-fs-fuse-connections.mount \
    sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount \
    dev-mqueue.mount modprobe@dm_mod.service modprobe@drm.service modprobe@efi_pstore.service \
    modprobe@loop.service; do
    rm -f "$units"/*.wants/"$unit"
    ln -sf /dev/null "$units/$unit"
done

rm -rf "$system"/var/lib/apt/lists/* "$system"/var/cache/apt/* "$system"/var/log/*.log
# /usr is as these say, so nothing is rebuilt at boot (ConditionNeedsUpdate=).
touch "$system/etc/.updated" "$system/var/.updated"
