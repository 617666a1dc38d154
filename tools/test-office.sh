#!/usr/bin/env bash
# The office's proof: three services in three VMs, real clients, and one VM after the other harm done to
# from inside: what the others answer is compared with and without the harm, in turns.
#
# Usage: tools/test-office.sh [HARM...]     all harms without a word; see below for their names
# The images are kept in .cache/office between runs; the VMs are made anew.
. "$(dirname "$0")/lib.sh"
cd "$tools/.."
need curl curl

[ -n "${OSPITE:-}" ] || { say "Building ospite"; cargo build --quiet --release --locked; }
ospite=${OSPITE:-$PWD/target/release/ospite}
export OSPITE_HOME=${OSPITE_HOME:-$PWD/.cache/office}
mkdir -p "$OSPITE_HOME"
office=examples/office.toml
begin

# Clients. Each fails where its server does not do what it is for.
web() { curl -sS --fail --max-time "${1:-20}" http://127.0.0.1:8080/ | grep -q 'office is open'; }
ftp() {
    curl -sS --max-time "${1:-30}" --user ada:office --upload-file "$scratch/up" ftp://127.0.0.1:2121/ &&
        curl -sS --max-time "${1:-30}" --user ada:office ftp://127.0.0.1:2121/up | cmp -s - "$scratch/up"
}
mail() {
    local word=mail-$RANDOM$RANDOM try
    printf 'From: me@example.org\r\nTo: ada@office.example\r\nSubject: %s\r\n\r\nHello.\r\n' "$word" >"$scratch/mail"
    curl -sS --max-time "${1:-30}" smtp://127.0.0.1:2525 --mail-from me@example.org \
        --mail-rcpt ada@office.example --upload-file "$scratch/mail" || return
    for try in $(seq 40); do
        curl -sS --max-time 20 --user ada:office "imap://127.0.0.1:1143/INBOX?SUBJECT%20$word" |
            grep -q 'SEARCH [0-9]' && return
        sleep 0.5
    done
    echo "the mail $word has not arrived after $try tries"
    return 1
}

# median COUNT CLIENT...: milliseconds of the median of so many requests to each; a lost one is told.
median() {
    local count=$1 n client start
    shift
    for n in $(seq "$count"); do
        for client in "$@"; do
            start=$(date +%s%N)
            "$client" 20 || echo "$client, request $n" >>"$scratch/lost"
            echo $((($(date +%s%N) - start) / 1000))
        done
    done | sort -n | awk '{ v[NR] = $1 } END { printf "%.1f", v[int((NR + 1) / 2)] / 1000 }'
}

# What is done to a VM, from inside as root, or to its process.
harm() {
    local vm=$1 what=$2
    inside() { timeout 60 "$ospite" exec -n "$vm" -- sh -c "$1" || true; }
    # shellcheck disable=SC2016 # the guest's variables
    case $what in
    panic) inside 'echo 1 >/proc/sys/kernel/sysrq; (sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &' ;;
    forkbomb) inside 'systemd-run --quiet -p TasksMax=infinity sh -c "f() { f | f & }; f; sleep 30"' ;;
    leak) inside 'systemd-run --quiet sh -c "exec tail -c 2G /dev/zero"' ;;
    fulldisk) inside 'dd if=/dev/zero of=/var/tmp/full bs=1M 2>/dev/null; sync' ;;
    scan) inside 'systemd-run --quiet bash -c "for i in \$(seq 200); do for a in 10.200.0.{1..9} 127.0.0.1; do (: </dev/tcp/\$a/\$((RANDOM % 1000 + 1))) 2>/dev/null & done; wait; done"' ;;
    kill) kill -9 "$("$ospite" info --json "$vm" | sed -n 's/^  "pid": \([0-9]*\),/\1/p')" ;;
    esac
}

# heal VM WHAT: what brings it back, where the restart policy does not.
heal() {
    case $2 in
    fulldisk) timeout 60 "$ospite" exec -n "$1" -- rm -f /var/tmp/full ;;
    forkbomb | scan | leak) "$ospite" restart "$1" --timeout 20 >/dev/null ;;
    esac
}

trap '"$ospite" down "$office" --remove >/dev/null 2>&1 || true; rm -rf "$scratch"' EXIT
head -c 100000 /dev/urandom >"$scratch/up"
"$ospite" down "$office" --remove >/dev/null
say "Bringing the office up"
"$ospite" up "$office" --timeout 300
for client in web ftp mail; do
    "$client" || die "$client does not do its work"
done
say "Files go by FTP, pages by HTTP, mails by SMTP and IMAP"

declare -A others=([web]='ftp mail' [ftp]='web mail' [mail]='web ftp')
victims=(web mail ftp)
turn=0
harms=("$@")
[ ${#harms[@]} -gt 0 ] || harms=(panic forkbomb leak fulldisk scan kill)
for what in "${harms[@]}"; do
    vm=${victims[turn++ % 3]}
    # shellcheck disable=SC2086 # two words
    before=$(median 7 ${others[$vm]})
    harm "$vm" "$what"
    # shellcheck disable=SC2086
    during=$(median 7 ${others[$vm]})
    heal "$vm" "$what"
    if "$ospite" up "$office" --timeout 300 >/dev/null && "$vm" 60; then back='is back'; else
        back='is NOT back'
        echo "$vm, after $what" >>"$scratch/lost"
    fi
    echo "office: $what in $vm: the others' median $before ms before, $during ms during; $vm $back"
done
[ ! -e "$scratch/lost" ] || die "lost: $(cat "$scratch/lost")"
say "No request was lost"
