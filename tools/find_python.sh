#!/bin/sh
# Prints the first interpreter that is Python 3.12 or newer: the one given, else those of the PATH and of pyenv and uv.
set -u
newest="none"
for python in ${1:-python3 python python3.12 python3.13 python3.14 "$HOME"/.pyenv/versions/3.1[2-9].*/bin/python}; do
    if version=$("$python" -c 'import platform, sys; print(platform.python_version()); sys.exit(sys.version_info < (3, 12))' 2>/dev/null); then
        echo "$python"
        exit 0
    fi
    [ -n "$version" ] && newest=$version
done
echo "error: Python 3.12 or newer is needed (found: $newest); name one with make PYTHON=/path/to/python" >&2
exit 1
