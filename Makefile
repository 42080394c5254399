# make demo | test | bench | header | clean. Each target installs what it needs first (Debian).

CARGO ?= cargo
GUEST ?= auto

SOAK_SECONDS ?= 1800

.PHONY: all setup build check test fuzz loom soak demo bench header clean help

all: build

help:
	@echo 'make demo    boot a real guest, inflate, deflate, show what the host got (GUEST=synthetic: no real guest)'
	@echo 'make test    everything: lints, unit tests, C programs, test VMM, real guests'
	@echo 'make check   lints only: formatting, clippy, documentation'
	@echo 'make fuzz    fuzz every target for FUZZ_SECONDS (60), TARGETS="split abi" some of them'
	@echo 'make loom    models of the protocols between threads, in every order of threads'
	@echo 'make soak    64 guests and a VMM that does anything, for SOAK_SECONDS (1800)'
	@echo 'make bench   discard benchmarks against the per-page rival'
	@echo 'make header  regenerate include/aerostat.h after a change of ffi/'
	@echo 'make build   libaerostat.so, libaerostat.a, aerostat-vhost-user (release)'
	@echo 'make clean   remove all build products'

# Installs missing Debian packages; does nothing where all are there.
setup:
	@scripts/setup

build: setup
	$(CARGO) build --release --workspace --exclude aerostat-fuzz

check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items

# The library and the back-end are built first: tests run them as a VMM would, from target/debug.
test: check
	$(CARGO) build --workspace --exclude aerostat-fuzz
	$(CARGO) test --workspace --no-fail-fast

# Needs no nightly toolchain; see scripts/fuzz. What it finds is in target/fuzz.
fuzz: setup
	scripts/fuzz $(TARGETS)

# The seed that it prints runs the same sequence again: make soak AEROSTAT_SEED=...
soak: setup
	$(CARGO) build -p aerostat-ffi
	AEROSTAT_SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test -p aerostat-tests --test vmm_soak -- --nocapture

# In a directory of its own, since everything is built with another configuration.
loom: setup
	RUSTFLAGS='--cfg loom' $(CARGO) test --release -p aerostat-device --lib --target-dir target/loom \
		-- turnstile:: stats::

demo: build
	target/release/aerostat-demo --guest $(GUEST) --out target/demo

bench: build
	$(CARGO) bench --workspace --exclude aerostat-fuzz --bench discard

header: setup
	AEROSTAT_WRITE_HEADER=1 $(CARGO) test -p aerostat-ffi --test header

clean:
	$(CARGO) clean
