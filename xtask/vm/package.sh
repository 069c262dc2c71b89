# The life of the package on a clean Debian: installed, configured, served from, restarted, reloaded, upgraded, removed,
# purged. Runs as root; old/ and new/ next to this file have the packages of two versions.
set -eu -o pipefail
cd "$(dirname "$0")"

step() { echo; echo "== $* ($(cut -d' ' -f1 /proc/uptime) s)"; }
fail() {
    echo "FAILED: $*"
    systemctl --no-pager --full status 'nbdblk*' || true
    journalctl --no-pager -n 60 || true
    exit 1
}
trap 'fail "line $LINENO"' ERR
has() { grep -qF -- "$1" <<< "$2" || fail "no \"$1\" in: $2"; }
install() { apt-get install -qqy -o APT::Sandbox::User=root "$@" > /tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"; }
refused() { ! "$@" > /tmp/refused 2>&1 || fail "succeeded: $*"; }

step "install"
find / -xdev \( -path /var/log -o -path /var/cache -o -path /tmp \) -prune -o -print | sort > /tmp/before
install ./old/*.deb
id nbdblk
[ -d /etc/nbdblk ]
refused systemctl is-enabled nbdblk.service
man -w nbdblk nbdblk-serve nbdblk-status nbdblk.toml nbdblk-drivers nbdkit-nbdblk-plugin > /dev/null
has 'nbdblk serve' "$(man nbdblk | col -b)"
nbdkit nbdblk memory=1M --run 'nbdinfo --size "$uri"'

step "a first service, as its manual page says"
truncate -s 64M /srv/disk.img
chown nbdblk /srv/disk.img
cat > /etc/nbdblk/nbdblk.toml <<'END'
metrics = ["tcp:9810"]

[[export]]
name = "disk"
device = "io_uring=/srv/disk.img"
END
nbdblk check /etc/nbdblk/nbdblk.toml
systemctl enable --quiet --now nbdblk
nbdblk status
[ "$(nbdinfo --size nbd://localhost)" = 67108864 ]
has 'nbdblk_device_state{export="disk",state="working"} 1' "$(curl -s http://localhost:9810/metrics)"
[ "$(ps -o user= -C nbdblk)" = nbdblk ]
nbdsh -u nbd://localhost -c 'h.pwrite(b"x" * 65536, 1 << 20); h.flush()'
# The unit takes more away than the file system's permissions do.
chmod 666 /etc/hostname
printf '\n[[export]]\nname = "etc"\ndevice = "io_uring=/etc/hostname"\n' >> /etc/nbdblk/nbdblk.toml
refused systemctl reload nbdblk
has 'hostname' "$(journalctl -u nbdblk -n 20)"
chmod 644 /etc/hostname

step "reload"
sed -i 's|/etc/hostname|/srv/second.img|; s|"etc"|"second"|' /etc/nbdblk/nbdblk.toml
truncate -s 1M /srv/second.img
chown nbdblk /srv/second.img
systemctl reload nbdblk
[ "$(nbdinfo --size nbd://localhost/second)" = 1048576 ]
echo 'mistake' >> /etc/nbdblk/nbdblk.toml
refused systemctl reload nbdblk
has '/etc/nbdblk/nbdblk.toml:10:' "$(journalctl -u nbdblk -n 20)"
sed -i '$d' /etc/nbdblk/nbdblk.toml
[ "$(nbdinfo --size nbd://localhost/second)" = 1048576 ]

step "services that sockets start"
for name in a b; do
    truncate -s 8M "/srv/$name.img"
    chown nbdblk "/srv/$name.img"
    printf '[[export]]\ndevice = "io_uring=/srv/%s.img"\n' "$name" > "/etc/nbdblk/$name.toml"
    systemctl enable --quiet --now "nbdblk@$name.socket"
    refused systemctl is-active "nbdblk@$name.service"
done
a='nbd+unix://?socket=/run/nbdblk/a.sock'
b='nbd+unix://?socket=/run/nbdblk/b.sock'
[ "$(nbdinfo --size "$a")" = 8388608 ]
[ "$(nbdinfo --size "$b")" = 8388608 ]
systemctl is-active nbdblk@a.service nbdblk@b.service
[ "$(stat -c '%U %G %a' /run/nbdblk/a.sock)" = 'nbdblk nbdblk 660' ]
nbdblk status --control /run/nbdblk/a/control.sock
# No other sockets than those of the units, and of the service without a socket unit.
ss -Hltn | awk '{ print $4 }' | sort > /tmp/listening
has '127.0.0.1:10809' "$(cat /tmp/listening)"
[ "$(grep -c 10809 /tmp/listening)" = 2 ] || fail "$(cat /tmp/listening)"

step "restart, while clients connect"
cat > /tmp/restart.py <<'END'
import errno, nbd, subprocess
uri = "nbd+unix://?socket=/run/nbdblk/a.sock"
h = nbd.NBD()
h.connect_uri(uri)
h.pwrite(b"a" * 4096, 0, nbd.CMD_FLAG_FUA)
restart = subprocess.Popen(["systemctl", "restart", "nbdblk@a.service"])
clients = cut = 0
while restart.poll() is None or clients < 3:
    other = nbd.NBD()
    try:
        other.connect_uri(uri)
        assert other.pread(4096, 0) == b"a" * 4096
        other.shutdown()
        clients += 1
    except nbd.Error as error:
        # The old server had accepted it.
        assert error.errnum != errno.ECONNREFUSED and restart.poll() is None, error
        cut += 1
assert restart.returncode == 0
try:
    h.pread(4096, 0)
    raise SystemExit("the client from before the restart is still connected")
except nbd.Error:
    pass
print(clients, "clients were served,", cut, "were cut off by the end of the old server, none was refused")
END
python3 /tmp/restart.py

step "a block device of the kernel, with the drop-in of the examples"
printf '[[export]]\ndevice = "io_uring=/dev/vdb"\n' > /etc/nbdblk/block.toml
refused systemctl start nbdblk@block.service
systemctl reset-failed nbdblk@block.service
mkdir -p /etc/systemd/system/nbdblk@block.service.d
sed 's|/dev/sdb|/dev/vdb|' /usr/share/doc/nbdblk/examples/block-device.conf > /etc/systemd/system/nbdblk@block.service.d/device.conf
chgrp disk /dev/vdb
chmod 660 /dev/vdb
systemctl daemon-reload
printf 'port = 10900\n%s\n' "$(cat /etc/nbdblk/block.toml)" > /etc/nbdblk/block.toml
systemctl start nbdblk@block.service
nbdsh -u nbd://localhost:10900 -c 'h.pwrite(b"b" * 512, 0); h.flush(); print(h.get_size())'
systemctl stop nbdblk@block.service
rm -r /etc/systemd/system/nbdblk@block.service.d /etc/nbdblk/block.toml
systemctl daemon-reload

step "upgrade, with a client"
cat > /tmp/upgrade.py <<'END'
import glob, nbd, os, subprocess
h = nbd.NBD()
h.connect_uri("nbd://localhost/disk")
h.pwrite(b"u" * 4096, 0)
pid = subprocess.check_output(["systemctl", "show", "-P", "MainPID", "nbdblk"]).decode().strip()
apt = ["apt-get", "install", "-qqy", "-o", "APT::Sandbox::User=root"] + glob.glob("/run/job/new/nbdblk_*.deb")
print(subprocess.check_output(apt + ["-o", "Dpkg::Use-Pty=0"], stderr=subprocess.STDOUT).decode())
assert h.pread(4096, 0) == b"u" * 4096
assert os.readlink(f"/proc/{pid}/exe") == "/usr/bin/nbdblk", os.readlink(f"/proc/{pid}/exe")
assert pid == subprocess.check_output(["systemctl", "show", "-P", "MainPID", "nbdblk"]).decode().strip()
END
python3 /tmp/upgrade.py
dpkg-query -W nbdblk
for unit in nbdblk.service nbdblk@a.service nbdblk@b.service; do systemctl is-active --quiet $unit; done
systemctl reload nbdblk
[ "$(nbdinfo --size "$a")" = 8388608 ]

step "a crash"
systemctl kill --signal=KILL nbdblk.service
[ "$(nbdinfo --size nbd://localhost)" = 67108864 ]

step "remove"
apt-get remove -qqy nbdblk > /tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"
[ -z "$(pgrep -x nbdblk)" ]
[ ! -e /run/nbdblk/a.sock ]
[ -e /etc/nbdblk/nbdblk.toml ]

step "purge"
apt-get purge -qqy nbdblk nbdkit-nbdblk-plugin > /tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"
systemctl daemon-reload
[ -z "$(systemctl list-units --plain --no-legend --all 'nbdblk*')" ] || fail "$(systemctl list-units --all 'nbdblk*')"
find / -xdev \( -path /var/log -o -path /var/cache -o -path /tmp -o -path /srv \) -prune -o -print | sort > /tmp/after
left=$(comm -13 /tmp/before /tmp/after | grep -v '^/var/lib/apt/' || true)
[ -z "$left" ] || fail "purge has left: $left"
[ ! -e /run/nbdblk ]
has nologin "$(getent passwd nbdblk)"
[ -z "$(systemctl --failed --plain --no-legend | grep nbdblk)" ]
step "done"
