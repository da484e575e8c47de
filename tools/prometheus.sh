#!/bin/sh
# Unpacks Debian's Prometheus and promtool into .prometheus/, for the tests of metrics. Installs nothing, and needs no root.
set -eu
cd "$(dirname "$0")/.."
rm -rf .prometheus.new && mkdir -p .prometheus.new/debs
(cd .prometheus.new/debs && apt-get download -qq prometheus promtool)
for deb in .prometheus.new/debs/*.deb; do
    dpkg-deb -x "$deb" .prometheus.new
done
rm -rf .prometheus.new/debs .prometheus
mv .prometheus.new .prometheus
