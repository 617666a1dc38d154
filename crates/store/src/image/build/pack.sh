# Puts the system in the folder "tree" on the disk "disk.raw" with the file system $1, of $2 bytes, takes out
# of it what is started: "vmlinuz", "initrd", their "release", and lists its "packages". Run as root.
uuid=$1 size=$2

# What each VM is to have of its own.
: >tree/etc/machine-id
rm -f tree/var/lib/dbus/machine-id tree/var/lib/systemd/random-seed tree/etc/ssh/ssh_host_*
if [ -d tree/etc/ssh ] && [ -e tree/usr/sbin/sshd ]; then
    cat >tree/etc/systemd/system/ospite-ssh-keys.service <<'UNIT'
[Unit]
Description=SSH host keys of this machine
Before=ssh.service
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
RequiredBy=ssh.service
UNIT
    mkdir -p tree/etc/systemd/system/ssh.service.requires
    ln -sf ../ospite-ssh-keys.service tree/etc/systemd/system/ssh.service.requires/
fi
ln -sf ../run/systemd/resolve/stub-resolv.conf tree/etc/resolv.conf
rm -rf tree/var/lib/apt/lists/* tree/var/cache/apt/*.bin tree/var/log/*.log tree/var/log/apt tree/tmp/*
# /usr is as these say, so nothing is rebuilt at boot (ConditionNeedsUpdate=).
touch tree/etc/.updated tree/var/.updated

echo 'step: taking out the kernel' >&2
kernel=$(ls tree/boot/vmlinuz-* | sort -V | tail -n 1)
release=${kernel#tree/boot/vmlinuz-}
echo "$release" >release
cp "$kernel" vmlinuz
# Unpacked here once, not by every guest's CPU at each of its starts.
if gzip -t "tree/boot/initrd.img-$release" 2>/dev/null; then
    gzip -dc "tree/boot/initrd.img-$release" >initrd
else
    cp "tree/boot/initrd.img-$release" initrd
fi
# shellcheck disable=SC2016 # dpkg's own variables
dpkg-query --admindir=tree/var/lib/dpkg --show --showformat='${binary:Package} ${Version}\n' >packages

echo 'step: making the file system' >&2
used=$(du -sk --apparent-size tree | cut -f1)
# Inodes, journal and room to start in.
needed=$((used + used / 10 + 131072))
if [ $((size / 1024)) -lt "$needed" ]; then
    echo "too-small: $needed" >&2
    exit 1
fi
rm -f disk.raw
truncate -s "$size" disk.raw
# What can be done now is not left to the guest: inode tables and journal are initialized.
mke2fs -q -F -t ext4 -L root -U "$uuid" -m 1 -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 \
    -d tree disk.raw
rm -rf --one-file-system tree
