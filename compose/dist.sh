#!/bin/sh
# Builds what a release consists of into target/packages: a static program, a Debian package, and their SHA-256 sums.
# PROFILE=release builds faster; the program is then less optimized.
set -eu
cd "$(dirname "$0")/.."

PROFILE=${PROFILE:-dist}
# glibc: its static program resolves host names without any file of the system.
TARGET=$(rustc -vV | sed -n 's/^host: //p')
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
case $TARGET in
    x86_64-*) ARCH=amd64 ;;
    aarch64-*) ARCH=arm64 ;;
    *) echo "cannot package for $TARGET: only x86_64 and aarch64 have a name at Debian here" >&2 && exit 1 ;;
esac

# A static program finds getrandom(2) by its number only; otherwise it needs /dev/random.
RUSTFLAGS='-C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom"' \
    cargo build --locked --profile "$PROFILE" --bin gradestore --target "$TARGET" --config "profile.$PROFILE.strip=true"

dist=target/packages
rm -rf "$dist"
mkdir -p "$dist"
program=$dist/gradestore-$VERSION-linux-$ARCH
cp "target/$TARGET/$PROFILE/gradestore" "$program"

root=$dist/root
install -D -m 755 "$program" "$root/usr/bin/gradestore"
install -d "$root/usr/lib/systemd/system"
sed 's|/usr/local/bin|/usr/bin|' compose/gradestore.service >"$root/usr/lib/systemd/system/gradestore.service"
install -D -m 644 LICENSE "$root/usr/share/doc/gradestore/copyright"
install -D -m 644 README.md CHANGELOG.md -t "$root/usr/share/doc/gradestore"
install -d "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<END
Package: gradestore
Version: $VERSION
Architecture: $ARCH
Maintainer: gradestore
Section: database
Priority: optional
Installed-Size: $(du -sk "$root/usr" | cut -f1)
Description: replicated in-memory database for per-user settings
 Four integer fields for each user, written and read over HTTP. Writes are
 durable before they are acknowledged and are replicated through NATS JetStream.
END
cat >"$root/DEBIAN/postinst" <<'END'
#!/bin/sh
set -e
if [ "$1" = configure ] && [ ! -e /etc/gradestore/password ]; then
    install -d -m 700 /etc/gradestore
    (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >/etc/gradestore/password)
    echo "gradestore: made a password in /etc/gradestore/password; start the node with: systemctl enable --now gradestore"
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
END
cat >"$root/DEBIAN/postrm" <<'END'
#!/bin/sh
set -e
if [ "$1" = purge ]; then
    rm -rf /etc/gradestore
fi
END
chmod 755 "$root/DEBIAN/postinst" "$root/DEBIAN/postrm"
dpkg-deb --build --root-owner-group "$root" "$dist/gradestore_${VERSION}_$ARCH.deb"
rm -rf "$root"

cd "$dist"
sha256sum -- gradestore* >SHA256SUMS
cat SHA256SUMS
