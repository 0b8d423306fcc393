#!/usr/bin/env python3
"""Opens thousands of idle and slow connections to a node, and measures other requests meanwhile.

Half of the connections send nothing, the other half send a request's header a byte at a time and never finish it.
Connections that the node closes are opened again. Meanwhile GET /get is sent on one keep-alive connection and on a new
one each time, and GET /metrics to the ops port. Exit code 1 if any of these failed.

    GRADESTORE_PASSWORD=secret python3 load/idle.py --pid "$(pgrep -x gradestore)"
"""

import argparse
import base64
import collections
import http.client
import multiprocessing
import os
import re
import resource
import selectors
import socket
import sys
import threading
import time
from pathlib import Path

USER_ID = "idle-probe"
GRADE = f'{{"user_id":"{USER_ID}","postpaid_limit":0,"spp":7,"shipping_fee":0,"return_fee":0}}'
SLOW_HEADER = f"GET /get?user_id={USER_ID} HTTP/1.1\r\nhost: localhost\r\nx-slow: ".encode()
TIMEOUT_S = 5
TICK_S = 0.05


class Probe(threading.Thread):
    """Sends one request repeatedly, and keeps the latencies."""

    def __init__(self, name, address, path, wanted, keep, every_s):
        super().__init__(daemon=True)
        self.title, self.address, self.path, self.wanted = name, address, path, wanted
        self.keep, self.every_s = keep, every_s
        self.took_ms, self.failures = [], []
        self.stopped = threading.Event()
        self.last_body = ""

    def run(self):
        connection = None
        while not self.stopped.wait(self.every_s):
            began = time.monotonic()
            try:
                connection = connection or http.client.HTTPConnection(self.address, timeout=TIMEOUT_S)
                connection.request("GET", self.path)
                answer = connection.getresponse()
                self.last_body = answer.read().decode()
                if answer.status != 200 or not re.search(self.wanted, self.last_body):
                    raise ValueError(f"{answer.status} {self.last_body[:200]}")
                if self.keep and answer.will_close:
                    raise ConnectionError("the node closed the keep-alive connection")
                self.took_ms.append((time.monotonic() - began) * 1e3)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                connection = None
            if connection and not self.keep:
                connection.close()
                connection = None

    def report(self):
        took_ms = sorted(self.took_ms) or [float("nan")]
        print(f"{self.title:24} answered {len(self.took_ms):6}  failed {len(self.failures):4}  "
              f"median {took_ms[len(took_ms) // 2]:7.1f} ms  worst {took_ms[-1]:7.1f} ms")
        for failure, times in collections.Counter(self.failures).most_common(5):
            print(f"  {times} times {failure}")
        return bool(self.failures) or not self.took_ms


def keep_connections_open(address, size, opens_per_s, byte_every_s, stop, opened, cut):
    """Keeps `size` connections open, every second one with a slow header."""
    selector = selectors.DefaultSelector()
    progress = {}  # slow connection: how much of its header went out
    due = collections.deque()  # slow connections, the one to send next first
    sent_share = opened_share = 0.0
    host, port = address.split(":")
    count = 0
    while not stop.is_set():
        tick_ends = time.monotonic() + TICK_S
        opened_share = min(opened_share + opens_per_s * TICK_S, size - len(selector.get_map()))
        while opened_share >= 1:
            opened_share -= 1
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex((host, int(port)))
            selector.register(client, selectors.EVENT_READ)
            if count % 2:
                progress[client] = 0
                due.append(client)
            count += 1
        opened.value = count

        sent_share += len(due) / byte_every_s * TICK_S
        while sent_share >= 1 and due:
            sent_share -= 1
            client = due.popleft()
            at = progress.get(client)
            if at is None:
                continue
            try:
                client.send(SLOW_HEADER[at:at + 1] or b"x")
                progress[client] = at + 1
            except OSError:
                pass  # Not connected yet, or closed: the selector reports which.
            due.append(client)

        for key, _ in selector.select(max(0, tick_ends - time.monotonic())):
            try:
                if key.fileobj.recv(4096):
                    continue
            except OSError:
                pass
            selector.unregister(key.fileobj)
            progress.pop(key.fileobj, None)
            key.fileobj.close()
            cut.value += 1
        time.sleep(max(0, tick_ends - time.monotonic()))


def set_probe_user(address, username, password):
    basic = base64.b64encode(f"{username}:{password}".encode()).decode()
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    connection.request("POST", "/set", f'{{"user_id":"{USER_ID}","spp":7}}',
                       {"Content-Type": "application/json", "Authorization": f"Basic {basic}"})
    answer = connection.getresponse()
    if answer.status != 204:
        sys.exit(f"POST /set: {answer.status} {answer.read().decode()}")


def rss_mib(pid):
    if not pid:
        return "not known without --pid"
    kib = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]
    return f"{int(kib) / 1024:.1f} MiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=30, help="how long all connections stay open")
    parser.add_argument("--opens", type=int, default=2_000, help="maximum number of connections opened per second")
    parser.add_argument("--byte-every", type=float, default=2, help="seconds between two bytes of a slow header")
    parser.add_argument("--write", default="127.0.0.1:8080", metavar="HOST:PORT")
    parser.add_argument("--read", default="127.0.0.1:8081", metavar="HOST:PORT")
    parser.add_argument("--ops", default="127.0.0.1:8082", metavar="HOST:PORT")
    parser.add_argument("--username", default="admin")
    parser.add_argument("--pid", type=int, help="process id of the node, to print its memory")
    args = parser.parse_args()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < args.connections + 100:
        sys.exit(f"{args.connections} connections need as many file descriptors; the limit is {hard}, see ulimit -n -H")

    set_probe_user(args.write, args.username, os.environ.get("GRADESTORE_PASSWORD", ""))
    path, wanted = f"/get?user_id={USER_ID}", re.escape(GRADE)
    probes = [
        Probe("GET /get, kept", args.read, path, wanted, True, 0.01),
        Probe("GET /get, new connection", args.read, path, wanted, False, 0.01),
        Probe("GET /metrics", args.ops, "/metrics", "gradestore_records", False, 0.25),
    ]
    print(f"RSS before {rss_mib(args.pid)}")
    stop = multiprocessing.Event()
    opened, cut = multiprocessing.Value("q"), multiprocessing.Value("q")
    # In its own process, so that Python's GIL does not slow the probes.
    opener = multiprocessing.Process(target=keep_connections_open, daemon=True, args=(
        args.read, args.connections, args.opens, args.byte_every, stop, opened, cut))
    for child in (opener, *probes):
        child.start()

    ends = time.monotonic() + args.connections / args.opens + args.seconds
    open_max = 0
    while time.monotonic() < ends:
        time.sleep(0.25)
        seen = re.search(r'gradestore_http_connections\{port="read"\} (\d+)', probes[-1].last_body)
        open_max = max(open_max, int(seen[1]) if seen else 0)
    print(f"RSS during {rss_mib(args.pid)}; {opened.value} connections opened, {cut.value} cut by the node, "
          f"at most {open_max} open at once")
    stop.set()
    opener.join()
    time.sleep(2)
    for probe in probes:
        probe.stopped.set()
        probe.join()
    print(f"RSS after  {rss_mib(args.pid)}")
    # All of them print their results before one fails.
    sys.exit(any([probe.report() for probe in probes]))


if __name__ == "__main__":
    main()
