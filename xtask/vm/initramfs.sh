#!/bin/busybox sh
# The first program of the guest: takes the devices that are meant for vfio-pci or vp-vdpa from the kernel's drivers before
# these look at them, mounts the root, and goes on there with init.sh.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for device in /sys/bus/pci/devices/0000:00:0[6-9a].0 /sys/bus/pci/devices/0000:00:1[cd].0/0000:??:??.?; do
    case $device in
    *:0a.0) echo vp-vdpa ;;
    *) echo vfio-pci ;;
    esac > "$device/driver_override"
    # virtio-pci is part of the kernel and has the device already.
    [ ! -e "$device/driver" ] || echo "${device##*/}" > "$device/driver/unbind"
done
while read -r module; do $b insmod "$module"; done < /early
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -e /dev/vda ] && break
    $b sleep 0.1
done
$b mount -t ext4 -o noatime /dev/vda /disk || { echo "no root"; $b poweroff -f; }
for dir in dev sys proc; do $b mount --move /$dir /disk/$dir; done
$b mount -t tmpfs -o mode=755 run /disk/run
$b cp -r /nbdblk /disk/run/nbdblk
exec $b switch_root /disk /bin/sh /run/nbdblk/init.sh
