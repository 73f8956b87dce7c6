#!/usr/bin/env bash
# Ensures that the load generator can be compiled. As root on Debian it installs missing packages.
set -euo pipefail

compiles() {
    echo '#include <nghttp2/nghttp2.h>
int main(void) { return nghttp2_version(0) == 0; }' |
        "${CC:-cc}" -x c -o /dev/null - -lnghttp2 2>/dev/null
}

compiles && exit
packages=(gcc libc6-dev libnghttp2-dev)
if ((EUID == 0)) && command -v apt-get >/dev/null; then
    echo "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq --yes --no-install-recommends "${packages[@]}" >/dev/null
    compiles && exit
fi
echo "make bench needs a C compiler and libnghttp2: sudo apt-get install ${packages[*]}" >&2
exit 1
