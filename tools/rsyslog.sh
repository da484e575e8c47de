#!/bin/sh
# Unpacks Debian's rsyslog and its output for Elasticsearch into .rsyslog/, for the test that ships logs. Installs nothing,
# and needs no root.
set -eu
cd "$(dirname "$0")/.."
rm -rf .rsyslog.new && mkdir -p .rsyslog.new/debs
(cd .rsyslog.new/debs && apt-get download -qq rsyslog rsyslog-elasticsearch libestr0 libfastjson4)
for deb in .rsyslog.new/debs/*.deb; do
    dpkg-deb -x "$deb" .rsyslog.new
done
rm -rf .rsyslog.new/debs .rsyslog
mv .rsyslog.new .rsyslog
