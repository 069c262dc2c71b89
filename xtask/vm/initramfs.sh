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
. /mount-root.sh
$b cp -r /nbdblk /disk/run/nbdblk
exec $b switch_root /disk /bin/sh /run/nbdblk/init.sh
