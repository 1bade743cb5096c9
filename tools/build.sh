#!/bin/sh
# Builds the native module and puts it where `import sapper` finds it: python/sapper/ in this checkout.
set -eu
cd "$(dirname "$0")/.."
tools/setup-env.sh

stamp=.venv/.installed
module=$(ls python/sapper/_native*.so 2>/dev/null | head -n 1)
if [ ! -e target/release/build ]; then
    echo "Building the native module. The first time takes four to five minutes on two cores: OpenSSL and"
    echo "AWS-LC are compiled from source. After that only what changed is compiled."
fi

# maturin reads the interpreter of the virtual environment that is active.
VIRTUAL_ENV=$PWD/.venv
PATH=$VIRTUAL_ENV/bin:$PATH
export VIRTUAL_ENV PATH
unset PYTHONHOME CONDA_PREFIX

# Every command and every test would compile them again where PYTHONDONTWRITEBYTECODE is set.
.venv/bin/python -m compileall -q python/sapper

# A whole install (metadata, the `sapper` command) once per environment; later the module alone.
if [ -n "$module" ] && [ -e "$stamp" ] && ! [ pyproject.toml -nt "$stamp" ]; then
    exec maturin develop --release --skip-install
fi
PIP_QUIET=1 maturin develop --release
touch "$stamp"
