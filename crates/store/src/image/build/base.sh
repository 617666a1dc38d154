# Makes the system in $root a guest. Run as root when all packages are installed, before the recipe's part.
# Wants $root, $uuid, $hostname, $autologin.
etc=$root/etc
units=$etc/systemd/system

if [ -n "$hostname" ]; then echo "$hostname" >"$etc/hostname"; else rm -f "$etc/hostname"; fi
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$etc/hosts"
[ -z "$hostname" ] || printf '127.0.1.1 %s\n' "$hostname" >>"$etc/hosts"
echo 'LANG=C.UTF-8' >"$etc/default/locale"
# The disk of a VM may be larger than the image's: the file system grows to it.
echo "UUID=$uuid / ext4 noatime,errors=remount-ro,x-systemd.growfs 0 1" >"$etc/fstab"

# Any virtio network card, by DHCP and router advertisements. Names of the same network are names without
# a dot: they are asked for, too.
mkdir -p "$etc/systemd/network" "$etc/systemd/resolved.conf.d" "$etc/systemd/journald.conf.d"
cat >"$etc/systemd/network/80-virtio.network" <<'UNIT'
[Match]
Type=ether
Driver=virtio_net

[Network]
DHCP=yes
IPv6AcceptRA=yes
LLMNR=no
MulticastDNS=no

[DHCPv4]
ClientIdentifier=mac
UseDomains=yes

[IPv6AcceptRA]
UseDomains=yes
UNIT
printf '[Resolve]\nResolveUnicastSingleLabel=yes\nLLMNR=no\nMulticastDNS=no\n' \
    >"$etc/systemd/resolved.conf.d/ospite.conf"
chroot "$root" systemctl --quiet enable systemd-networkd.service systemd-resolved.service
# A guest without a network must not wait for one.
mkdir -p "$units/systemd-networkd-wait-online.service.d"
printf '[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=30\n' \
    >"$units/systemd-networkd-wait-online.service.d/ospite.conf"

mkdir -p "$root/var/log/journal"
printf '[Journal]\nStorage=persistent\nSystemMaxUse=64M\n' >"$etc/systemd/journald.conf.d/ospite.conf"

# hvc0 exists only in guests with a virtio console; a wanted unit would be waited for in the others.
cat >"$etc/udev/rules.d/90-ospite-console.rules" <<'RULE'
SUBSYSTEM=="tty", KERNEL=="hvc0", TAG+="systemd", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
RULE
rm -f "$units/getty.target.wants/getty@tty1.service"
# A console's node is the kernel's, and there from the start. Whoever waits for udev to say so waits as long as
# udev does on a busy host, and gives up after 90 s.
sed -e '/^BindsTo=dev-%i.device$/d' -e '/^After=/s/dev-%i.device//' \
    "$root/lib/systemd/system/serial-getty@.service" >"$units/serial-getty@.service"
if [ "$autologin" = yes ]; then
    for console in ttyS0 hvc0; do
        mkdir -p "$units/serial-getty@$console.service.d"
        printf '[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM\n' \
            >"$units/serial-getty@$console.service.d/autologin.conf"
    done
fi

# An image is mended by building it anew. Upgrades behind the back of a service cost it its latency.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service systemd-pstore.service; do
    rm -f "$units"/*.wants/"$unit"
    ln -sf /dev/null "$units/$unit"
done
rm -f "$etc/modules-load.d/modules.conf" # it names no module, but costs a process
