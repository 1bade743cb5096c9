#!/bin/sh
# Makes .venv with everything that building, testing and checking need. Does nothing while it is newer
# than pyproject.toml and its Python still works.
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/.complete

if [ -e "$stamp" ] && ! [ pyproject.toml -nt "$stamp" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

for program in cargo cc perl make; do
    command -v "$program" >/dev/null || missing="${missing:-} $program"
done
if [ -n "${missing:-}" ]; then
    echo "Not found on PATH:$missing. Building needs a Rust toolchain, a C compiler (as cc), perl and make." >&2
    exit 1
fi

if ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(tools/find-python.sh)
    echo "Making .venv with $("$python" --version) ($python)"
    rm -rf .venv
    "$python" -m venv .venv
fi
echo "Installing the Python packages of pyproject.toml into .venv"
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
# `--group` and the editable install need a pip of 25.1 or newer; a new venv often has an older one.
pip install --upgrade 'pip>=25.1'
pip install --group dev
rm -f .venv/.installed
touch "$stamp"
