#!/bin/sh
# Runs each fuzz target for FUZZ_SECONDS (30 when unset), or only those that are named as arguments.
# Installs what it needs: a nightly toolchain and cargo-fuzz. Fails when a target crashed; the input
# that did it lies in fuzz/artifacts/TARGET then, and `cargo +nightly fuzz run TARGET FILE` repeats it.
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-30}

missing() {
    echo "Nothing was fuzzed: $1 is needed and cannot be had here." >&2
    exit 1
}

if ! rustup run nightly rustc --version >/dev/null 2>&1; then
    echo "Installing a nightly toolchain: the fuzzer's instrumentation needs one"
    rustup toolchain install nightly --profile minimal || missing "a nightly Rust (rustup toolchain install nightly)"
fi
if ! command -v cargo-fuzz >/dev/null; then
    echo "Installing cargo-fuzz"
    cargo install --quiet --locked cargo-fuzz || missing "cargo-fuzz (cargo install cargo-fuzz)"
fi
# libfuzzer is C++.
if [ -z "${CXX:-}" ]; then
    for compiler in c++ g++ clang++; do
        if command -v $compiler >/dev/null; then
            CXX=$compiler
            export CXX
            break
        fi
    done
    [ -n "${CXX:-}" ] || missing "a C++ compiler (Debian: apt-get install g++)"
fi

python3 tools/fuzz_seeds.py

targets=${*:-$(cargo +nightly fuzz list)}
# The parsers have no unsafe code: nothing for an address sanitizer to find, and it halves the speed.
[ -e fuzz/target ] || echo "Building; the first time OpenSSL and AWS-LC are compiled again, four to five minutes on two cores"
cargo +nightly fuzz build --sanitizer none
failed=""
# shellcheck disable=SC2086 # a list of words
for target in $targets; do
    echo "- $target, $seconds s"
    log=$(mktemp)
    if cargo +nightly fuzz run --sanitizer none "$target" -- \
        -max_total_time="$seconds" -max_len=4096 -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 >"$log" 2>&1; then
        grep -E "stat::number_of_executed_units|stat::peak_rss_mb" "$log" | sed 's/^stat::/    /'
    else
        tail -n 40 "$log" >&2
        failed="$failed $target"
    fi
    rm -f "$log"
done
if [ -n "$failed" ]; then
    echo "Crashed:$failed" >&2
    exit 1
fi
