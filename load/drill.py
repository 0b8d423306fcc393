#!/usr/bin/env python3
"""The restore drill: wipes the disk of one of three replicas under load, and measures its recovery.

Starts nats-server and three replicas on free ports, fills them, and writes to and reads from two of them at a fixed rate
(load/steady.rs). The third is killed with kill -9, its disk is wiped, and it is started again. Reports the duration of
the recovery and its effect on the clients of the other two. At the end the writes stop, all three must be equal, and
every acknowledged write is read from the restored replica. Exit code 1 if a write is missing, replicas differ, or a goal
was missed.

    tests/install-nats.sh
    cargo build --release -p gradestore -p gradestore-load
    python3 load/drill.py --users 5000000 --writes-per-s 10000

The report and a chart are written to load/results/drill.txt and drill.svg, or to --results. All child processes end with
this one. Their data is removed, unless this process is killed.
"""

import argparse
import json
import os
import platform
import queue
import re
import shutil
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
from measure import (PASSWORD, PROGRAM, BUILT, ROOT, SERVER, SYNCS, Broker, Node, cpu_s, end_with_parent, machine_cpu_s,
                     own_cpu_s, says)

# The first goal applies from this size on: with a small store most of the time is the start.
DEMANDED_USERS, DEMANDED_WRITES_PER_S = 5_000_000, 10_000
READY_TO_LOCAL_MAX = 1.5  # the time until ready, to that from a file under the same load
RSS_PEAK_TO_STEADY_MAX = 1.3
# The share of writes that must be acknowledged in time, or the load was lower than requested.
RATE_MIN = 0.98
LOAD_QUIET = 1.5
SAMPLE_EVERY_S = 0.1
WARM_UP_S = 3
STEADY_OVER_S = 5
SHOWN_BEFORE_S = 8
ANSWER_S_MAX = 600
MIB = 1024 * 1024
NAMES = ("first", "second", "third")


class Report:
    """Prints and saves the report."""

    def __init__(self):
        self.lines = []

    def __call__(self, line=""):
        self.lines.append(line)
        print(line, flush=True)

    def demand(self, what, found, sign, bound, digits=2):
        met = {"<=": found <= bound, ">=": found >= bound, "==": found == bound}[sign]
        self(f"demand: {what} {sign} {bound}: {found:.{digits}f}, {'met' if met else 'MISSED'}")
        return not met

    def keep(self, results, name, picture=None):
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.txt").write_text("\n".join([*self.lines, ""]))
        if picture:
            (results / f"{name}.svg").write_text(picture)


class Load:
    """The process of `steady.rs` and its output."""

    def __init__(self, nodes, args):
        urls = [f"--{port}={node.urls[port]}" for node in nodes for port in ("write", "read")]
        self.child = subprocess.Popen(
            [BUILT / "steady", *urls, f"--users={args.users}", f"--writes-per-s={args.writes_per_s}",
             f"--reads-per-s={args.reads_per_s}"],
            env=dict(os.environ, GRADESTORE_PASSWORD=PASSWORD), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=end_with_parent)
        self.pid = self.child.pid
        self.seconds = []
        self.answers = queue.Queue()
        self.phase_began = time.monotonic()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.child.stdout:
            message = json.loads(line)
            if message["what"] == "second":
                self.seconds.append((time.monotonic(), message))
            else:
                self.answers.put(message)
        self.answers.put(None)

    def ask(self, command):
        self.child.stdin.write(command + "\n")
        self.child.stdin.flush()
        answer = self.answers.get(timeout=ANSWER_S_MAX)
        if answer is None:
            sys.exit("steady ended")
        return answer

    def phase(self, wait_s=0):
        """The measurements since the last call, after waiting for `wait_s`."""
        time.sleep(wait_s)
        began, self.phase_began = self.phase_began, time.monotonic()
        return dict(self.ask("phase"), seconds=self.phase_began - began)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


