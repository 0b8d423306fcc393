#!/usr/bin/env python3
"""Measures reads while a client creates users whose ids it chose for one shard.

Two new nodes get as many new users at a fixed rate, in one NDJSON body: ids chosen with a known hash (`chosen_ids.rs`), and ids without a
choice. Meanwhile other users are read at a fixed rate; the latency of a read counts from when it was due. Exit code 1 if
p99.9 is more than three times as long with the chosen ids.

    cargo build --locked --release --bins -p gradestore -p gradestore-load
    python3 load/chosen.py
"""

import argparse
import http.client
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse

import measure

READ_USERS = 1000
CHUNK_S = 0.01
RATIO_MAX = 3


def address(node, port):
    return urllib.parse.urlsplit(node.urls[port]).netloc


def post(node, body):
    connection = http.client.HTTPConnection(address(node, "write"), timeout=600)
    connection.request("POST", "/set", body, {
        "Authorization": f"Basic {measure.AUTH}", "Content-Type": "application/x-ndjson"})
    answer = connection.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        sys.exit(f"POST /set: {answer.status} {text}")
    return json.loads(text)["accepted"]


def paced(body, lines_per_s):
    """The lines of `body` in chunks, each at its due time."""
    lines = body.splitlines(keepends=True)
    size, due = int(lines_per_s * CHUNK_S), time.monotonic()
    for at in range(0, len(lines), size):
        due += CHUNK_S
        time.sleep(max(0, due - time.monotonic()))
        yield b"".join(lines[at:at + size])


def read(host, per_s, stop, sender):
    """Reads one user after the other, each at its due time. Sends the latencies in ms."""
    name, port = host.split(":")
    with socket.create_connection((name, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        took_ms, due = [], time.monotonic()
        while not stop.is_set():
            due += 1 / per_s
            time.sleep(max(0, due - time.monotonic()))
            connection.sendall(b"GET /get?user_id=read-%d HTTP/1.1\r\nhost: node\r\n\r\n" % (len(took_ms) % READ_USERS))
            answer = connection.recv(4096)
            if not answer.startswith(b"HTTP/1.1 200"):
                sys.exit(f"GET /get: {answer.decode()}")
            took_ms.append((time.monotonic() - due) * 1e3)
    sender.send(took_ms)


def quantile(ordered, share):
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def turn(lines, args):
    """p99.9 of the reads, in ms."""
    with tempfile.TemporaryDirectory() as directory, measure.Node(directory, "--ephemeral") as node:
        post(node, "".join(f'{{"user_id":"read-{n}","spp":1}}\n' for n in range(READ_USERS)).encode())
        stop = multiprocessing.Event()
        receiver, sender = multiprocessing.Pipe(duplex=False)
        # In its own process, so that the upload does not delay it.
        reader = multiprocessing.Process(target=read, args=(address(node, "read"), args.reads_per_s, stop, sender))
        reader.start()
        began = time.monotonic()
        accepted = post(node, paced(lines, args.writes_per_s))
        took_s = time.monotonic() - began
        stop.set()
        took_ms = sorted(receiver.recv())
        reader.join()
    p999, most = quantile(took_ms, 0.999), took_ms[-1]
    print(f"{accepted:>9}  {took_s:6.1f}  {len(took_ms):7}  {quantile(took_ms, 0.5):7.2f}  {p999:7.2f}  {most:7.2f}", end="", flush=True)
    return p999


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2_000_000)
    parser.add_argument("--writes-per-s", type=int, default=100_000)
    parser.add_argument("--reads-per-s", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    generator = measure.BUILT / "chosen_ids"
    chosen = subprocess.run([generator, str(args.users)], check=True, capture_output=True).stdout
    others = "".join(f'{{"user_id":"{n:013}","postpaid_limit":1}}\n' for n in range(args.users)).encode()
    print("new users  upload s    reads  p50 ms  p99.9 ms  most ms  ids")
    ratios = []
    for _ in range(args.rounds):
        of_chosen = turn(chosen, args)
        print("  chosen")
        of_others = turn(others, args)
        print("  in order")
        ratios.append(of_chosen / of_others)
    what = "p99.9 of reads with chosen ids / with ids in order"
    return measure.demand(what, statistics.median(ratios), "<=", RATIO_MAX)


if __name__ == "__main__":
    sys.exit(main())
