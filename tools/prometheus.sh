#!/bin/sh
# Unpacks Debian's Prometheus, promtool, Alertmanager and VictoriaMetrics into .prometheus/, for the tests of metrics and
# alerts. Installs nothing, and needs no root.
set -eu
cd "$(dirname "$0")/.."
rm -rf .prometheus.new && mkdir -p .prometheus.new/debs
(cd .prometheus.new/debs && apt-get download -qq prometheus promtool prometheus-alertmanager victoria-metrics)
for deb in .prometheus.new/debs/*.deb; do
    dpkg-deb -x "$deb" .prometheus.new
done
rm -rf .prometheus.new/debs .prometheus.new/usr/bin/vm*
# Debian's Alertmanager reads its templates at a path that is fixed in the binary. The path in its place is as long, and
# relative: Alertmanager runs from the root of the checkout.
mv .prometheus.new/usr/share/prometheus/alertmanager .prometheus.new/usr/share/
sed -i 's#/usr/share/prometheus/alertmanager#.prometheus/usr/share/alertmanager#g' .prometheus.new/usr/bin/prometheus-alertmanager
rm -rf .prometheus
mv .prometheus.new .prometheus
