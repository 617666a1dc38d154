# shellcheck shell=dash
# The measurements that tools/bench-kvm.sh makes in its nested machine, with busybox's sh.

rounds=3

cd /tmp || exit 1
mount -t debugfs debug /sys/kernel/debug
dd if=/dev/urandom of=disk.img bs=1M count=16 2>/dev/null
boot="console=ttyS0 quiet ospite.modules=virtio"

# ospite and QEMU: a guest of 128 MiB and one CPU that runs a shell command.
# ospite says in `messages` how long it took to build the machine.
ospite() {
    /kvm/ospite -vv run --engine kvm --network none -c 1 -m 128M --kernel /kvm/vmlinuz \
        --initrd /kvm/busybox.cpio -d disk.img,format=raw --append "$boot ospite.run=\"$1\"" \
        </dev/null 2>messages
}
qemu() {
    /usr/bin/qemu-system-x86_64 -accel kvm -cpu host -smp 1 -m 128 -nodefaults -no-user-config -display none \
        -serial stdio -no-reboot -kernel /kvm/vmlinuz -initrd /kvm/busybox.cpio \
        -drive file=disk.img,format=raw,if=virtio -device virtio-rng-pci \
        -append "$boot ospite.run=\"$1\"" </dev/null 2>messages
}

now() { cut -d' ' -f1 /proc/uptime; }
exits() { cat /sys/kernel/debug/kvm/exits; }
minus() { echo "$1 $2" | awk '{ printf "%.2f", $1 - $2 }'; }

# init PROGRAM: seconds from the program's start to the guest's init, those of them by the guest's own clock,
# and exits.
init() {
    start=$(now) before=$(exits)
    "$1" true | while read -r line; do
        case $line in
        *ospite-init:\ ready*) echo "$(minus "$(now)" "$start") ${line##*uptime=} $(($(exits) - before))" ;;
        esac
    done
}

# load PROGRAM: exits and seconds for 4 MiB read and written in pieces of 4 KiB, past all caches.
load() {
    "$1" "sleep 1; echo load starts; dd if=/dev/vda of=/dev/vda bs=4k count=1024 seek=2048 iflag=direct oflag=direct; \
echo load ends; sleep 1" | while read -r line; do
        case $line in
        *load\ starts*) start=$(now) before=$(exits) ;;
        *load\ ends*) echo "$(($(exits) - before)) $(minus "$(now)" "$start")" ;;
        esac
    done
}

# overhead PROGRAM PATH: KiB of resident memory beyond the guest's 128 MiB, once the guest idles.
overhead() {
    "$1" "echo idle; sleep 5" | while read -r line; do
        case $line in
        *idle*)
            # shellcheck disable=SC2009 # this busybox has no pgrep
            pid=$(ps -o pid,args | grep "^ *[0-9]* $2" | awk '{ print $1; exit }')
            awk '/^Size:/ { size = $2 }
                 /^Rss:/ { beyond = $2; if (size >= 131072) beyond -= 131072; if (beyond > 0) sum += beyond }
                 END { print sum }' "/proc/$pid/smaps"
            ;;
        esac
    done
}

for _ in $(seq "$rounds"); do
    for program in ospite qemu; do
        echo "bench-kvm: $program init_s_guest_s_exits $(init $program)"
        sed -n 's/.*\(built in .*\)/bench-kvm:   \1/p' messages
    done
done
for _ in $(seq "$rounds"); do
    for program in ospite qemu; do
        echo "bench-kvm: $program load_exits_and_s $(load $program)"
    done
done
beyond=$(overhead ospite /kvm/ospite)
echo "bench-kvm: ospite overhead_kib $beyond (at most 5120)"
echo "bench-kvm: qemu overhead_kib $(overhead qemu /usr/bin/qemu)"
[ "$beyond" -le 5120 ]
