#!/usr/bin/python3
"""Counts the instructions of nbdblk for each request, those of the kernel included.

usage: cargo xtask vm run --instructions -- xtask/vm/instructions.py PROGRAM [OTHER]

In that machine an instruction takes a nanosecond, so the processor time of a thread is the number of its instructions. With
OTHER, for example the program before a change, it also prints the quotient.
"""

import os
import subprocess
import sys
import time

import nbd

SOCKET = "/tmp/instructions.sock"
FILE = "/tmp/instructions.raw"
REQUESTS = 4000


def instructions(process):
    """Those of all threads of a process so far."""
    threads = f"/proc/{process}/task"
    return sum(int(open(f"{threads}/{thread}/schedstat").read().split()[0]) for thread in os.listdir(threads))


def read(client, count, depth):
    """Reads 4 KiB `count` times, with `depth` requests in flight."""
    if depth == 1:
        for n in range(count):
            client.pread(4096, n * 7919 % 2000 * 4096)
        return
    buffers = [nbd.Buffer(4096) for _ in range(depth)]
    flying = 0

    def done(_):
        nonlocal flying
        flying -= 1
        return 1

    for n in range(count):
        while flying == depth:
            client.poll(-1)
        client.aio_pread(buffers[n % depth], n * 7919 % 2000 * 4096, completion=done)
        flying += 1
    while flying:
        client.poll(-1)


def measure(program, device, depth):
    """Instructions of the server for each request."""
    server = subprocess.Popen([program, "serve", device, "-U", SOCKET, "--threads", "1"], stderr=subprocess.DEVNULL)
    while not os.path.exists(SOCKET):
        if server.poll() is not None:
            sys.exit(f"{program} serve {device} ended with status {server.returncode}")
        time.sleep(0.05)
    client = nbd.NBD()
    client.connect_unix(SOCKET)
    read(client, REQUESTS // 8, depth)
    before = instructions(server.pid)
    read(client, REQUESTS, depth)
    each = (instructions(server.pid) - before) / REQUESTS
    client.shutdown()
    server.terminate()
    server.wait()
    return each


def main(programs):
    if not 1 <= len(programs) <= 2:
        sys.exit(__doc__)
    with open(FILE, "wb") as file:
        file.write(bytes(16 << 20))
    for device in ["memory=64M", f"io_uring={FILE}"]:
        for depth in [1, 64]:
            counts = [measure(program, device, depth) for program in programs]
            quotient = f"  {counts[0] / counts[1]:.4f}" if len(counts) == 2 else ""
            name = device.partition("=")[0]
            print(f"{name:9} depth {depth:2}  {'  '.join(f'{count:6.0f}' for count in counts)}{quotient}", flush=True)


main(sys.argv[1:])
