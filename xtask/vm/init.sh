# Process 1 of the guest: makes the devices, says what they are called (/run/nbdblk/env), runs the job, tells the host
# the job's status, and powers the machine off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
. /run/nbdblk/config
warn() { echo "init: $*" > /dev/console; }
steps=
step() { read -r uptime _ < /proc/uptime; steps="$steps $1=$uptime"; }
await() {
    for try in $(seq 400); do
        "$@" 2> /run/nbdblk/await && return 0
        sleep 0.05
    done
    warn "in vain: $*: $(cat /run/nbdblk/await)"
    return 1
}
step root

mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t hugetlbfs huge /dev/hugepages
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
hostname guest
ip link set lo up
ulimit -l unlimited
ulimit -n 65536

modprobe -a 9pnet_virtio 9p
share=0
while read -r dir; do
    mkdir -p "$dir"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap share$share "$dir" || warn "cannot share $dir"
    share=$((share + 1))
done < /run/nbdblk/shares
step shares

modprobe -a nvme vfio_iommu_type1 vfio_pci vduse vp_vdpa vhost_vdpa ublk_drv tls vsock_loopback
modprobe nbd nbds_max=8
for device in /sys/bus/pci/devices/*; do
    [ -e "$device/driver" ] || echo "${device##*/}" > /sys/bus/pci/drivers_probe
done
step drivers

# One process is the device of both: vhost-user, and vDPA by way of VDUSE, which must exist before it is added.
for name in vhost-user vduse0 vduse1; do truncate -s "${MIB}M" "/tmp/$name.img"; done
qemu-storage-daemon \
    --blockdev driver=file,filename=/tmp/vhost-user.img,node-name=a,discard=unmap \
    --export vhost-user-blk,id=a,node-name=a,writable=on,addr.type=unix,addr.path=/run/nbdblk/vhost-user.sock,num-queues=4 \
    --blockdev driver=file,filename=/tmp/vduse0.img,node-name=b,discard=unmap \
    --export vduse-blk,id=b,node-name=b,writable=on,name=vduse0,num-queues=4,queue-size=256,serial=nbdblk-vduse \
    --blockdev driver=file,filename=/tmp/vduse1.img,node-name=c,discard=unmap \
    --export vduse-blk,id=c,node-name=c,writable=on,name=vduse1,num-queues=4,queue-size=256,serial=nbdblk-twin \
    > /run/nbdblk/qsd.log 2>&1 &
# EINVAL as long as its queues are not all set up.
for n in 0 1; do
    await vdpa dev add name vduse$n mgmtdev vduse && await [ -e /dev/vhost-vdpa-$n ] || cat /run/nbdblk/qsd.log > /dev/console
done
await [ -e /run/nbdblk/vhost-user.sock ]
# The last of them, so that the numbers of the others stay: it comes and goes with its driver.
await vdpa dev add name pci mgmtdev pci/0000:00:0a.0
for node in /sys/bus/vdpa/devices/pci/vhost-vdpa-*; do ln -s "/dev/${node##*/}" /run/nbdblk/vdpa-pci; done

# The kernel numbers namespaces as it finds them: n1 may be the one with nsid 2.
for n in 1 2 3; do await [ -e /dev/ng0n$n ]; done
for disk in /sys/block/nvme0n*; do
    read -r nsid < "$disk/nsid"
    eval "nsid$nsid=${disk##*/nvme}"
done
for device in /sys/bus/pci/devices/0000:00:1c.0/0000:??:??.?; do mdts=${device##*/}; done
for device in /sys/bus/pci/devices/0000:00:1d.0/0000:??:??.?; do vblk=${device##*/}; done
for port in /sys/class/virtio-ports/*; do
    read -r name < "$port/name"
    eval "port_$name=/dev/${port##*/}"
done
cat > /run/nbdblk/env <<END
export NBDBLK_VM=1
export NBDBLK_NVME_KERNEL=/dev/nvme$nsid1 NBDBLK_NVME_KERNEL4K=/dev/nvme$nsid2
export NBDBLK_NG=/dev/ng$nsid1 NBDBLK_NG4K=/dev/ng$nsid2 NBDBLK_NG_TWIN=/dev/ng$nsid3
export NBDBLK_NVME=0000:00:06.0 NBDBLK_NVME_MDTS=$mdts
export NBDBLK_VBLK=0000:00:07.0 NBDBLK_VBLK4K=0000:00:08.0 NBDBLK_VBLK_PACKED=0000:00:09.0
export NBDBLK_VBLK_SOCKET=$vblk NBDBLK_VBLK_VDPA=0000:00:0a.0 NBDBLK_VDPA_PCI=/run/nbdblk/vdpa-pci
export NBDBLK_VDPA=/dev/vhost-vdpa-0 NBDBLK_VDPA_TWIN=/dev/vhost-vdpa-1 NBDBLK_VHOST_USER=/run/nbdblk/vhost-user.sock
export NBDBLK_MONITOR=$port_monitor
export PATH=$BINARIES:$PATH
END
. /run/nbdblk/env
step devices

poweroff() {
    echo o > /proc/sysrq-trigger
    sleep 60
}
if [ "$SECONDS_MAX" = 0 ]; then
    setsid -c bash < /dev/ttyS0 > /dev/ttyS0 2>&1
    poweroff
fi
# A port opens once only.
exec 3> "$port_control" 4> "$port_out" 5> "$port_err"
echo "ready$steps" >&3
setsid timeout -k 5 "$SECONDS_MAX" sh /run/nbdblk/job < /dev/null >&4 2>&5 3>&- 4>&- 5>&-
echo "status $?" >&3
poweroff
