# The job's unit runs this: it connects the job with the host, runs it, and powers the machine off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
for port in /sys/class/virtio-ports/*; do
    read -r name < "$port/name"
    eval "port_$name=/dev/${port##*/}"
done
# A port opens once only.
exec 3> "$port_control" 4> "$port_out" 5> "$port_err"
read -r uptime _ < /proc/uptime
echo "ready systemd=$uptime" >&3
timeout -k 5 "$(cat /run/job/seconds)" bash /run/job/job.sh < /dev/null >&4 2>&5 3>&- 4>&- 5>&-
echo "status $?" >&3
echo o > /proc/sysrq-trigger
sleep 60
