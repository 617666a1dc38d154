#!/usr/bin/env bash
# How fast guests' networks are: iperf3 out of a guest and in through a published port, with 1 and 8
# connections, and short HTTP requests, many at a time; in ospite, and beside it in QEMU's translator with its
# own user-mode network (slirp) and, where it is installed, with passt. The same kernel and the same initramfs,
# in turns, in one run. The guests' CPUs differ in speed, and so what is compared is also the CPU time of the
# network alone, per byte: ospite's network process, passt, and QEMU's main thread, in which slirp runs.
#
# Then, as root, the networks alone: a network namespace is the guest, as fast as the host is (ospite, pasta).
#
# A table and, as the last line, the same as JSON.
# OSPITE_BENCH_SECONDS   how long each iperf3 runs (5)
# OSPITE_BENCH_ROUNDS    how often each program has its turn (1)
# Usage: tools/bench-net.sh [ospite|slirp|passt|native]...     all of them
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin
cd "$tools/.."

seconds=${OSPITE_BENCH_SECONDS:-5} rounds=${OSPITE_BENCH_ROUNDS:-1} requests=${OSPITE_BENCH_REQUESTS:-1000}
"$tools/install-qemu.sh"
"$tools/guest-kernels.sh"
need iperf3 iperf3 ab apache2-utils cpio cpio ip iproute2 passt passt curl curl
[ -n "${OSPITE:-}" ] || { say "Building ospite"; cargo build --quiet --release --locked; }
ospite=${OSPITE:-$PWD/target/release/ospite}

work=$(mktemp -d "${TMPDIR:-/tmp}/ospite-bench-net.XXXXXX")
pids=()
finish() {
    local pid
    # A guest is the child of a shell of ours.
    for pid in "${pids[@]}"; do
        pkill -TERM -P "$pid" 2>/dev/null || true
        kill "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    [ -z "${space:-}" ] || ip netns del "$space" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
export OSPITE_HOME=$work/home

# The guest: what is in guest-kernels.sh's initramfs, and the host's own iperf3 and ab with their libraries.
cat >"$work/net.sh" <<'GUEST'
ip link set lo up; ip link set eth0 up
cat >/leased <<'LEASED'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"; ip route add default via "$router"; echo "$router" >/router
LEASED
chmod +x /leased
udhcpc -i eth0 -q -n -s /leased >/dev/null 2>&1
gw=${GATEWAY:-$(cat /router)}
mkdir -p /www; echo hello >/www/index.html; httpd -p 80 -h /www
iperf3 -s -D >/dev/null 2>&1
sleep 1
speed() { sed -n 's/.* \([0-9.]*\) Mbits\/sec.*receiver.*/\1/p' | tail -n 1; }
requests() { awk '/^Failed/ { f = $3 } /^Requests per/ { print $4, f }'; }
for n in 1 8; do
    echo "BEGIN out-$n"
    echo "END out-$n $(iperf3 -c "$gw" -p "$OUT" -t "$SECONDS_EACH" -P $n -f m 2>&1 | speed)"
done
echo "BEGIN http-out"
echo "END http-out $(ab -q -r -s 120 -n "$REQUESTS" -c 20 "http://$gw:$HTTP/" 2>&1 | requests)"
echo SERVING
sleep 1000
GUEST
with_libraries() {
    local program file
    for program in iperf3 ab; do
        install -D "$(command -v $program)" "$work/tree/bin/$program"
        ldd "$(command -v $program)" | grep -o '/[^ ]*' | while read -r file; do
            install -D "$file" "$work/tree$file"
        done
    done
}
with_libraries
out=$((RANDOM % 10000 + 20000)) http=$((RANDOM % 10000 + 30000)) in=$((RANDOM % 10000 + 40000)) web=$((RANDOM % 9000 + 50000))
pack() { # the gateway's address, where it is not the router's
    { echo "GATEWAY=$1 OUT=$out HTTP=$http SECONDS_EACH=$seconds REQUESTS=$requests"; cat "$work/net.sh"; } >"$work/tree/net.sh"
    (cd "$work/tree" && find . -mindepth 1 ! -path ./bin | cpio --quiet -o -H newc) >"$work/more.cpio"
    cat "$guests/busybox.cpio" "$work/more.cpio" >"$work/net.cpio"
}
pack ''

iperf3 -s -p "$out" >/dev/null & pids+=($!)
mkdir "$work/www"; echo hello >"$work/www/index.html"
"$guests/busybox" httpd -f -p "127.0.0.1:$http" -h "$work/www" & pids+=($!)

# ticks TASK: CPU time so far, in hundredths of a second.
ticks() { cut -d' ' -f14,15 "/proc/$1/stat" 2>/dev/null | tr ' ' + | { read -r sum; echo $((sum)); }; }

speed() { sed -n 's/.* \([0-9.]*\) Mbits\/sec.*receiver.*/\1/p' | tail -n 1; }
requests() { awk '/^Failed/ { f = $3 } /^Requests per/ { print $4, f }'; }

rows=()
# row WHO WHAT VALUE TICKS [FAILED]: megabits or requests a second, what the network took for them, and how many
# requests got no answer.
row() {
    local unit=Mbit/s each lost=${5:-0}
    case $2 in
    http-*) unit=requests/s each=$(awk -v t="$4" -v n="$requests" 'BEGIN { printf "%.2f", t * 10 / n }') ;;
    *) each=$(awk -v t="$4" -v v="$3" -v s="$seconds" 'BEGIN { printf "%.2f", v ? t / 100 / (v * s / 8000) : 0 }') ;;
    esac
    local cpu="s/GB"; [ "$unit" = Mbit/s ] || cpu=ms/request
    printf '%-8s %-10s %10s %-11s %8s %s' "$1" "$2" "${3:-failed}" "$unit" "$each" "$cpu"
    [ "$lost" = 0 ] || printf ', %s of %s failed' "$lost" "$requests"
    echo
    rows+=("{\"network\":\"$1\",\"what\":\"$2\",\"value\":${3:-null},\"unit\":\"$unit\",\"cpu\":$each,\"cpu_unit\":\"$cpu\",\"failed\":$lost}")
}

