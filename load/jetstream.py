#!/usr/bin/env python3
"""Measures writes through the JetStream log against publishing one message per write, on one NATS server.

Starts nats-server, first with its default sync interval and then with `sync_interval: always`, and one node. In turns,
wrk writes grades over a number of connections, and `publish` (load/publish.rs) sends one message per write with as many
in flight, so that a slow minute of the machine affects both. Nothing is pinned: NATS, node and load share all cores.
Prints each round and the median of the rounds' ratios. Exit code 1 if a request failed or a goal was missed.

    tests/install-nats.sh
    cargo build --release -p gradestore -p gradestore-load
    python3 load/jetstream.py --rounds 5 --seconds 4

The data is in a new directory under --dir, which must be on a disk: on tmpfs `always` costs nothing. Needs wrk.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import BUILT, ROOT, SERVER, SYNCS, Broker, Node, Others, cpu_s, demand, last_line, says, wrk

# Goals for writes a second through the log, divided by the messages a second of `publish`: medians of the rounds'
# ratios.
DEMANDS = {("default", 64): 0.8, ("always", 64): 7, ("always", 256): 14}
SYNC_PROBES = 200


def publish(broker, in_flight, seconds):
    command = [BUILT / "publish", f"--nats-url={broker.url}", f"--in-flight={in_flight}",
               f"--seconds={seconds}"]
    row = last_line(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return row["messages"] / (row["duration_us"] / 1e6)


def written(broker, node, connections, args, seed):
    """One run of wrk, with the servers' CPU time and the number of writes per message."""
    def now():
        return (cpu_s(node.pid), cpu_s(broker.pid), node.metric("gradestore_batch_writes_sum"),
                node.metric("gradestore_batch_writes_count"))

    before = now()
    run = wrk("set.lua", node.urls["write"], seed, args, connections=connections)
    node_s, broker_s, patches, batches = (after - b for after, b in zip(now(), before, strict=True))
    return dict(run, node_us=node_s / run["requests"] * 1e6, broker_us=broker_s / run["requests"] * 1e6,
                batch=patches / batches)


def rounds(sync, connections, broker, node, args):
    print(f"\nsync {sync}, {connections} connections and messages in flight, {args.seconds} s a run")
    print("round     set/s  publish/s   ratio   p50 ms   p99 ms   writes a batch   node us a write   broker us   "
          "others' CPU")
    rows = []
    for n in range(1, args.rounds + 1):
        others = Others(broker, node)
        # Another tool goes first each time.
        if n % 2:
            run, rate = written(broker, node, connections, args, n), publish(broker, connections, args.seconds)
        else:
            rate, run = publish(broker, connections, args.seconds), written(broker, node, connections, args, n)
        rows.append((run["rate"], rate, run["rate"] / rate))
        print(f"{n:5} {run['rate']:9.0f} {rate:10.0f} {rows[-1][2]:7.2f} {run['p50_us'] / 1e3:8.2f} "
              f"{run['p99_us'] / 1e3:8.2f} {run['batch']:16.1f} {run['node_us']:17.1f} {run['broker_us']:11.1f} "
              f"{others.cores():13.2f}", flush=True)
    return rows


def sync_us(directory):
    """The median time to sync another 4 KiB of a file."""
    took = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(SYNC_PROBES):
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - began) * 1e6)
    return statistics.median(took)


def versions(directory):
    client = re.search(r'name = "async-nats"\nversion = "([^"]+)"', (ROOT / "Cargo.lock").read_text())[1]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(f"{says(SERVER, '--version')}, async-nats {client}, {says('wrk', '-v').split(' [')[0]}, "
          f"{platform.system()} {platform.release().split('-')[0]}")
    print(f"{os.cpu_count()} cores of {cpu}; a sync of the disk takes {sync_us(directory):.0f} us")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--connections", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--sync", choices=SYNCS, nargs="+", default=list(SYNCS))
    parser.add_argument("--dir", type=Path, default=ROOT / "target")
    sys.exit(measure(parser.parse_args()))


def measure(args):
    measured = {}
    with tempfile.TemporaryDirectory(prefix="jetstream-", dir=args.dir) as directory:
        directory = Path(directory)
        versions(directory)
        for sync in args.sync:
            with Broker(directory / sync, sync) as broker, Node(directory, "--nats-url", broker.url,
                                                               "--data-dir", directory / f"{sync}-node") as node:
                for connections in args.connections:
                    measured[sync, connections] = rounds(sync, connections, broker, node, args)

    def spread(values, digits):
        return f"{statistics.median(values):10.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"

    print(f"\nmedians (least..most) of {args.rounds} rounds")
    print(f"{'sync':8} {'connections':>11}  {'set/s':26}  {'publish/s':26}  {'ratio':26}")
    for (sync, connections), rows in measured.items():
        sets, published, ratios = zip(*rows, strict=True)
        print(f"{sync:8} {connections:11}  {spread(sets, 0):26}  {spread(published, 0):26}  {spread(ratios, 2):26}")
    failed = 0
    for key, rows in measured.items():
        if key in DEMANDS:
            ratio = statistics.median(row[2] for row in rows)
            name = f"/set over JetStream, sync {key[0]}, {key[1]} connections / as many publishes in flight, a second"
            failed |= demand(name, ratio, ">=", DEMANDS[key])
    return failed


if __name__ == "__main__":
    main()
