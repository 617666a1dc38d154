#!/usr/bin/env bash
# All that can be said about the code without running it.
#
# Usage: tools/lint.sh
. "$(dirname "$0")/lib.sh"
PATH=$PATH:$HOME/.cargo/bin
cd "$tools/.."

# Rustup's minimal profile comes without them.
component() {
    cargo "$1" --version >/dev/null 2>&1 || step "Installing $2" rustup component add "$2"
}

# Not a dependency of ours: built once from its own lock file, some two minutes.
cargo_deny() {
    command -v cargo-deny >/dev/null || step "Installing cargo-deny" cargo install --locked cargo-deny
}

component fmt rustfmt
component clippy clippy
cargo_deny
need shellcheck shellcheck

cargo fmt --all --check
cargo clippy --workspace --all-targets --locked -- -D warnings
cargo xtask arrows
cargo deny --log-level error check licenses bans sources
shellcheck --external-sources --source-path=SCRIPTDIR tools/*.sh .ci/run
say "lint: all is well"
