# shellcheck shell=dash
# The tests that tools/test-kvm.sh runs in its nested machine, with busybox's sh.

cd /tmp || exit 1
failed=''

# pass NAME COMMAND...: runs a test and remembers if it fails.
pass() {
    local name=$1 start end
    shift
    start=$(cut -d' ' -f1 /proc/uptime)
    if "$@"; then verdict=ok; else verdict=FAILED failed="$failed $name"; fi
    end=$(cut -d' ' -f1 /proc/uptime)
    echo "test-kvm: $name: $verdict, $(echo "$start $end" | awk '{ print $2 - $1 }') s"
}

doctor() {
    /kvm/ospite doctor | tee findings
    grep -q 'yes *kvm .*(what --engine auto takes)' findings
}

# boot CPUS COMMAND [MODEL]: a guest with a disk; its shell runs COMMAND. What it prints is in `console`.
boot() {
    /kvm/ospite run --engine auto -c "$1" -m 256M --kernel /kvm/vmlinuz --initrd /kvm/busybox.cpio \
        --cpu "${3:-host}" -d disk.img,format=raw --append "console=ttyS0 quiet ospite.modules=virtio ospite.run=\"$2\"" \
        </dev/null >console 2>errors
    status=$?
    cat errors console
    [ $status = 0 ] || echo "test-kvm: exit code $status, not 0"
    return $status
}

# The first time the guest marks its disk and reboots, the second time it finds the mark and powers off.
reboots() {
    dd if=/dev/zero of=disk.img bs=1M count=16 2>/dev/null
    boot 1 "if dd if=/dev/vda count=1 2>/dev/null | grep -q ospite-was-here; then echo second life; else \
echo first life, nproc=\$(nproc); echo ospite-was-here >/dev/vda; sync; reboot -f; fi" || return
    grep -q 'ready nproc=1 ' console && grep -q 'first life' console && grep -q 'second life' console &&
        grep -q ospite-was-here disk.img
}

# Two CPUs, a disk that is written and read back past the cache, entropy, timers, console input.
works() {
    dd if=/dev/urandom of=disk.img bs=1M count=16 2>/dev/null
    boot 2 "dd if=/dev/vda of=/dev/vda bs=1M count=4 seek=8 oflag=direct iflag=direct; sync; \
echo sum \$(dd if=/dev/vda bs=1M count=4 skip=8 iflag=direct | md5sum | cut -c 1-32); \
echo rng \$(dd if=/dev/hwrng bs=16 count=1 | md5sum); \
echo clock \$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource); \
sleep 1; grep -E virtio /proc/interrupts; echo slept" || return
    sum=$(dd if=disk.img bs=1M count=4 2>/dev/null | md5sum | cut -c 1-32)
    there=$(dd if=disk.img bs=1M count=4 skip=8 2>/dev/null | md5sum | cut -c 1-32)
    grep -q 'ready nproc=2 ' console && grep -q slept console && grep -q 'clock kvm-clock' console &&
        grep -q "^sum $sum" console && [ "$sum" = "$there" ] && grep -q '^rng [0-9a-f]' console
}

# A CPU model is what a guest sees of its CPU.
is_a_model() {
    dd if=/dev/zero of=disk.img bs=1M count=1 2>/dev/null
    boot 1 "grep -E '^(model name|flags)' /proc/cpuinfo" x86-64-v2 || return
    grep -q 'x86-64-v2 virtual CPU' console && grep -q '^flags.* popcnt' console && ! grep -q '^flags.* avx' console
}

pass doctor doctor
for test in agree tiny; do
    pass $test /kvm/tests/$test --test-threads=1
done
# The other one boots in software, which takes too long in here.
pass 'a Linux that moves between engines' env OSPITE_TEST_GUESTS=/kvm /kvm/tests/moves --ignored hardware --nocapture
pass 'one vCPU, disk, reboot, power-off' reboots
pass 'a CPU model' is_a_model
pass 'two vCPUs, disk, entropy, clock' works

[ -z "$failed" ] || { echo "test-kvm: failed:$failed"; exit 1; }
