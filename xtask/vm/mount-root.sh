# A part of the first program of each guest: loads the modules for the disk, and mounts the root at /disk. $b is busybox.
while read -r module; do $b insmod "$module"; done < /early
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -e /dev/vda ] && break
    $b sleep 0.1
done
$b mount -t ext4 -o noatime /dev/vda /disk || { echo "no root"; $b poweroff -f; }
for dir in dev sys proc; do $b mount --move /$dir /disk/$dir; done
$b mount -t tmpfs -o mode=755 run /disk/run