class Watch(threading.Thread):
    """Polls the state and memory of a node."""

    def __init__(self, node):
        super().__init__(daemon=True)
        self.node = node
        self.samples = []
        self.stopped = threading.Event()

    def run(self):
        due = time.monotonic()
        while not self.stopped.wait(max(0, due - time.monotonic())):
            due = max(due + SAMPLE_EVERY_S, time.monotonic())
            began = time.monotonic()
            try:
                status = self.node.status()
            except OSError:
                # It does not listen yet, or its log is being opened.
                status = None
            try:
                self.samples.append((began, status, self.node.rss_mib()))
            except (OSError, TypeError):
                pass  # It has just been started, or has ended.

    def stop(self):
        self.stopped.set()
        self.join()


class Cpu:
    """The CPU time of our processes from now on, in core seconds, and of everything else on the machine."""

    def __init__(self, ours):
        self.ours = ours
        self.before, self.all_before = self.now(), machine_cpu_s()
        self.began = time.monotonic()

    def now(self):
        used = {who: sum(cpu_s(each.pid) for each in of) for who, of in self.ours.items()}
        return used | {"this script": own_cpu_s()}

    def used(self, **new):
        """Including nodes that were started meanwhile."""
        used = {who: now - self.before[who] for who, now in self.now().items()}
        used |= {who.replace("_", " "): cpu_s(node.pid) for who, node in new.items()}
        return used | {"others": max(0, machine_cpu_s() - self.all_before - sum(used.values()))}

    def others_cores(self, used):
        return used["others"] / (time.monotonic() - self.began)


