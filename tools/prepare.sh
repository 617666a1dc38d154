#!/usr/bin/env bash
# Makes sure that the program can be built: a Rust toolchain must be there, a linker is installed. With
# guest-tests also what the guest tests look at disk images with.
#
# Usage: tools/prepare.sh [guest-tests]
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin

rust=1.90
command -v cargo >/dev/null ||
    die "there is no Rust here. Install it, then try again:
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . ~/.cargo/env"
have=$(rustc --version | cut -d' ' -f2)
[ "$(printf '%s\n' "$rust" "$have" | sort -V | head -n 1)" = "$rust" ] ||
    die "Rust $have is too old, $rust is needed; type: rustup update stable"
need cc gcc ld binutils
# crt1.o and the rest of what a linker needs of the C library.
[ -e "$(cc -print-file-name=crt1.o)" ] || need no-such-command libc6-dev

if [ "${1:-}" = guest-tests ]; then
    need qemu-img qemu-utils e2fsck e2fsprogs setsid util-linux strace strace
fi
