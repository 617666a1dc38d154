# shellcheck shell=dash
# The measurements that tools/bench-kvm.sh makes in its nested machine, with busybox's sh.

rounds=5

cd /tmp || exit 1
mkdir -p /mnt
mount -t debugfs debug /sys/kernel/debug
dd if=/dev/urandom of=disk.img bs=1M count=16 2>/dev/null
# The guest's first program says that it is there.
boot="console=ttyS0 quiet rdinit=/bench-init ospite.modules=virtio"

# ospite and QEMU: a guest of 128 MiB and one CPU that runs a shell command.
# ospite says in `messages` how long it took to build the machine.
ospite() {
    /kvm/ospite -vv run --engine kvm --network none -c 1 -m 128M --kernel /kvm/vmlinuz \
        --initrd /kvm/bench.cpio -d disk.img,format=raw --append "$boot ospite.run=\"$1\"" \
        </dev/null 2>messages
}
qemu_of() {
    /usr/bin/qemu-system-x86_64 -machine "pc,accel=kvm,kernel-irqchip=$1" -cpu host -smp 1 -m 128 -nodefaults \
        -no-user-config -display none -serial stdio -no-reboot -kernel /kvm/vmlinuz -initrd /kvm/bench.cpio \
        -drive file=disk.img,format=raw,if=virtio -device virtio-rng-pci \
        -append "$boot ospite.run=\"$2\"" </dev/null 2>messages
}
qemu() { qemu_of on "$1"; }
# Its PIC and IOAPIC in user space, as ospite's are.
qemu_split() { qemu_of split "$1"; }

now() { cut -d' ' -f1 /proc/uptime; }
exits() { cat /sys/kernel/debug/kvm/exits; }
minus() { echo "$1 $2" | awk '{ printf "%.2f", $1 - $2 }'; }

# result NAME PROGRAM VALUE: for the table of medians.
result() { echo "$@" >>results; }

# The memory that a VM gives back is what the next one gets. The translator is slow where code that it has
# translated is written over, byte by byte: 1 to 2 s of a start, for QEMU as for ospite, before or after the
# kernel is entered. So it is written over here, where no time is measured.
settle() {
    mount -t tmpfs settle /mnt && dd if=/dev/zero of=/mnt/settle bs=1M count=384 2>/dev/null && umount /mnt
}

# init PROGRAM: seconds and exits from the program's start to the guest's init, and to the end of what that
# does; and seconds of the latter by the guest's own clock.
init() {
    start=$(now) before=$(exits)
    "$1" true | while read -r line; do
        case $line in
        *bench-init*) seconds=$(minus "$(now)" "$start") count=$(($(exits) - before)) ;;
        *ospite-init:\ ready*)
            ready=$(minus "$(now)" "$start")
            result init_s "$1" "$seconds"
            result init_exits "$1" "$count"
            result ready_s "$1" "$ready"
            result guest_ready_s "$1" "${line##*uptime=}"
            echo "bench-kvm: $1 init_s $seconds init_exits $count ready_s $ready guest_s ${line##*uptime=}"
            ;;
        esac
    done
}

# load NAME PROGRAM COMMAND: exits and seconds for a guest's command of 2048 requests of 4 KiB, past all caches.
load() {
    "$2" "sleep 1; echo load starts; $3; echo load ends; sleep 1" | while read -r line; do
        case $line in
        *load\ starts*) start=$(now) before=$(exits) ;;
        *load\ ends*)
            count=$(($(exits) - before)) seconds=$(minus "$(now)" "$start")
            rate=$(echo "$count $seconds" | awk '{ printf "%.0f", $1 / $2 }')
            each=$(echo "$count" | awk '{ printf "%.2f", $1 / 2048 }')
            result "$1_exits_per_s" "$2" "$rate"
            result "$1_exits_per_request" "$2" "$each"
            echo "bench-kvm: $2 $1 exits $count s $seconds per_s $rate per_request $each"
            ;;
        esac
    done
}
copy="dd if=/dev/vda of=/dev/vda bs=4k seek=2048 iflag=direct oflag=direct 2>/dev/null"
# The same load for both: 128 requests each quarter of a second.
paced="for slot in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do usleep 250000 & $copy count=64; wait; done"
# As fast as each can.
fast="$copy count=1024"

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
    for program in ospite qemu qemu_split; do
        settle
        init $program
        sed -n 's/.*\(built in .*\)/bench-kvm:   \1/p' messages
    done
done
for _ in $(seq $(((rounds + 1) / 2))); do
    for program in ospite qemu; do
        load paced $program "$paced"
        load fast $program "$fast"
    done
done
beyond=$(overhead ospite /kvm/ospite)
result overhead_kib ospite "$beyond"
result overhead_kib qemu "$(overhead qemu /usr/bin/qemu)"

# Medians; the last column is ospite's in QEMU's.
sort -k1,1 -k2,2 -k3,3n results | awk '
    function median() { return count % 2 ? all[(count + 1) / 2] : (all[count / 2] + all[count / 2 + 1]) / 2 }
    function flush() { if (count) of[name, program] = median(); count = 0 }
    $1 != name || $2 != program { flush(); name = $1; program = $2; if (!($1 in known)) { known[$1]; order[++names] = $1 } }
    { all[++count] = $3 }
    END {
        flush()
        printf "bench-kvm: %-24s %10s %10s %10s %8s\n", "median of", "ospite", "qemu", "qemu_split", "ratio"
        for (i = 1; i <= names; i++) {
            name = order[i]; a = of[name, "ospite"]; b = of[name, "qemu"]
            printf "bench-kvm: %-24s %10s %10s %10s %8.2f\n", name, a, b, of[name, "qemu_split"], b ? a / b : 0
        }
    }'
echo "bench-kvm: init_s, init_exits: from the program's start to the guest's init; goal for the seconds: 0.50 of QEMU's"
echo "bench-kvm: guest_ready_s: what the guest's own clock says a bit later; nearly all of it is the guest's own work"
echo "bench-kvm: paced: both at 128 disk requests each quarter of a second; goal for exits a second: 1.00 of QEMU's"
echo "bench-kvm: fast: each as fast as it can; where the disk is faster, more requests a second are more exits a second"
echo "bench-kvm: overhead_kib: resident beyond the guest's memory; goal 5120 for ospite, it has $beyond"
[ "$beyond" -le 5120 ]
