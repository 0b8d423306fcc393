#!/bin/sh
# Puts libfaketime, by which the fault matrix shifts a replica's clock, into .tools/faketime. What is there already is
# left alone. Needs apt-get and dpkg-deb; no root, once apt-get knows its packages.
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
