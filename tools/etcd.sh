#!/bin/sh
# Unpacks Debian's etcd-server into .etcd/, for the tests and for `shoal up`: SHOAL_ETCD_BINARY=.etcd/usr/bin/etcd.
# Installs nothing, and needs no root.
set -eu
cd "$(dirname "$0")/.."
rm -rf .etcd.new && mkdir -p .etcd.new/debs
(cd .etcd.new/debs && apt-get download -qq etcd-server)
for deb in .etcd.new/debs/*.deb; do
    dpkg-deb -x "$deb" .etcd.new
done
rm -rf .etcd.new/debs .etcd
mv .etcd.new .etcd