kernel_line="console=ttyS0 quiet ospite.modules=virtio ospite.run=\"sh /net.sh\""

# guest WHO TASK-OF-NETWORK: follows a guest through its part, then does the host's.
guest() {
    local who=$1 task=$2 line before=0 what value lost
    while read -r -t 300 line; do
        # shellcheck disable=SC2086 # words
        set -- $line
        case ${1:-} in
        BEGIN) before=$(ticks "$task") ;;
        END)
            value=${3%$'\r'} lost=${4:-}
            row "$who" "$2" "$value" $(($(ticks "$task") - before)) "${lost%$'\r'}"
            ;;
        SERVING*) break ;;
        esac
    done <&7
    for what in in-1 in-8; do
        before=$(ticks "$task")
        value=$(timeout 120 iperf3 -c 127.0.0.1 -p "$in" -t "$seconds" -P "${what#in-}" -f m 2>&1 | speed) || true
        row "$who" "$what" "$value" $(($(ticks "$task") - before))
    done
    before=$(ticks "$task")
    read -r value lost < <(timeout 200 ab -q -r -s 120 -n "$requests" -c 20 "http://127.0.0.1:$web/" 2>&1 | requests) || true
    row "$who" http-in "$value" $(($(ticks "$task") - before)) "$lost"
}

child_of() { # PID NAME: waits for a child of it
    local try
    for try in $(seq 100); do
        pgrep -P "$1" -f "$2" && return
        sleep 0.1
    done
    die "no $2 after $try tries"
}

# A pipe that takes what a guest says before somebody reads it.
pipe() {
    rm -f "$work/$1"
    mkfifo "$work/$1"
    exec 7<>"$work/$1"
}

