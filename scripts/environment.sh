# Sourced by the scripts beside it: makes $root/.venv with all extras, and again when pyproject.toml,
# constraints.txt or the interpreter changed. Leaves $root and $python set.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

say() { printf 'memserve: %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "Python 3.11 or newer is needed, and none is on PATH"
    return 2
}

make_venv() {
    local base
    base=$(find_python)
    say "making $venv with $base"
    # Debian keeps ensurepip in python3-venv; where that is missing, the system's pip installs one.
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv --clear "$venv"
    else
        "$base" -m venv --clear --without-pip "$venv"
        "$base" -m pip --python "$python" install --quiet pip
    fi
}

prepare_environment() {
    local wanted stamp=$venv/stamp
    exec 9<"$root/pyproject.toml"
    flock 9 # two scripts started at once install once
    "$python" -c '' 2>/dev/null || make_venv
    wanted=$(cd "$root" && { "$python" -VV; pwd; cat pyproject.toml constraints.txt; } | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing memserve and what it needs into $venv (some minutes, once)"
        rm -f "$stamp"
        "$python" -m pip install --disable-pip-version-check --no-input \
            --constraint "$root/constraints.txt" --editable "$root[fuzz,gguf,test,check]" >&2
        printf '%s\n' "$wanted" >"$stamp"
    fi
    exec 9<&-
}

prepare_environment
