# make help tells what there is. Each target installs what it needs first (Debian).

CARGO ?= cargo
GUEST ?= auto
PROTOCOL ?= virtio
PREFIX ?= /usr/local
SOAK_SECONDS ?= 1800
ROUNDS ?= 5

.PHONY: all setup build check test suites fuzz loom sanitize miri soak demo bench bench-vmm experiment qemu install deb abi header clean help

all: build

help:
	@echo 'make demo    boot a real guest, inflate, deflate, show what the host got (GUEST=synthetic: no real guest)'
	@echo '             PROTOCOL=memballoon, PROTOCOL=vmware: the other balloons'
	@echo 'make test    everything: lints, unit tests, C programs, test VMM, real guests'
	@echo 'make suites  the suites of the test VMM once more, with packed rings and with write-behind'
	@echo 'make check   lints only: formatting, clippy, documentation'
	@echo 'make fuzz    fuzz every target for FUZZ_SECONDS (60), TARGETS="split abi" some of them'
	@echo 'make loom    models of the protocols between threads, in every order of threads'
	@echo 'make sanitize  suites of the test VMM under ThreadSanitizer (SANITIZER=address, SANITIZE="vmm_chaos": one)'
	@echo 'make miri    unit tests of what works on memory by address under miri'
	@echo 'make bench   benchmarks against what other VMMs do (QUICK=1, or BENCH_SECONDS=N: shorter)'
	@echo 'make soak    64 guests and a VMM that does anything, for SOAK_SECONDS (1800)'
	@echo 'make qemu    QEMU with the library'"'"'s balloon device, from Debian'"'"'s source package, in target/qemu'
	@echo 'make bench-vmm  that device against QEMU'"'"'s own, in one QEMU with one guest'
	@echo 'make install library, header, programs, manual pages: PREFIX=/usr/local, DESTDIR=, LIBDIR='
	@echo 'make deb     a Debian package of the same, in target'
	@echo 'make abi     take the ABI as it is now for the one that tests compare with'
	@echo 'make experiment  real guests that do not fit on their host, rule against rule (ROUNDS=5)'
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

# The library and the back-end are built first: tests run them as a VMM would, from target/debug. QEMU
# with the library's device takes some minutes the first time; it is kept in ~/.cache/aerostat.
test: check
	$(CARGO) build --workspace --exclude aerostat-fuzz
	PROFILE=debug scripts/build-qemu
	$(CARGO) test --workspace --no-fail-fast
	$(MAKE) suites
	FUZZ_SECONDS=$${FUZZ_SECONDS:-10} FUZZ_JOBS=$${FUZZ_JOBS:-2} scripts/fuzz

# What the suites of whole devices leave open, chosen otherwise (CONTRIBUTING.md, "Settings").
SUITES := $(patsubst tests/tests/%.rs,--test %,$(filter-out %/vmm_soak.rs,$(wildcard tests/tests/vmm_*.rs)))
SETTINGS ?= packed write-behind packed,in-order,write-behind

suites:
	for settings in $(SETTINGS); do \
		AEROSTAT_TEST_SETTINGS=$$settings $(CARGO) test --workspace --no-fail-fast $(SUITES) || exit 1; \
	done

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
		-- models:: turnstile:: stats::

# The stable toolchain does, with the sources of its standard library.
sanitize: setup
	scripts/sanitize $(or $(SANITIZER),thread) $(SANITIZE)

# Installs the nightly toolchain that it comes with.
miri: setup
	scripts/miri

demo: build
	target/release/aerostat-demo --guest $(GUEST) --protocol $(PROTOCOL) --out target/demo

bench: build
	$(CARGO) build --release -p aerostat-vhost-user --features bench --bin aerostat-vhost-user-rival
	$(CARGO) bench -p aerostat-tests --bench figures -- $(if $(QUICK),--quick)

qemu: build
	scripts/build-qemu

bench-vmm: qemu
	$(CARGO) bench -p aerostat-tests --bench vmm

# After "make build", so that only the copying needs root.
install:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' LIBDIR='$(LIBDIR)' scripts/install

deb: build
	scripts/build-deb

abi: setup
	AEROSTAT_WRITE_ABI=1 $(CARGO) test -p aerostat-tests --test abi

# Each round boots a host VM with its guests and runs every rule once: about ten minutes a round where
# there is no KVM. RULES="--rule none --rule aerostat" compares fewer.
experiment: setup
	$(CARGO) build --release -p aerostat-tests -p aerostat-reclaim -p aerostat-vhost-user --bins
	target/release/aerostat-experiment --rounds $(ROUNDS) $(RULES)

header: setup
	AEROSTAT_WRITE_HEADER=1 $(CARGO) test -p aerostat-ffi --test header

clean:
	$(CARGO) clean
