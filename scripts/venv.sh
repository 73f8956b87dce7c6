#!/bin/sh
# Creates the virtual environments of this repository.
#
#   venv.sh DIR LOCK PYTHON      create DIR if it is missing (PYTHON may be empty), and install LOCK
#   venv.sh --done DIR PYTHON    write the stamp that marks DIR as complete
#   venv.sh --stale DIR PYTHON   print FORCE if DIR was moved, is broken, or was created by another
#                                interpreter than PYTHON
set -eu

# An active environment or a user's settings must not redirect the installation.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV 2>/dev/null || true
unset PIP_REQUIRE_VIRTUALENV PIP_USER PIP_TARGET PIP_PREFIX 2>/dev/null || true

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

find_python() {
    for candidate in ${1:-python3 python3.13 python3.12 python3.11}; do
        if is_supported "$candidate"; then
            # The base interpreter of an active environment.
            "$candidate" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
    version=$("${1:-python3}" -V 2>&1) || version="no ${1:-python3}"
    echo "ChatHistory needs Python 3.11, 3.12 or 3.13, but this machine has $version;" \
        "name one with: make install PYTHON=/path/to/python3.13" >&2
    exit 1
}

case $1 in
--stale)
    stamp=$2/.installed
    if [ -e "$stamp" ]; then
        folder=$(sed -n 1p "$stamp")
        creator=$(sed -n 2p "$stamp")
        if [ "$folder" != "$PWD" ] || [ "${3:-$creator}" != "$creator" ] ||
            [ ! -x "$2/bin/python" ]; then
            echo FORCE
        fi
    fi
    ;;
--done)
    printf '%s\n%s\n' "$PWD" "$3" >"$2/.installed"
    ;;
*)
    dir=$1 lock=$2 requested=$3
    # Without a stamp for this folder the environment may be incomplete or moved. pip can repair
    # only the former, so it is created again.
    if [ "$(sed -n 1p "$dir/.installed" 2>/dev/null)" != "$PWD" ] ||
        ! is_supported "$dir/bin/python" ||
        { [ -n "$requested" ] && [ "$(sed -n 2p "$dir/.installed")" != "$requested" ]; }; then
        python=$(find_python "$requested")
        echo "creating $dir with $("$python" -V)"
        if ! "$python" -m venv --clear "$dir" >/dev/null; then
            echo "$python cannot create a virtual environment;" \
                "on Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 1
        fi
    fi
    echo "installing $lock into $dir"
    "$dir/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes \
        --only-binary :all: -r "$lock"
    ;;
esac