run_ospite() {
    pipe ospite
    "$ospite" run -m 512M --engine soft --kernel "$guests/cloud/vmlinuz" --initrd "$work/net.cpio" --append "$kernel_line" \
        --net-allow 127.0.0.1 -p "127.0.0.1:$in:5201" -p "127.0.0.1:$web:80" <"$work/held" >"$work/ospite" 2>"$work/log" &
    local vm=$!
    pids+=("$vm")
    guest ospite "$(child_of "$vm" network-process)" || cat "$work/log" >&2
    end "$vm"
}
qemu() {
    qemu-system-x86_64 -accel tcg -cpu max -m 512 -nodefaults -no-user-config -display none -serial stdio -no-reboot \
        -kernel "$guests/cloud/vmlinuz" -initrd "$work/net.cpio" -append "$kernel_line" -device virtio-net-pci,netdev=n "$@"
}
run_slirp() {
    pipe slirp
    qemu -netdev "user,id=n,hostfwd=tcp:127.0.0.1:$in-:5201,hostfwd=tcp:127.0.0.1:$web-:80" <"$work/held" >"$work/slirp" 2>"$work/log" &
    local vm=$! machine
    pids+=("$vm")
    machine=$(child_of "$vm" qemu-system)
    guest slirp "$machine/task/$machine"
    end "$vm"
}
run_passt() {
    pipe passt
    passt --foreground --quiet --socket "$work/passt.sock" --runas 0 -t "127.0.0.1/$in:5201,$web:80" 2>"$work/log" &
    local network=$! vm
    pids+=("$network")
    for _ in $(seq 50); do [ -S "$work/passt.sock" ] && break; sleep 0.1; done
    qemu -netdev "stream,id=n,server=off,addr.type=unix,addr.path=$work/passt.sock" <"$work/held" >"$work/passt" 2>>"$work/log" &
    vm=$!
    pids+=("$vm")
    guest passt "$network"
    end "$vm"
    kill "$network" 2>/dev/null || true
}
end() {
    pkill -TERM -P "$1" 2>/dev/null || true
    kill -TERM "$1" 2>/dev/null || true
    sleep 0.5
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

# native WHO TASK COMMAND...: iperf3 as COMMAND runs it, to the host.
native() {
    local who=$1 task=$2 gateway=$3 n way before value reverse
    shift 3
    for n in 1 8; do
        for way in out in; do
            reverse=()
            [ $way = out ] || reverse=(-R)
            before=$(ticks "$task")
            value=$("$@" iperf3 -c "$gateway" -p "$out" -t "$seconds" -P $n -f m "${reverse[@]}" 2>&1 | speed) || true
            row "$who" "$way-$n" "$value" $(($(ticks "$task") - before))
        done
    done
}
run_native() {
    [ "$(id -u)" = 0 ] || { say "The networks alone are measured as root only"; return; }
    cargo build --quiet --release --locked --package net --example cable
    space=ospite-bench-$$
    ip netns add "$space"
    target/release/examples/cable "ob$$" "$ospite" <"$work/held" >"$work/cable" & pids+=($!)
    until [ -s "$work/cable" ] && ip link show "ob$$" >/dev/null 2>&1; do sleep 0.1; done
    ip link set "ob$$" netns "$space"
    ip -n "$space" link set lo up
    ip -n "$space" link set "ob$$" address 52:54:00:00:00:07 up
    ip -n "$space" address add 10.200.0.2/16 dev "ob$$"
    ip -n "$space" route add default via 10.200.0.1
    native ospite-n "$(cat "$work/cable")" 10.200.0.1 ip netns exec "$space"
    command -v pasta >/dev/null || return 0
    local router
    router=$(ip route show default | awk '{ print $3; exit }')
    [ -n "$router" ] || { say "pasta needs a default route"; return; }
    ip netns add "$space-p"
    pasta --quiet --foreground --config-net --netns "/run/netns/$space-p" --runas 0 2>"$work/log" & local network=$!
    pids+=("$network")
    sleep 1
    native pasta-n "$network" "$router" ip netns exec "$space-p"
    kill "$network" 2>/dev/null || true
    ip netns del "$space-p"
}

# Standard input that never ends.
mkfifo "$work/held"
sleep 100000 >"$work/held" & pids+=($!)

turns=("$@")
[ ${#turns[@]} -gt 0 ] || turns=(ospite slirp passt native)
printf '%-8s %-10s %10s %-11s %8s\n' network what speed '' 'CPU of the network'
for _ in $(seq "$rounds"); do
    for turn in "${turns[@]}"; do
        pack ''
        if [ "$turn" = passt ]; then
            command -v passt >/dev/null || continue
        fi
        "run_$turn"
    done
done
(IFS=,; echo "[${rows[*]}]")
