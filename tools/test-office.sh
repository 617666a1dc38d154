#!/usr/bin/env bash
# The office's proof: three services in three VMs, real clients, and in one VM after the other harm done: from
# inside as root, or to its process. The others may lose no request, and are timed with and without, in turns.
#
# Usage: tools/test-office.sh [HARM...]     panic, forkbomb, leak, fulldisk, scan, kill; all without a word
# OSPITE_OFFICE_WINDOW   seconds of each turn (12)
# OSPITE_OFFICE_TURNS    turns without and with each harm (2)
# OSPITE_OFFICE_LIMIT    how much slower the others may be (1.10)
# OSPITE_OFFICE_RECORD   a file for the record of each request (target/office.jsonl)
# The images are kept in .cache/office between runs; the VMs are made anew.
. "$(dirname "$0")/lib.sh"
cd "$tools/.."
need curl curl python3 python3 mmdebstrap mmdebstrap mke2fs e2fsprogs

[ -n "${OSPITE:-}" ] || { say "Building ospite"; cargo build --quiet --release --locked; }
ospite=${OSPITE:-$PWD/target/release/ospite}
export OSPITE_HOME=${OSPITE_HOME:-$PWD/.cache/office}
mkdir -p "$OSPITE_HOME" target
office=examples/office.toml
record=${OSPITE_OFFICE_RECORD:-$PWD/target/office.jsonl}
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

trap '"$ospite" down "$office" --remove >/dev/null 2>&1 || true; rm -rf "$scratch"' EXIT
head -c 100000 /dev/urandom >"$scratch/up"
"$ospite" down "$office" --remove >/dev/null
say "Bringing the office up"
"$ospite" up "$office" --timeout 300
for client in web ftp mail; do
    "$client" || die "$client does not do its work"
done
say "Files go by FTP, pages by HTTP, mails by SMTP and IMAP"

rm -f "$record"
say "Doing harm; each request is in $record"
python3 tools/office.py "$ospite" "$record" "$@" || die "something is wrong, see above; each request is in $record"
say "No request was lost, and nothing that was acknowledged"
