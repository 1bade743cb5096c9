#!/bin/sh
# What a change must pass before its tests are looked at. Runs all of it, then fails if any part did.
set -u
cd "$(dirname "$0")/.."
failed=""
step() {
    name=$1
    shift
    printf '%s\n' "- $name"
    "$@" || failed="$failed
  $name"
}
# Packages of an older pyproject.toml would make mypy find mistakes that are none.
tools/setup-env.sh || exit 1
bin=.venv/bin
step "rustfmt" cargo fmt --all --check
step "clippy" tools/cargo.sh clippy --release --all-targets --quiet -- -D warnings
step "ruff check" $bin/ruff check --quiet .
step "ruff format" $bin/ruff format --check --quiet .
step "mypy" $bin/mypy
step "stubs against the built module" $bin/python tools/check_stubs.py
step "rules of the tree" $bin/python tools/check_tree.py
if [ -n "$failed" ]; then
    echo "Failed:$failed" >&2
    exit 1
fi
echo "All checks passed."
