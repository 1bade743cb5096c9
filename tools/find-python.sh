#!/bin/sh
# Prints the path of a Python that works, or says why there is none.
#
#   tools/find-python.sh          3.11 or newer, with venv and ensurepip: what this project runs on
#   tools/find-python.sh 3.13     3.13 or newer
#   tools/find-python.sh 3.13t    3.13 or newer, free-threaded
#
# A name on PATH proves nothing: version managers leave shims there for interpreters that are not
# installed. So each candidate is started and asked.
set -u
want=${1:-3.11}
threads=no
case $want in *t) threads=yes want=${want%t} ;; esac

probe='
import sys, sysconfig
import ensurepip, ssl, venv
major, minor = (int(part) for part in sys.argv[1].split("."))
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
fits = sys.implementation.name == "cpython" and sys.version_info[:2] >= (major, minor)
if not fits or free_threaded != (sys.argv[2] == "yes"):
    raise SystemExit(1)
print(sys.executable)
'

candidates() {
    [ -n "${PYTHON:-}" ] && printf '%s\n' "$PYTHON"
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.14t python3.13t python; do
        # Every place on PATH, not the first alone: the shim may stand before the real one.
        printf '%s\n' "$PATH" | tr ':' '\n' | while IFS= read -r folder; do
            [ -x "$folder/$name" ] && printf '%s\n' "$folder/$name"
        done
    done
    for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 \
        "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*/bin/python3 \
        /opt/python/*/bin/python3 /usr/local/python*/bin/python3; do
        [ -x "$found" ] && printf '%s\n' "$found"
    done
}

candidates | while IFS= read -r candidate; do
    if path=$("$candidate" -I -c "$probe" "$want" "$threads" 2>/dev/null) && [ -n "$path" ]; then
        printf '%s\n' "$path"
        break
    fi
done | grep . && exit 0

kind=""
[ "$threads" = yes ] && kind=" without the GIL"
echo "No CPython $want or newer$kind that has the modules venv, ensurepip and ssl was found." >&2
echo "Looked at \$PYTHON, at PATH, and where pyenv and uv keep theirs." >&2
[ "$threads" = no ] && [ -r /etc/debian_version ] && echo "On Debian-like systems: apt-get install python3 python3-venv" >&2
exit 1
