#!/bin/sh
# The virtual environments of this repository.
#
#   venv.sh DIR LOCK PYTHON      make DIR if it is not there (PYTHON may be empty) and install LOCK into it
#   venv.sh --done DIR PYTHON    write the stamp that says DIR is complete
#   venv.sh --stale DIR PYTHON   print FORCE when DIR was moved, is broken or was made by another interpreter than PYTHON
set -eu

# What an active environment or a user's settings would do to ours.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV PIP_REQUIRE_VIRTUALENV PIP_USER PIP_TARGET PIP_PREFIX 2>/dev/null || true

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

find_python() {
    for candidate in ${1:-python3 python3.13 python3.12 python3.11}; do
        if fits "$candidate"; then
            # The interpreter behind an active environment, not the environment.
            "$candidate" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
    found=$("${1:-python3}" -V 2>&1) || found="no ${1:-python3}"
    echo "chat-history needs Python 3.11, 3.12 or 3.13, and found $found; name one with: make install PYTHON=/path/to/python3.13" >&2
    exit 1
}

case $1 in
--stale)
    stamp=$2/.installed
    if [ -e "$stamp" ]; then
        here=$(sed -n 1p "$stamp")
        made_by=$(sed -n 2p "$stamp")
        if [ "$here" != "$PWD" ] || [ "${3:-$made_by}" != "$made_by" ] || [ ! -x "$2/bin/python" ]; then
            echo FORCE
        fi
    fi
    ;;
--done)
    printf '%s\n%s\n' "$PWD" "$3" >"$2/.installed"
    ;;
*)
    dir=$1 lock=$2 asked=$3
    # Without a stamp for this place the environment may be half made or moved: pip itself repairs the former only.
    if [ "$(sed -n 1p "$dir/.installed" 2>/dev/null)" != "$PWD" ] || ! fits "$dir/bin/python" ||
        { [ -n "$asked" ] && [ "$(sed -n 2p "$dir/.installed")" != "$asked" ]; }; then
        python=$(find_python "$asked")
        echo "making $dir with $("$python" -V)"
        if ! "$python" -m venv --clear "$dir" >/dev/null; then
            echo "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 1
        fi
    fi
    echo "installing $lock into $dir"
    "$dir/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes --only-binary :all: -r "$lock"
    ;;
esac
