# What the scripts in this folder share. Source it: . "$(dirname "$0")/lib.sh"
# shellcheck shell=bash

set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
PATH=$PATH:/usr/sbin:/sbin

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${OSPITE_CACHE:-$(dirname "$tools")/.cache}
guests=$cache/guests

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }
trap stop_step EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Runs a command as root: directly, or through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "'$1' needs root: run this as root, or install sudo"
    fi
}

# Asks for sudo's password now: a step runs in the background, where it could not.
root_ready() {
    if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null; then sudo -v; fi
}

# The process group of the step that runs now, and its output.
running=''
log=''
stop_step() {
    [ -z "$running" ] && return
    kill -TERM -- "-$running" 2>/dev/null || true
    # What sudo started is root's to end.
    [ "$(id -u)" = 0 ] || sudo -n kill -TERM -- "-$running" 2>/dev/null || true
    wait "$running" 2>/dev/null || true
    rm -f "$log"
    running=''
}

# step TEXT COMMAND...: runs a command quietly; its output is shown if it fails. On a terminal a
# counter shows that it is alive.
step() {
    local text=$1 pid start=$SECONDS status=0
    shift
    log=$(mktemp "${TMPDIR:-/tmp}/ospite-step.XXXXXX")
    set -m # a process group of its own, so that an interrupt can end all of it
    "$@" >"$log" 2>&1 </dev/null 9>&- &
    set +m
    pid=$!
    running=$pid
    if [ -t 2 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r%s ... %d s' "$text" $((SECONDS - start)) >&2
            sleep 0.5
        done
        printf '\r\033[K' >&2
    else
        say "$text ..."
    fi
    wait "$pid" || status=$?
    running=''
    if [ "$status" != 0 ]; then
        say "$text: failed"
        sed 's/^/    /' "$log" >&2
        rm -f "$log"
        exit 1
    fi
    rm -f "$log"
    say "$text: done ($((SECONDS - start)) s)"
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 "$@"; }

apt_ready() {
    command -v apt-get >/dev/null || die "this needs a Debian host: there is no apt-get here"
}

# Package lists may be absent, as in a fresh container image.
apt_lists() {
    apt_ready
    apt-cache show --no-all-versions "$1" >/dev/null 2>&1 || {
        root_ready
        step "Updating apt's package lists" apt_get update
    }
    apt-cache show --no-all-versions "$1" >/dev/null 2>&1 ||
        die "apt knows no package '$1'; add Debian bookworm main to its sources, then try again"
}

# need COMMAND PACKAGE [COMMAND PACKAGE]...: installs the packages of missing commands, and says so.
need() {
    local packages=()
    while [ $# -gt 0 ]; do
        command -v "$1" >/dev/null || packages+=("$2")
        shift 2
    done
    [ ${#packages[@]} = 0 ] && return
    root_ready
    apt_lists "${packages[0]}"
    step "Installing ${packages[*]}" apt_get install -y --no-install-recommends "${packages[@]}"
}

# One run at a time per cache, and a scratch folder in it that is gone afterwards, however the run
# ends. What is finished leaves the folder by rename, so nothing half done is ever in its place.
begin() {
    mkdir -p "$guests"
    exec 9>"$cache/lock"
    flock -n 9 || { say "Waiting for another run to end"; flock 9; }
    # Scratch folders of runs that were killed.
    find "$cache" -maxdepth 1 -name 'tmp.*' -exec "$tools/rm-tree.sh" {} +
    scratch=$(mktemp -d "$cache/tmp.XXXXXX")
    trap 'stop_step; "$tools/rm-tree.sh" "$scratch"' EXIT
}
