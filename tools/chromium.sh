#!/bin/sh
# Unpacks Debian's headless Chromium with the libraries that this machine lacks into .chromium/, for the tests of web
# pages. Installs nothing, and needs no root.
set -eu
cd "$(dirname "$0")/.."
rm -rf .chromium.new && mkdir -p .chromium.new/debs
packages=$(apt-get install --simulate --no-install-recommends chromium-headless-shell | sed -n 's/^Inst \([^ ]*\).*/\1/p')
(cd .chromium.new/debs && apt-get download -qq $packages)
for deb in .chromium.new/debs/*.deb; do
    dpkg-deb -x "$deb" .chromium.new
done
rm -rf .chromium.new/debs .chromium
mv .chromium.new .chromium
