# Runs in the guest: connects a command's streams to ports of the virtio console device. Pipes are in
# between, for programs that open /dev/stdout again, which a port does not allow.
#
# Arguments: folder for the session, port of standard output, of standard error, of standard input or "-",
# user or "-", working directory or "-", number of variables, NAME=VALUE of each, the command with its
# arguments. The exit status is the command's; 125 says on which step the session failed before it.
d=$1 out=$2 err=$3 in=$4 user=$5 dir=$6 n=$7
shift 7
umask 077
export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"

mkdir "$d" && mkfifo "$d/out" "$d/err" "$d/in" || exit 125
# The driver announces a port a moment after the host has asked for it.
port() {
    tries=200
    while :; do
        for p in /dev/vport*p"$1"; do [ -c "$p" ] && return; done
        tries=$((tries - 1))
        [ "$tries" = 0 ] && rm -rf "$d" && exit 125
        sleep 0.05
    done
}
port "$out"
cat <"$d/out" >"$p" 2>/dev/null &
port "$err"
cat <"$d/err" >"$p" 2>/dev/null &
feed='' stdin=/dev/null
if [ "$in" != - ]; then
    port "$in"
    cat <"$p" >"$d/in" 2>/dev/null &
    feed=$! stdin=$d/in
fi

HOME=/root
if [ "$user" != - ]; then
    HOME=$(getent passwd "$user" | cut -d: -f6)
    USER=$user LOGNAME=$user
    export USER LOGNAME
fi
export HOME
while [ "$n" -gt 0 ]; do
    export "${1?}"
    shift
    n=$((n - 1))
done
if [ "$dir" = - ]; then
    dir=$HOME
    [ -d "$dir" ] || dir=/
fi

# In the foreground: what a shell starts in the background does not hear SIGINT. A session of its own, so
# that a signal reaches all of it.
umask 022
# shellcheck disable=SC2016 # the inner shell's variables
setsid sh -c '
    echo $$ >"$1/pid"
    cd "$2" || exit 125
    user=$3
    shift 3
    [ "$user" = - ] && exec "$@"
    exec runuser -u "$user" -- "$@"
' ospite-exec "$d" "$dir" "$user" "$@" <"$stdin" >"$d/out" 2>"$d/err"
status=$?
[ -n "$feed" ] && kill "$feed" 2>/dev/null
rm -rf "$d"
exit "$status"
