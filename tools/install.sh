#!/usr/bin/env bash
# Installs the program, its man pages and shell completions. Run make build first.
#
# PREFIX    where (/usr/local)
# DESTDIR   put in front of it, for packages
# Usage: tools/install.sh
. "$(dirname "$0")/lib.sh"
cd "$tools/.."

program=target/release/ospite
[ -x "$program" ] || die "there is no $program; type: make build"
to=${DESTDIR:-}${PREFIX:-/usr/local}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$program" man "$scratch"
"$program" completions bash >"$scratch/ospite.bash"
"$program" completions zsh >"$scratch/_ospite"
"$program" completions fish >"$scratch/ospite.fish"

put() {
    if [ -w "$to" ] || [ -n "${DESTDIR:-}" ]; then install -D "$@"; else as_root install -D "$@"; fi
}
put -m 755 "$program" "$to/bin/ospite"
for page in "$scratch"/*.1; do put -m 644 "$page" "$to/share/man/man1/${page##*/}"; done
put -m 644 "$scratch/ospite.bash" "$to/share/bash-completion/completions/ospite"
put -m 644 "$scratch/_ospite" "$to/share/zsh/site-functions/_ospite"
put -m 644 "$scratch/ospite.fish" "$to/share/fish/vendor_completions.d/ospite.fish"
say "Installed: $to/bin/ospite"
