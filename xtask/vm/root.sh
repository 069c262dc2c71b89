#!/bin/sh
# Runs in the chroot that becomes the guest's root: installs the programs, the kernel and the modules that the guest
# loads. Leaves for the host: /boot/vmlinux, and /boot/early, the modules that reach the root, in the order of loading.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

# No package may start a service here.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
# The kernel is that of the backports: TLS in the kernel can change keys from Linux 6.14 on.
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
sed -n "s/^\(deb [^ ]*\) $suite .*/\1 $suite-backports main/p" /etc/apt/sources.list > /etc/apt/sources.list.d/backports.list
apt-get update -qq
apt-get install -qqy --no-install-recommends \
    busybox-static e2fsprogs file fio gnutls-bin iproute2 kmod libnbd-bin nbd-client nbdkit nvme-cli openssl pciutils procps \
    python3-libnbd qemu-block-extra qemu-system-x86 qemu-utils strace util-linux xz-utils zstd

package=$(apt-cache depends "linux-image-amd64/$suite-backports" | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p')
version=${package#linux-image-}
work=$(mktemp -d)
cd "$work"
# The kernel and its modules may be in packages of their own.
parts=$(apt-cache depends "$package" | sed -n "s/.*Depends: \(linux-[a-z]*-$version\)$/\1/p")
apt-get download -qq -o APT::Sandbox::User=root "$package" $parts
for deb in *.deb; do dpkg-deb -x "$deb" kernel; done
[ -e kernel/lib ] || ln -s usr/lib kernel/lib
depmod -b "$work/kernel" "$version"
from=$work/kernel/lib/modules/$version
to=/lib/modules/$version

# The files of modules and of what they need, in the order of loading, below the directory of all modules.
files() {
    for module; do
        modprobe -d "$work/kernel" -S "$version" --show-depends "$module" ||
            echo "this kernel has no module $module" >&2
    done | sed -n "s|^insmod .*/modules/$version/\([^ ]*\).*|\1|p" | awk '!seen[$0]++'
}
early='virtio_blk ext4 crc32c_generic'
guest='9p 9pnet_virtio crc32c_intel loop nbd nvme nvme_tcp nvmet nvmet_tcp ublk_drv vduse vfio_iommu_type1 vfio_pci vhost_vdpa virtio_blk vsock_loopback'
# TLS in the kernel, and the ciphers that it looks for by itself.
guest="$guest tls aesni_intel gcm ghash_generic ccm chacha20poly1305 chacha_generic poly1305_generic"
mkdir -p "$to"
# Uncompressed modules load sooner.
for file in $(files $early $guest); do
    mkdir -p "$to/${file%/*}"
    case $file in
    *.xz) xz -dc "$from/$file" > "$to/${file%.xz}" ;;
    *.zst) zstd -dcq "$from/$file" > "$to/${file%.zst}" ;;
    *) cp "$from/$file" "$to/$file" ;;
    esac
done
files $early | sed "s|^|$to/|; s/\.\(xz\|zst\)$//" > /boot/early

# The driver that makes a vDPA device of a virtio device on PCI is in the kernel's source only.
series=$(echo "$version" | cut -d. -f1,2)
release=${version%-*}
built=$(dpkg-deb -f "$package"_*.deb Version)
tools='binutils gcc make'
apt-get install -qqy --no-install-recommends $tools
apt-get download -qq -o APT::Sandbox::User=root "linux-source-$series=$built" \
    "linux-headers-$version=$built" "linux-headers-$release-common=$built" "linux-kbuild-$release=$built"
for deb in linux-headers-*.deb linux-kbuild-*.deb; do dpkg-deb -x "$deb" /; done
dpkg-deb --fsys-tarfile linux-source-*.deb | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
    tar -xJ --strip-components=3 --wildcards 'linux-source-*/drivers/vdpa/virtio_pci'
echo 'obj-m := vp_vdpa.o' > virtio_pci/Makefile
# Without BTF, the kernel's types, which would need the kernel itself unpacked, and without objtool, which needs /proc.
make -C "/usr/src/linux-headers-$version" M="$work/virtio_pci" CONFIG_DEBUG_INFO_BTF_MODULES= CONFIG_OBJTOOL= modules
mkdir "$to/updates"
cp virtio_pci/vp_vdpa.ko "$to/updates"
apt-get purge -qqy --autoremove $tools
rm -rf /usr/src/linux-* /usr/lib/linux-kbuild-* "/lib/modules/$version/build" "/lib/modules/$version/source"

cp "$from"/modules.order "$from"/modules.builtin "$from"/modules.builtin.modinfo "$to"
depmod "$version"

# An unpacked kernel spares the guest the unpacking, which is slow without KVM. The packed one follows a loader; zstd
# complains of what comes after it.
image=$(find kernel -type f -name "vmlinuz*")
at=$(grep -abom1 -P '\x28\xb5\x2f\xfd' "$image" | head -n1 | cut -d: -f1)
tail -c +$((at + 1)) "$image" | zstd -dcq > /boot/vmlinux 2> "$work/complaints" || true
[ "$(head -c4 /boot/vmlinux | tail -c3)" = ELF ] || { cat "$work/complaints" >&2; echo "no kernel in $image" >&2; exit 1; }

cd /
rm -rf "$work" /var/lib/apt/lists/* /var/cache/apt /usr/share/doc /usr/share/man /usr/share/locale
mkdir -p /var/lib/apt/lists/partial /var/cache/apt/archives/partial
