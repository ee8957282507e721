#!/bin/sh
# Runs the unit and property tests on every other installed Python that the library supports.
set -eu
here=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for version in 3.11 3.12 3.13 3.14; do
    [ "$version" = "$here" ] && continue
    python=""
    for candidate in "$(command -v "python$version" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        if [ -x "$candidate" ] && "$candidate" -c 'import sys, venv, ssl' 2>/dev/null; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        echo "Python $version is not installed here: not tested on it."
        continue
    fi
    venv=".venv-$version"
    if [ ! -e "$venv/.ready" ] || [ pyproject.toml -nt "$venv/.ready" ]; then
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --upgrade pip
        "$venv/bin/python" -m pip install --quiet -e '.[dev]'
        touch "$venv/.ready"
    fi
    echo "Unit and property tests on Python $version"
    "$venv/bin/python" -m pytest -q -n "${WORKERS:-2}" tests/unit tests/property
done
