#!/bin/busybox sh
# The first program of the guest with systemd: mounts the root, and starts systemd there, with one more unit that runs the job.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "$module"; done < /early
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -e /dev/vda ] && break
    $b sleep 0.1
done
$b mount -t ext4 -o noatime /dev/vda /disk || { echo "no root"; $b poweroff -f; }
for dir in dev sys proc; do $b mount --move /$dir /disk/$dir; done
$b mount -t tmpfs -o mode=755 run /disk/run
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
