#!/usr/bin/env python3
"""Measures the cost of reads that wait for a position for a write.

One connection sends one write after the other, in turns with and without reads that wait for a `Grade-Position` that is
not reached. The readers' connections stay open, so only the waiting differs. A turn's result is the node's CPU time per
write; a ratio is of two consecutive turns. Finally all readers request a position far past the end of the log. Exit
code 1 if the median ratio is above the goal.

    cargo build --locked --release --bin gradestore
    python3 load/waiters.py
"""

import argparse
import resource
import selectors
import socket
import statistics
import sys
import tempfile
import time
import urllib.parse

import measure

# Within the distance that a node waits for, and never reached here.
AHEAD = 900_000
FARTHEST = 2 ** 64 - 1
RATIO_MAX = 1.2


def connect(node, port):
    url = urllib.parse.urlparse(node.urls[port])
    connection = socket.create_connection((url.hostname, url.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def turn(node, writer, seconds):
    """Writes for some seconds; returns the node's CPU time per write in microseconds, and writes a second."""
    body = b'{"user_id":"waiters","spp":1}'
    request = (f"POST /set HTTP/1.1\r\nhost: localhost\r\nauthorization: Basic {measure.AUTH}\r\n"
               f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n").encode() + body
    writes, began, cpu = 0, time.monotonic(), measure.cpu_s(node.pid)
    while time.monotonic() < began + seconds:
        writer.sendall(request)
        answer = writer.recv(4096)
        if not answer.startswith(b"HTTP/1.1 204"):
            sys.exit(f"POST /set: {answer.decode()}")
        writes += 1
    cpu = measure.cpu_s(node.pid) - cpu
    return cpu / writes * 1e6, writes / (time.monotonic() - began)


def ask(readers, position):
    request = f"GET /get?user_id=waiters HTTP/1.1\r\nhost: localhost\r\ngrade-position: {position}\r\n\r\n".encode()
    for reader in readers:
        reader.sendall(request)


def await_rejections(readers):
    """Reads a response from each, which must be 503; returns the seconds until the last one."""
    began = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                answer = key.fileobj.recv(4096)
                if b"position-not-reached" not in answer or not answer.startswith(b"HTTP/1.1 503"):
                    sys.exit(f"GET /get: {answer.decode()}")
                selector.unregister(key.fileobj)
    return time.monotonic() - began


def waiting(node):
    # Without the request for the metrics itself.
    return node.metric("gradestore_http_requests_in_flight") - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiters", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.5, help="duration of a turn; all reads must wait until its end")
    parser.add_argument("--disk", action="store_true", help="use the log on disk instead of the one in memory")
    parser.add_argument("--no-farthest", action="store_true", help="skip the last part")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--data-dir", f"{directory}/data"] if args.disk else ["--ephemeral"]
        with measure.Node(directory, *flags) as node:
            readers = [connect(node, "read") for _ in range(args.waiters)]
            writer = connect(node, "write")
            turn(node, writer, args.seconds)
            print(f"{'round':>5}  {'us a write':>10}  {'with waiters':>12}  {'ratio':>5}  {'writes/s':>8}  {'with waiters':>12}", flush=True)
            for number in range(1, args.rounds + 1):
                cpu, rate = turn(node, writer, args.seconds)
                ask(readers, node.status()["position"] + AHEAD)
                while waiting(node) < args.waiters:
                    time.sleep(0.02)
                cpu_with, rate_with = turn(node, writer, args.seconds)
                if waiting(node) < args.waiters:
                    sys.exit("reads were answered before the turn ended: try fewer --seconds")
                await_rejections(readers)
                ratios.append(cpu_with / cpu)
                print(f"{number:5}  {cpu:10.1f}  {cpu_with:12.1f}  {ratios[-1]:5.2f}  {rate:8.0f}  {rate_with:12.0f}", flush=True)
            if not args.no_farthest:
                ask(readers, FARTHEST)
                took_s = await_rejections(readers)
                print(f"{args.waiters} reads with Grade-Position {FARTHEST}: the last 503 arrived {took_s:.2f} s after "
                      "the last request")
    what = f"CPU of a write with {args.waiters} waiting reads / without"
    return measure.demand(what, statistics.median(ratios), "<=", RATIO_MAX)


if __name__ == "__main__":
    sys.exit(main())
