#!/bin/sh
# Builds the host for wasm guests, a distribution of its own, and installs it into .venv; then the guests
# of examples/wasi and tests/wasi, for which it gets Rust's target wasm32-wasip2 where rustup may.
set -eu
cd "$(dirname "$0")/.."
tools/build.sh

[ -e target/release/.wasi ] || echo "Building the host for wasm guests. The first time that takes several minutes."
VIRTUAL_ENV=$PWD/.venv
PATH=$VIRTUAL_ENV/bin:$PATH
export VIRTUAL_ENV PATH
unset PYTHONHOME CONDA_PREFIX
(cd wasi && PIP_QUIET=1 maturin develop --release)
touch target/release/.wasi

target=wasm32-wasip2
if ! [ -e "$(rustc --print sysroot)/lib/rustlib/$target" ]; then
    command -v rustup >/dev/null && rustup target add $target || {
        echo "No guests: Rust's target $target is not installed. Their tests will be skipped." >&2
        exit 0
    }
fi
cargo build --release --quiet --target $target --bins --examples -p sapper-wasi-examples -p sapper-wasi-probes
