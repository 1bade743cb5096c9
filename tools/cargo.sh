#!/bin/sh
# Runs cargo as maturin runs it, so that the tests and clippy take what the build made and the other way
# round: pyo3's build script is run again whenever one of these variables changes.
set -eu
cd "$(dirname "$0")/.."
for config in target/maturin/pyo3-config-*-abi3.txt; do
    if [ -e "$config" ]; then
        PYO3_CONFIG_FILE=$PWD/$config
        PYO3_BUILD_EXTENSION_MODULE=1
        export PYO3_CONFIG_FILE PYO3_BUILD_EXTENSION_MODULE
        break
    fi
done
exec cargo "$@"
