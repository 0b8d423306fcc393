#!/bin/sh
# Installs libfaketime into .tools/faketime. The fault matrix uses it to shift a replica's clock.
# Skips an installed one. Needs apt-get and dpkg-deb, and root only if apt-get has no package lists.
set -eu
cd "$(dirname "$0")/../.."

if [ ! -e .tools/faketime/libfaketimeMT.so.1 ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    mkdir -p .tools/faketime
    (
        cd "$unpacked"
        apt-get -qq download libfaketime || { apt-get -qq update && apt-get -qq download libfaketime; }
        dpkg-deb -x libfaketime_*.deb .
    )
    cp "$unpacked"/usr/lib/*/faketime/libfaketimeMT.so.1 .tools/faketime/
fi