def rss_peak_mib(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def local_restore(directory, file, ours):
    """A node without a log that restores a file: seconds to ready, seconds of the restore, its core seconds, and the
    cores that others used meanwhile."""
    directory.mkdir(exist_ok=True)
    cpu = Cpu(ours)
    with Node(directory, "--ephemeral", "--restore-from", file) as node:
        ready_s = time.monotonic() - cpu.began
        used = cpu.used(node=node)
        restore_s = node.status()["restore"]["duration_s"]
        # It has no data to lose.
        node.kill()
    return ready_s, restore_s, used["node"], cpu.others_cores(used)


def same_position(nodes):
    """The status of each node once all are at the same position."""
    while True:
        statuses = [node.status() for node in nodes]
        positions = {(status["position"], status["log_end"]) for status in statuses}
        if len(positions) == 1 and not statuses[0]["lag"]:
            return statuses
        time.sleep(0.1)


def machine(report, args, script="load/drill.py"):
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    report(f"$ python3 {script} " + " ".join(sys.argv[1:]))
    report(f"{says(PROGRAM, '--version')} at {commit}, {says(SERVER, '--version')}, "
           f"{platform.system()} {platform.release().split('-')[0]}")
    report(f"{os.cpu_count()} cores of {cpu}, {int(memory) / MIB:.0f} GiB of memory; broker, replicas and load share them")
    load = os.getloadavg()[0]
    noise = "" if load < LOAD_QUIET else ": other processes use the machine, so the figures are worse"
    report(f"load average before: {load:.2f}{noise}")
    report(f"broker with sync_interval {SYNCS[args.sync]}")


def fill(report, args, directory, broker, stack):
    """Three replicas with the same records: one restored from a file, the others from its backup."""
    records = directory / "generated.csv.gz"
    began = time.monotonic()
    generate.write(records, args.users)
    report(f"\n{args.users:,} records generated in {time.monotonic() - began:.1f} s, "
           f"{records.stat().st_size / MIB:.0f} MiB of csv.gz")
    nodes = []
    for name in NAMES:
        (directory / name).mkdir()
        seed = ["--restore-from", records] if not nodes else []
        began = time.monotonic()
        node = stack.enter_context(Node(directory / name, "--nats-url", broker.url, "--data-dir",
                                             directory / name / "data", *seed))
        took_s = time.monotonic() - began
        report(f"{name} replica ready in {took_s:.2f} s, restored in {node.status()['restore']['duration_s']:.2f} s from "
               f"{'that, with its first snapshot written' if seed else 'a peer, without other load'}")
        nodes.append(node)
    return nodes


def drill(report, args, directory, stack):
    machine(report, args)
    broker = stack.enter_context(Broker(directory / "nats", args.sync))
    nodes = fill(report, args, directory, broker, stack)
    *others, lost = nodes
    load = stack.enter_context(Load(others, args))
    watches = [Watch(node) for node in others]
    for watch in watches:
        watch.start()
    phases = {}
    load.phase(WARM_UP_S)
    phases["before"] = load.phase(args.window)

    ours = {"the other two": others, "broker": [broker], "load": [load]}
    rounds = []
    for n in range(1, args.rounds + 1):
        killed = time.monotonic()
        lost.kill()
        shutil.rmtree(directory / NAMES[-1] / "data")
        file = directory / "backup.csv.gz"
        began = time.monotonic()
        subprocess.run([BUILT / "gradestore", "backup", "--from", others[0].urls["write"], "-o", file],
                       env=dict(os.environ, GRADESTORE_PASSWORD=PASSWORD), check=True, stderr=subprocess.DEVNULL)
        backup_s = time.monotonic() - began
        phases["backup taken, one replica down"] = load.phase()
        local = local_restore(directory / "local", file, ours)
        phases["restore from a file, one down"] = load.phase()
        load.phase(WARM_UP_S)

        cpu = Cpu(ours)
        started = cpu.began
        lost.start()
        watch = Watch(lost)
        watch.start()
        lost.until_ready()
        ready_s = time.monotonic() - started
        used = cpu.used(third_replica=lost)
        others_cores = cpu.others_cores(used)
        rounds.append((ready_s, others_cores, *local))
        if n < args.rounds:
            watch.stop()
            load.phase(WARM_UP_S)
    phases["during"] = load.phase()
    phases["after"] = load.phase(args.window)
    rss_peak = max(rss_peak_mib(lost.pid), *(rss for _, _, rss in watch.samples))

    load.ask("stop")
    watch.stop()
    for each in watches:
        each.stop()
    statuses = same_position(nodes)
    found = load.ask(f"check {lost.urls['read']}")
    local_quiet = local_restore(directory / "local", file, {**ours, "third": [lost]})

    at = Timeline(started, ready_s, watch, load)
    restore = at.restore
    rss_steady = statistics.median(rss for when, _, rss in watch.samples if when > watch.samples[-1][0] - STEADY_OVER_S)
    report("\nThe third replica loses its disk in each round. While it is down a node without a log restores the backup of a "
           "peer\nfrom a file, under the same load; then the third is started again. `others` is the CPU use of other "
           "processes, in cores.")
    report("round  file, s  others  replica, s  others  replica / file")
    for n, (replica_s, replica_others, until_s, _, _, file_others) in enumerate(rounds, 1):
        report(f"{n:5} {until_s:8.2f} {file_others:7.2f} {replica_s:11.2f} {replica_others:7.2f} {replica_s / until_s:15.2f}")
    ratio = statistics.median(replica_s / until_s for replica_s, _, until_s, *_ in rounds)
    report(f"median of the rounds' ratios: {ratio:.2f}. The rest of the report is about the last round.")
    report(f"\nThe third replica was killed with kill -9 and its disk was wiped. It was started {started - killed:.1f} "
           "s later.")
    report("\nstage                           seconds")
    for name, took_s in (("starting, requesting a backup", at.requesting_s), ("restoring", restore["duration_s"]),
                         ("catching up", ready_s - at.restored_s), ("ready after", ready_s)):
        report(f"{name:30} {took_s:8.2f}")
    rows = restore["rows"]
    report(f"\n{rows:,} rows, {restore['bytes'] / MIB:.0f} MiB: {rows / restore['duration_s']:,.0f} rows a second while "
           f"restoring, {rows / ready_s:,.0f} from start to ready")
    report(f"read of the log ahead: at most {at.most('buffered_batches'):,} batches, "
           f"{at.most('buffered_bytes') / 1024:,.0f} KiB")
    report(f"RSS: at most {rss_peak:.0f} MiB, steady {rss_steady:.0f} MiB (median of the last {STEADY_OVER_S} s); the other "
           f"replicas {' and '.join(f'{each.samples[-1][2]:.0f}' for each in watches)} MiB")
    cpu_by_process = ", ".join(f"{who} {core_s:.1f}" for who, core_s in used.items())
    report(f"CPU from start to ready, seconds: {cpu_by_process}")

    report(f"\nThe backup of a peer, taken in {backup_s:.2f} s, restored from a file into a node without a log; seconds")
    report("                               until ready  restore in it  its CPU  others' cores  third / this")
    for name, measured in (("under the same load", local), ("without load", local_quiet)):
        until_s, in_s, core_s, cores = measured
        report(f"{name:30} {until_s:11.2f} {in_s:14.2f} {core_s:8.2f} {cores:14.2f} {ready_s / until_s:13.2f}")
    report(f"{'the third replica':30} {ready_s:11.2f} {restore['duration_s']:14.2f} {used['third replica']:8.2f} "
           f"{others_cores:14.2f}")

    report(f"\n{'requests to the other two':41}   a second  errors   p50 ms   p99 ms   max ms")
    for kind in ("writes", "reads"):
        for name, phase in phases.items():
            row = phase[kind]
            ms = " ".join(f"{row[what] / 1e3:8.2f}" for what in ("p50_us", "p99_us", "max_us"))
            report(f"{kind:7}{name:34} {row['answered'] / phase['seconds']:10.0f} {row['errors']:7} {ms}")
    at.table(report)

    report("\nafter the last write")
    for name, status in zip(NAMES, statuses, strict=True):
        report(f"{name:7} position {status['position']}, {status['records']:,} records, digest {status['digest']}")
    report(f"{found['answered']:,} writes were acknowledged. They set {found['as_set'] + found['missing']:,} fields of "
           f"{found['users']:,} users; on the third replica {found['as_set']:,} are as set, {found['missing']} are not, "
           f"{found['doubtful']} hold a write with an unknown outcome")
    for line in found["shown"]:
        report(f"  {line}")

    report()
    rate = min(phase["writes"]["answered"] / phase["seconds"] for phase in phases.values() if phase["seconds"] > 1)
    if rate < RATE_MIN * args.writes_per_s:
        report(f"note: the replicas or the machine did not reach the write rate: {rate:.0f} a second in one phase")
    missed = [
        report.demand("replicas that differ", len({(status["records"], status["digest"]) for status in statuses}) - 1,
                      "==", 0, 0),
        report.demand("acknowledged writes that are missing", found["missing"], "==", 0, 0),
        report.demand("requests that failed", sum(phase[kind]["errors"] for phase in phases.values()
                                                  for kind in ("writes", "reads")), "==", 0, 0),
        report.demand("RSS at most / steady", rss_peak / rss_steady, "<=", RSS_PEAK_TO_STEADY_MAX),
    ]
    if args.users >= DEMANDED_USERS and args.writes_per_s >= DEMANDED_WRITES_PER_S:
        missed.append(report.demand("ready / restore from a file under the same load, median", ratio, "<=",
                                    READY_TO_LOCAL_MAX))
    else:
        report(f"ready / restore from a file: no goal below {DEMANDED_USERS:,} users and "
               f"{DEMANDED_WRITES_PER_S:,} writes a second")
    return any(missed), at.picture(args, rss_steady)


class Timeline:
    """The samples of the restored replica and of the others' clients, in seconds since its restart."""

    def __init__(self, started, ready_s, watch, load):
        self.ready_s = ready_s
        self.samples = [(when - started, status, rss) for when, status, rss in watch.samples]
        self.clients = [(when - started, row) for when, row in load.seconds]
        restores = [(when, status["restore"]) for when, status, _ in self.samples if status and status["restore"]]
        if not restores or "http" not in restores[-1][1]["source"]:
            sys.exit("the replica did not restore a peer's backup")
        self.restore = restores[-1][1]
        # A restore that was too short to be sampled counts as ending when the replica was ready.
        starts = [when - restore["duration_s"] for when, restore in restores if restore["stage"] == "restoring"]
        self.requesting_s = min([*starts, ready_s - self.restore["duration_s"]])
        self.restored_s = self.requesting_s + self.restore["duration_s"]

    def most(self, what):
        return max(status["restore"][what] for _, status, _ in self.samples if status and status["restore"])

    def table(self, report):
        report("\n     s  stage              rows  batches ahead      KiB  batches behind  RSS MiB  write p99 ms  read p99 ms")
        for second in range(int(self.samples[-1][0]) + 1):
            when, status, rss = min(self.samples, key=lambda sample: abs(sample[0] - second))
            _, client = min(self.clients, key=lambda each: abs(each[0] - second - 0.5))
            stage = stage_of(status)
            restore = status and status["restore"]
            rows, ahead, kib = (f"{restore['rows']:,}", f"{restore['buffered_batches']:,}",
                                f"{restore['buffered_bytes'] / 1024:,.0f}") if restore else ("", "", "")
            behind = f"{status['lag']:,}" if stage in ("catching-up", "ready") else ""
            report(f"{when:6.1f}  {stage:11} {rows:>11} {ahead:>14} {kib:>8} {behind:>15} {rss:8.0f} "
                   f"{(client['writes']['p99_us'] or 0) / 1e3:13.2f} {(client['reads']['p99_us'] or 0) / 1e3:12.2f}")

    def picture(self, args, rss_steady):
        known = [(when, status) for when, status, _ in self.samples if status]
        restores = [(when, status["restore"]) for when, status in known if status["restore"]]
        end = self.samples[-1][0]
        bands = [("starting", 0, self.requesting_s), ("restoring", self.requesting_s, self.restored_s),
                 ("catching up", self.restored_s, self.ready_s), ("ready", self.ready_s, end)]
        p99 = {kind: [(when, (row[kind]["p99_us"] or 0) / 1e3) for when, row in self.clients] for kind in ("writes", "reads")}
        return chart.draw(
            f"A replica restored beside {args.writes_per_s:,} writes a second, {args.users:,} users",
            (-SHOWN_BEFORE_S, end), bands,
            [("rows restored, million", {"": [(when, each["rows"] / 1e6) for when, each in restores]}),
             ("batches of the log", {
                 "read ahead, not applied": [(when, each["buffered_batches"]) for when, each in restores
                                             if when <= self.ready_s],
                 "behind the log's end": [(when, status["lag"]) for when, status in known
                                          if stage_of(status) in ("catching-up", "ready")]}),
             ("RSS of the replica, MiB", {"RSS": [(when, rss) for when, _, rss in self.samples],
                                          "steady": [(0, rss_steady), (end, rss_steady)]}),
             ("p99 of the other replicas' clients, ms", p99)])


def stage_of(status):
    if status is None:
        return "starting"
    if status["state"] == "ready" or not status["restore"]:
        return status["state"] if status["state"] == "ready" else "requesting"
    return "restoring" if status["restore"]["stage"] == "restoring" else "catching-up"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--writes-per-s", type=int, default=10_000)
    parser.add_argument("--reads-per-s", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3, help="how often the disk is wiped")
    parser.add_argument("--window", type=float, default=15, help="seconds measured before and after")
    parser.add_argument("--sync", choices=SYNCS, default="default", help="sync interval of nats-server")
    parser.add_argument("--dir", type=Path, default=ROOT / "target", help="parent of the data directories")
    parser.add_argument("--results", type=Path, default=ROOT / "load" / "results")
    args = parser.parse_args()

    # Stops all children, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report()
    with tempfile.TemporaryDirectory(prefix="drill-", dir=args.dir) as directory, ExitStack() as stack:
        missed, picture = drill(report, args, Path(directory), stack)
    report.keep(args.results, "drill", picture)
    sys.exit(missed)


if __name__ == "__main__":
    main()
