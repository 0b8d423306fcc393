#!/bin/sh
# Downloads libfaketime, with which the fault matrix shifts a replica's clock, into .tools/faketime, unless it is there.
# Needs apt-get and dpkg-deb, and no root if the package lists are up to date.
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
