#!/usr/bin/env python3
"""The soak test: three replicas under mixed load with periodic faults; no write may be lost and nothing may grow.

Starts nats-server and three replicas on free ports, fills them, and writes to and reads from all of them at a fixed
rate (load/steady.rs). Now and then it fetches and verifies a backup. Random faults are injected (load/faults.py), and
the resources of each process are sampled (load/watch.py). At the end all replicas must be ready and equal, hold every
acknowledged write, and use no more than before: the median of the last quarter is compared with that of the second one,
excluding the first minute of each process; for NATS the storage per write. The first replica is never stopped, so that
a slow leak shows. Exit code 1 if any check failed.

    tests/install-nats.sh
    cargo build --release -p gradestore -p gradestore-load
    python3 load/soak.py --seconds 3600

The report and a chart are written to load/results/soak.txt and soak.svg, or to --results. All child processes end with
this one. Their data is removed, unless this process is killed.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import chart
import generate
from drill import NAMES, Load, Report, machine
from faults import Faults, Proxy, Replica
from measure import PASSWORD, BUILT, ROOT, SYNCS, Broker, Node, own_cpu_s
from watch import BROKERS, SETTLED_AFTER_S, WHAT, Watch, thinned

GROWTH_MAX = 1.1
# Smaller increases are ignored: file descriptors, threads, or MiB.
GROWTH_IGNORED = 2
BACKUP_EVERY_S = 20
RECOVER_S_MAX = 120
POLL_EVERY_S = 0.1
# The connection over which another replica copied a backup is kept for 75 s.
CLOSED_S_MAX = 90
FILES_SHOWN_MAX = 300
P99_SHOWN_MS_MAX = 50


class Backups(threading.Thread):
    """Fetches a backup now and then, and verifies it."""

    def __init__(self, replicas, file, seed):
        super().__init__(daemon=True)
        self.replicas, self.file, self.random = replicas, file, random.Random(seed)
        self.verified, self.failed, self.invalid = 0, 0, []
        self.stopped = threading.Event()

    def run(self):
        environment = dict(os.environ, GRADESTORE_PASSWORD=PASSWORD)
        while not self.stopped.wait(BACKUP_EVERY_S):
            url = self.random.choice(self.replicas).node.urls["write"]
            taken = subprocess.run([BUILT / "gradestore", "backup", "--from", url, "-o", self.file], env=environment,
                                   capture_output=True)
            if taken.returncode:
                self.failed += 1  # A fault aborted it, and the command reported that.
                continue
            verify = subprocess.run([BUILT / "gradestore", "verify", self.file], capture_output=True, text=True)
            if verify.returncode:
                self.invalid.append(verify.stderr)
            else:
                self.verified += 1

    def stop(self):
        self.stopped.set()
        self.join()


def fill(args, directory, broker, stack):
    """Three replicas with the same records: one restored from a file, the others from its backup."""
    records = directory / "generated.csv.gz"
    generate.write(records, args.users)
    replicas = []
    for name in NAMES:
        (directory / name).mkdir()
        proxy = Proxy(broker.address)
        data = directory / name / "data"
        seed = ["--restore-from", records] if not replicas else []
        node = stack.enter_context(Node(directory / name, "--nats-url", proxy.url, "--data-dir", data,
                                        "--log-retention", args.log_retention,
                                        "--snapshot-interval", args.snapshot_interval, *seed))
        replicas.append(Replica(name, node, proxy, data))
    return replicas


def until_ready(replicas, since):
    """Waits until every replica accepts writes; returns the time in seconds."""
    while not all(replica.node.ready() for replica in replicas):
        for replica in replicas:
            if replica.node.child.poll() is not None:
                sys.exit(f"the {replica.name} replica ended: {replica.node.log.read_text()[-2000:]}")
        if time.monotonic() - since > RECOVER_S_MAX:
            statuses = [(replica.name, replica.node.ask("/status")) for replica in replicas]
            sys.exit(f"not ready after {RECOVER_S_MAX} s: {statuses}")
        time.sleep(0.05)
    return time.monotonic() - since


def strike(args, replicas, faults, watchers, began):
    """Injects the faults at their times; returns their descriptions."""
    struck = []
    for due in range(args.fault_every, args.seconds - args.fault_every + 1, args.fault_every):
        time.sleep(max(0, began + due - time.monotonic()))
        if not all(thread.is_alive() for thread in watchers):
            sys.exit("a thread that watches the replicas has ended")
        kind, whom = faults.next()
        at = time.monotonic() - began
        more = faults.strike(kind, whom)
        over = time.monotonic()
        recovered_s = until_ready(replicas, over)
        struck.append({"kind": kind, "at": at, "over": over - began, "recovered_s": recovered_s})
        who = f"{whom.name} replica" if whom else "broker"
        print(f"{at:7.1f} s  {kind:12} {who:15} {more:34} over after {over - began - at:5.1f} s, all ready "
              f"{recovered_s:6.2f} s later", flush=True)
    time.sleep(max(0, began + args.seconds - time.monotonic()))
    return struck


def settle(replicas):
    """The status of each replica once all are at the same position."""
    deadline = time.monotonic() + RECOVER_S_MAX
    while True:
        statuses = [replica.node.status() for replica in replicas]
        same = len({(status["position"], status["log_end"]) for status in statuses}) == 1
        if same and not statuses[0]["lag"] and all(status["state"] == "ready" for status in statuses):
            return statuses
        if time.monotonic() > deadline:
            sys.exit(f"not at the same position after {RECOVER_S_MAX} s: {statuses}")
        time.sleep(POLL_EVERY_S)


def left_open(replica):
    """Open client connections after all clients have disconnected: polled until there are none."""
    deadline = time.monotonic() + CLOSED_S_MAX
    while True:
        still = sum(int(replica.node.metric(f'gradestore_http_connections{{port="{port}"}}'))
                    for port in ("write", "read"))
        if not still or time.monotonic() > deadline:
            return still
        time.sleep(0.1)


def report_faults(report, struck):
    report("\nfault         times  all ready again after, s: median   most")
    for kind in Faults.KINDS:
        took_s = [each["recovered_s"] for each in struck if each["kind"] == kind]
        if took_s:
            report(f"{kind:13} {len(took_s):5} {statistics.median(took_s):34.2f} {max(took_s):6.2f}")


def report_growth(report, watch, load, seconds):
    """Prints the medians of each quarter; returns the missed goals."""
    quarters = [(seconds * n / 4, seconds * (n + 1) / 4) for n in range(4)]
    report(f"\nmedians of each quarter of the time, without the first {SETTLED_AFTER_S} s of each process")
    report(f"{'process':8}{'':18} {'1st':>8} {'2nd':>8} {'3rd':>8} {'4th':>8}  4th / 2nd")
    missed = []
    for name in watch.samples:
        processes, longest_s = watch.lives(name)
        report(f"{name}: {processes} process{'es' if processes > 1 else ''}, the longest sampled for "
               f"{longest_s / 60:.0f} min")
        demanded = BROKERS if name == "broker" else WHAT
        for what, key in demanded.items():
            medians = [watch.settled(name, key or WHAT[what], *quarter) for quarter in quarters]
            before, after = medians[1], medians[3]
            columns = " ".join("       -" if median is None else f"{median:8.1f}" for median in medians)
            if not key:
                report(f"{'':8}{what:19}{columns}")
                continue
            if before is None or after is None:
                report(f"{'':8}{what:19}{columns}  too few samples")
                missed.append(True)
                continue
            ratio = after / before if before else 1
            flat = ratio <= GROWTH_MAX or after - before <= GROWTH_IGNORED
            report(f"{'':8}{what:19}{columns} {ratio:10.3f}{'' if flat else '  GROWS'}")
            missed.append(not flat)
    around = {"load average of the machine": watch.load_averages}
    for kind in ("writes", "reads"):
        for what in ("p50_us", "p99_us"):
            title = f"{kind}, {what[:3]} of a second, ms"
            around[title] = [(when - watch.began, row[kind][what] / 1e3) for when, row in load.seconds if row[kind][what]]
    for title, points in around.items():
        medians = [statistics.median(value for at, value in points if begin <= at < end) for begin, end in quarters]
        report(f"{title:27}" + " ".join(f"{median:8.2f}" for median in medians))
    report("\nmetrics of the nodes, median and maximum: in the 2nd quarter, in the 4th")
    for name in NAMES:
        parts = []
        for key in ("connections", "requests", "queued", "buffered", "backups"):
            (was, was_most), (now, now_most) = (watch.median_and_max(name, key, *quarters[n]) for n in (1, 3))
            parts.append(f"{key} {was:.0f} {was_most:.0f}, {now:.0f} {now_most:.0f}")
        report(f"{name:8}{'; '.join(parts)}")
    return missed


def picture(args, watch, load, struck, began):
    panels = [
        ("RSS of the replicas, MiB", watch.lines(NAMES, "rss_mib")),
        ("RSS of the broker, MiB", watch.lines(["broker"], "rss_mib")),
        (f"file descriptors (cut off above {FILES_SHOWN_MAX})",
         watch.lines(watch.samples, "files", FILES_SHOWN_MAX)),
        ("threads", watch.lines(watch.samples, "threads")),
        ("data directories of the replicas, MiB", watch.lines(NAMES, "disk_mib")),
        ("stream of the broker, MiB", watch.lines(["broker"], "disk_mib")),
    ]
    for title, combine, value in (
            ("answered a second", statistics.mean, lambda row: row["answered"]),
            (f"p99 of the clients, ms (cut off above {P99_SHOWN_MS_MAX})", statistics.median,
             lambda row: min((row["p99_us"] or 0) / 1e3, P99_SHOWN_MS_MAX))):
        panels.append((title, {kind: thinned([((when - began) / 60, value(row[kind])) for when, row in load.seconds],
                                             combine) for kind in ("writes", "reads")}))
    marks = {kind: [(each["at"] / 60, (each["over"] + each["recovered_s"]) / 60) for each in struck
                    if each["kind"] == kind] for kind in Faults.KINDS}
    return chart.draw(f"A fault every {args.fault_every} s under {args.writes_per_s:,} writes and {args.reads_per_s:,} "
                      f"reads a second", (0, args.seconds / 60), [], panels, axis="minutes", marks=marks)


def soak(report, args, directory, stack):
    machine(report, args, "load/soak.py")
    report(f"log retention {args.log_retention}, snapshots every {args.snapshot_interval}, {args.users:,} users, seed {args.seed}")
    broker = stack.enter_context(Broker(directory / "nats", args.sync))
    replicas = fill(args, directory, broker, stack)
    load = stack.enter_context(Load([replica.node for replica in replicas], args))
    began = time.monotonic()
    processes = {replica.name: (replica.node, replica.data) for replica in replicas} | {"broker": (broker, broker.store)}
    watch = Watch(processes, began)
    watch.start()
    backups = Backups(replicas, directory / "backup.csv.gz", args.seed)
    backups.start()
    struck = strike(args, replicas, Faults(replicas, broker, random.Random(args.seed)), (watch, backups), began)
    own_s = own_cpu_s()
    backups.stop()
    watch.stop()
    done = load.ask("stop")
    ready_s = until_ready(replicas, time.monotonic())
    statuses = settle(replicas)
    found = [load.ask(f"check {replica.node.urls['read']}") for replica in replicas]
    load.__exit__()
    still_open = [left_open(replica) for replica in replicas]

    report_faults(report, struck)
    missed = report_growth(report, watch, load, args.seconds)
    report(f"\nbackups: {backups.verified} verified, {backups.failed} aborted with an error, "
           f"{len(backups.invalid)} invalid")
    for error in backups.invalid[:5]:
        report(f"  {error}")
    for kind in ("writes", "reads"):
        row = done[kind]
        report(f"{kind}: {row['answered']:,} succeeded and {row['errors']:,} failed during the faults; p50 "
               f"{row['p50_us'] / 1e3:.2f} ms, p99 {row['p99_us'] / 1e3:.2f} ms, at most {row['max_us'] / 1e3:.0f} ms")
    report(f"this script and its proxies used {own_s / args.seconds:.2f} cores")
    report(f"\nafter the last write all were ready in {ready_s:.2f} s")
    for replica, status, held in zip(replicas, statuses, found, strict=True):
        report(f"{replica.name:7} position {status['position']}, {status['records']:,} records, digest "
               f"{status['digest']}; {held['answered']:,} writes were acknowledged: {held['as_set']:,} "
               f"fields are as set, {held['doubtful']} hold a write with an unknown outcome, {held['missing']} are missing")
        for line in held["shown"]:
            report(f"  {line}")
    report()
    missed += [
        report.demand("metrics that grow", sum(missed), "==", 0, 0),
        report.demand("replicas that differ", len({(status["records"], status["digest"]) for status in statuses}) - 1,
                      "==", 0, 0),
        report.demand("acknowledged writes that are missing", sum(each["missing"] for each in found), "==", 0, 0),
        report.demand("invalid backups", len(backups.invalid), "==", 0, 0),
        report.demand("connections open after their clients have disconnected", sum(still_open), "==", 0, 0),
    ]
    return any(missed), picture(args, watch, load, struck, began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--fault-every", type=int, default=30, help="seconds")
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--writes-per-s", type=int, default=2000)
    parser.add_argument("--reads-per-s", type=int, default=4000)
    parser.add_argument("--log-retention", default="3m")
    parser.add_argument("--snapshot-interval", default="30s")
    parser.add_argument("--seed", type=int, default=1, help="seed of the faults")
    parser.add_argument("--sync", choices=SYNCS, default="default", help="sync interval of nats-server")
    parser.add_argument("--dir", type=Path, default=ROOT / "target", help="parent of the data directories")
    parser.add_argument("--results", type=Path, default=ROOT / "load" / "results")
    args = parser.parse_args()

    # Stops all children, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=args.dir) as directory, ExitStack() as stack:
        missed, drawn = soak(report, args, Path(directory), stack)
    report.keep(args.results, "soak", drawn)
    sys.exit(missed)


if __name__ == "__main__":
    main()
