#!/bin/sh
# Runs in the chroot that becomes the root with systemd: what an administrator's machine has before nbdblk is installed, and
# clients.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

apt-get update -qq
apt-get install -qqy --no-install-recommends curl iproute2 libnbd-bin man-db nbdkit procps python3-libnbd systemd-sysv

rm -rf /var/lib/apt/lists/* /var/cache/apt /usr/share/doc /usr/share/locale
mkdir -p /var/lib/apt/lists/partial /var/cache/apt/archives/partial
