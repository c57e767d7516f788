#!/usr/bin/env bash
# Collects what a machine with Python 3.12, torch 2.11 and triton 3.6 but no network lacks to run this project: some 17
# MiB of wheels, into the folder .whl of the repository, which git is told to ignore in this checkout alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=.venv/bin/python
[ -x "$python" ] || { echo "collect_wheels.sh: error: there is no .venv; say make install first" >&2; exit 2; }
exclude=$(git rev-parse --git-path info/exclude)
grep -qx '/.whl/' "$exclude" 2>/dev/null || echo /.whl/ >>"$exclude"
mkdir -p .whl
platforms=()
for tag in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
for tag in 2014 2010 1; do platforms+=(--platform "manylinux${tag}_x86_64"); done
while read -r pin; do
    name=${pin%%==*} version=${pin##*==}
    compgen -G ".whl/${name//-/_}-$version-*.whl" >/dev/null && continue
    if [ "$name" = deepspeed ]; then
        # Published as a source only; without its extensions it is pure Python.
        DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .whl "$pin"
    else
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
            "${platforms[@]}" --dest .whl "$pin"
    fi
done <"$here/wheels.txt"
du -sh .whl
