#!/bin/busybox sh
# The first program of the guest with systemd: mounts the root, and starts systemd there, with one more unit that runs the job.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
. /mount-root.sh
$b cp -r /job /disk/run/job
units=/disk/run/systemd/system
$b mkdir -p $units/multi-user.target.wants
$b cat > $units/job.service <<END
[Unit]
Description=The job of cargo xtask vm

[Service]
ExecStart=/bin/bash /run/job/start.sh
END
$b ln -s ../job.service $units/multi-user.target.wants/job.service
exec $b switch_root /disk /sbin/init
