# What the house can do. `make` alone lists it.
# Needs a Rust toolchain (rustup.rs); everything else comes through apt when it is missing.

CARGO ?= cargo
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help demo build test unit-test guest-test soak test-kvm test-office test-office-short lint bench bench-kvm bench-net install

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: prepare ## Boot a Debian 12 in a VM of yours; without a terminal: boot, look around, power off
	tools/demo.sh

build: prepare ## The program: target/release/ospite
	$(CARGO) build --release --locked

test: lint build unit-test guest-test test-kvm test-office-short ## Everything that CI runs

unit-test: prepare ## The tests of the crates; seconds once built
	$(CARGO) test --workspace --locked

guest-test: prepare ## Boots kernels and a Debian and talks to them; minutes
	@tools/prepare.sh guest-tests
	$(CARGO) test --locked --no-fail-fast --package guest-tests -- --ignored --test-threads=1

soak: prepare ## Ten minutes of everything at once in a guest with 2 vCPUs; not part of test
	@tools/prepare.sh guest-tests
	OSPITE_SOAK=$${OSPITE_SOAK:-600} $(CARGO) test --locked --package guest-tests --test soak -- --ignored --nocapture

test-kvm: prepare ## The hardware engine on emulated hardware: boots Debian's kernel on nested page tables
	tools/test-kvm.sh

test-office: prepare ## Three services in three VMs, real clients, and harm done to one after the other; minutes
	tools/test-office.sh

# What make test has of it: three harms, once each, and others that are merely slower are no failure, as who else
# uses the machine is not known.
test-office-short: prepare
	OSPITE_OFFICE_WINDOW=8 OSPITE_OFFICE_TURNS=1 OSPITE_OFFICE_LIMIT=3 tools/test-office.sh kill panic scan

lint: prepare ## Format, clippy, arrows of the house plan, licences, shell scripts
	tools/lint.sh

bench: prepare ## How fast guests are, beside the metal and QEMU's translator in one run; BENCH=--quick: a first impression
	tools/bench.sh $(BENCH)

bench-kvm: prepare ## What the hardware engine costs, beside QEMU with KVM, on emulated hardware in the same run
	tools/bench-kvm.sh

bench-net: prepare ## How fast guests' networks are, beside QEMU's user network and passt in the same run
	tools/bench-net.sh

install: build ## Into PREFIX (/usr/local): the program, man pages, completions
	tools/install.sh

.PHONY: prepare
prepare:
	@tools/prepare.sh
