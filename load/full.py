"""Fills a cluster: three replicas with different memory limits, and writers that never stop adding users.

The smallest replica reaches its limit after about three fifths of the time. From then on all three must reject new
users and accept updates. Samples the memory of each, whether the alert `GradestoreMemory` of dashboards/rules.yml would
have fired before the first rejection, and by how much the memory exceeded the limit. Then all three are killed at once
and must recover their data; deletes must free memory; and all must be equal. Exit code 1 if any check failed.

    tests/install-nats.sh
    cargo build --release
    python3 load/full.py --seconds 600

With --rate 0 the writers are as fast as possible, which shows the largest overshoot. The alert is not checked then,
because it waits for 15 s. The report is written to load/results/full.txt.
"""

import argparse
import http.client
import itertools
import json
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from drill import MIB, NAMES, Report, machine
from measure import AUTH, ROOT, SYNCS, Broker, Node, memory_mib

GROUP = 1000
WIDE = -(1 << 63)
# The memory of a record whose values cannot be packed, with its index slot; the fill rate is derived from it.
RECORD_BYTES = 70
FULL_AT = 0.6
ALERT_SHARE, ALERT_FOR_S = 0.85, 15
# The alert is made for fills that are slower than this.
ALERT_SECONDS_MIN = 600
SAMPLE_EVERY_S = 0.1
RECOVER_S_MAX = 120
DELETED_SHARE = 0.25
HEADERS = {"Authorization": f"Basic {AUTH}", "Content-Type": "application/x-ndjson"}


class Post:
    """A connection to a write port."""

    def __init__(self, node):
        self.connection = http.client.HTTPConnection(node.urls["write"].removeprefix("http://"), timeout=60)

    def __call__(self, body):
        """The status and body of a response."""
        self.connection.request("POST", "/set", body, HEADERS)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            # An early error response ends the connection.
            self.connection.close()
        return answer.status, json.loads(content) if content else {}


def lines(users):
    value = f'"postpaid_limit":{WIDE},"spp":{WIDE},"shipping_fee":{WIDE},"return_fee":{WIDE}}}\n'
    return "".join(f'{{"user_id":"user-{user}",{value}' for user in users)


class Writer(threading.Thread):
    """Writes new users through one replica, at a rate or as fast as possible, and continues after rejections."""

    def __init__(self, node, number, writers, rate):
        super().__init__(daemon=True)
        self.node, self.users, self.rate = node, itertools.count(number, writers), rate
        self.created, self.answers, self.first_rejection = [], Counter(), None
        self.stopped = threading.Event()

    def run(self):
        post, began = Post(self.node), time.monotonic()
        for sent in itertools.count(1):
            users = list(itertools.islice(self.users, GROUP))
            try:
                status, reply = post(lines(users))
            except OSError:
                status, reply, post = "none", {}, Post(self.node)
            self.answers[status] += 1
            if status == 200:
                self.created.append(users)
            elif status == 507:
                self.first_rejection = self.first_rejection or (time.monotonic(), reply["detail"])
            wait = began + sent * GROUP / self.rate - time.monotonic() if self.rate else 0
            if self.stopped.wait(max(wait, 0)):
                return


class Watch(threading.Thread):
    """Samples the memory of the replicas."""

    def __init__(self, nodes):
        super().__init__(daemon=True)
        self.nodes, self.samples, self.stopped = nodes, {name: [] for name in nodes}, threading.Event()

    def run(self):
        while not self.stopped.wait(SAMPLE_EVERY_S):
            for name, node in self.nodes.items():
                try:
                    status = node.status()
                except OSError:
                    continue
                self.samples[name].append((time.monotonic(), status["memory_used_bytes"], memory_mib(node.pid, "VmRSS"),
                                           status["full"], status["records"]))

    def stop(self):
        self.stopped.set()
        self.join()


def until(what, poll):
    """Polls until `poll` returns a value without a reason for waiting; returns the value and the time in seconds."""
    began = time.monotonic()
    while True:
        found, why_not = poll()
        if not why_not:
            return found, time.monotonic() - began
        if time.monotonic() - began > RECOVER_S_MAX:
            sys.exit(f"timed out after {RECOVER_S_MAX} s: {what}: {why_not}")
        time.sleep(0.05)


def equal(nodes):
    """The status of the replicas once all are at the same position."""
    def same():
        statuses = [node.status() for node in nodes]
        positions = {(each["position"], each["log_end"]) for each in statuses}
        return statuses, len(positions) > 1 and positions
    return until("one position", same)[0]


def publish_deletes(broker, batches):
    """Deletes users as another NATS client: one batch per message, one after the other."""
    with socket.create_connection(broker.address, timeout=60) as connection:
        incoming = connection.makefile("rb")
        connection.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB inbox 1\r\n')
        header = b"NATS/1.0\r\nGrade-Format: 1\r\n\r\n"
        for batch in batches:
            payload = json.dumps([{"delete": f"user-{user}"} for user in batch]).encode()
            head = f"HPUB grades.set inbox {len(header)} {len(header) + len(payload)}\r\n".encode()
            connection.sendall(head + header + payload + b"\r\n")
            while not (line := incoming.readline()).startswith(b"MSG"):
                if line == b"PING\r\n":
                    connection.sendall(b"PONG\r\n")
                if not line or line.startswith(b"-ERR"):
                    sys.exit(f"the broker returned {line}")
            ack = json.loads(incoming.readline())
            if "error" in ack:
                sys.exit(f"the broker returned {ack}")


def alert_lead_s(samples, max_bytes, rejected_at):
    """How long before `rejected_at` the alert fired, in seconds; negative if it did not."""
    since = None
    for at, used, *_ in samples:
        since = (since or at) if used > ALERT_SHARE * max_bytes else None
        if since and at - since >= ALERT_FOR_S:
            return rejected_at - at
    return -1


def run(report, args, directory, stack):
    machine(report, args, "load/full.py")
    broker = stack.enter_context(Broker(directory / "nats", args.sync))
    limits = dict(zip(NAMES, (args.memory_mib, args.memory_mib * 5 // 4, args.memory_mib * 3 // 2)))
    nodes = {}
    for name, mib in limits.items():
        (directory / name).mkdir()
        flags = ("--nats-url", broker.url, "--data-dir", directory / name / "data", "--memory-max", f"{mib}MiB",
                 "--snapshot-interval", "30s")
        nodes[name] = stack.enter_context(Node(directory / name, *flags))
    smallest, largest = NAMES[0], NAMES[-1]
    max_bytes = limits[smallest] * MIB
    idle = nodes[smallest].status()["memory_used_bytes"]
    rate = args.rate
    if rate is None:
        rate = (max_bytes - idle) / RECORD_BYTES / (FULL_AT * args.seconds)
    report(f"memory limits, MiB: {', '.join(f'{name} {mib}' for name, mib in limits.items())}; idle {idle / MIB:.0f}; "
           f"{args.writers} writers, {f'{rate:,.0f} new users a second' if rate else 'as fast as possible'}")

    watch = Watch(nodes)
    watch.start()
    through = itertools.cycle(list(nodes.values())[1:] if args.through_others else nodes.values())
    writers = [Writer(next(through), number, args.writers, rate / args.writers) for number in range(args.writers)]
    began = time.monotonic()
    for writer in writers:
        writer.start()
    time.sleep(args.seconds)
    # Updates of existing users must still be accepted.
    update = [Post(node)(lines(writers[0].created[0])) for node in nodes.values()]
    creates = [Post(node)(lines([-1]))[0] for node in nodes.values()]
    for writer in writers:
        writer.stopped.set()
    for writer in writers:
        writer.join()
    watch.stop()

    created = [batch for writer in writers for batch in writer.created]
    users = sum(map(len, created))
    first = min((writer.first_rejection for writer in writers if writer.first_rejection), default=None)
    alive = sum(node.child.poll() is None for node in nodes.values())
    statuses = equal(nodes.values())
    report(f"\n{users:,} users were created; the first rejection came after "
           f"{first[0] - began:.1f} s: {first[1]}" if first else "\nno write was rejected")
    answers = sum((writer.answers for writer in writers), Counter())
    report("answers by status: " + ", ".join(f"{count:,} x {status}" for status, count in answers.most_common()))
    report(f"{'replica':9} {'limit':>7} {'most in use':>12} {'most resident':>14}  MiB; records")
    most = {}
    for (name, node), status in zip(nodes.items(), statuses, strict=True):
        used, rss = (max(sample[n] for sample in watch.samples[name]) for n in (1, 2))
        most[name] = used
        report(f"{name:9} {limits[name]:7} {used / MIB:12.1f} {rss:14.1f}  {status['records']:,}, digest {status['digest']}")
    full_at = next((at for at, *_, full, _ in watch.samples[smallest] if full), None)
    if full_at and first:
        last_at = max((at for name in nodes for at, *_ in changes(watch.samples[name])), default=began)
        report(f"the {smallest} replica reported that it was full {full_at - began:.1f} s after the start; the last "
               f"user was created {last_at - full_at:.1f} s later")
    overshoot = (most[smallest] - max_bytes) / MIB
    report(f"overshoot of the {smallest} replica: {overshoot:.1f} MiB, {overshoot * MIB / max_bytes:.1%} of its limit")
    lead = alert_lead_s(watch.samples[smallest], max_bytes, first[0]) if first else -1
    report(f"the alert (above {ALERT_SHARE} for {ALERT_FOR_S} s) had fired {lead:.1f} s before the first rejection")

    if not first:
        return True

    # kill -9 of all at once.
    held = [(each["records"], each["digest"]) for each in statuses]
    for node in nodes.values():
        node.kill()
    for node in nodes.values():
        node.start()
    _, ready_s = until("ready", lambda: (None, [name for name, node in nodes.items() if not node.ready()]))
    back = [(each["records"], each["digest"]) for each in equal(nodes.values())]
    report(f"\nkilled all three; ready again after {ready_s:.1f} s with {back[0][0]:,} records; in use "
           + ", ".join(f"{node.status()['memory_used_bytes'] / MIB:.1f}" for node in nodes.values()) + " MiB")

    # Full again, then deletes free memory.
    numbers = itertools.count(args.writers * 10**9)
    watch = Watch(nodes)
    watch.start()
    post, refilled = Post(nodes[largest]), 0
    while (answer := post(lines(itertools.islice(numbers, GROUP))))[0] == 200:
        refilled += GROUP
    watch.stop()
    refilled_used = max(used for _, used, *_ in watch.samples[smallest])
    report(f"{refilled:,} more users until {answer[0]}; most in use on the {smallest} replica {refilled_used / MIB:.1f} MiB")
    overshoot = max(overshoot, (refilled_used - max_bytes) / MIB)
    deleted = created[:max(1, int(len(created) * DELETED_SHARE))]
    publish_deletes(broker, deleted)

    def created_one():
        answer = post(lines([next(numbers)]))
        return answer, answer[0] != 200 and (answer, [node.status() for node in nodes.values()])

    _, accepted_after_s = until("space", created_one)
    status = nodes[smallest].status()
    report(f"{sum(map(len, deleted)):,} users deleted; new users accepted {accepted_after_s:.1f} s later, in use "
           f"{status['memory_used_bytes'] / MIB:.1f} MiB, resident {status['memory_bytes'] / MIB:.1f} MiB")
    end = equal(nodes.values())
    report()
    missed = [
        report.demand("replicas that ended by themselves", len(nodes) - alive, "==", 0, 0),
        report.demand("writers with a rejected write", sum(bool(writer.first_rejection) for writer in writers),
                      "==", args.writers, 0),
        report.demand("replicas that reject a new user", creates.count(507), "==", 3, 0),
        report.demand("replicas that accept updates", [status for status, _ in update].count(200), "==", 3, 0),
        report.demand("overshoot, share of the limit", overshoot * MIB / max_bytes, "<=", args.overshoot_max),
        report.demand("replicas with other records after kill -9", sum(each != held[0] for each in held + back), "==", 0, 0),
        report.demand("replicas that differ in the end", len({each["digest"] for each in end}) - 1, "==", 0, 0),
    ]
    if rate and args.seconds >= ALERT_SECONDS_MIN:
        missed.append(report.demand("seconds from the alert to the first rejection", lead, ">=", 0, 1))
    return any(missed)


def changes(samples):
    """The samples in which the number of records has grown."""
    return [after for before, after in itertools.pairwise(samples) if after[4] > before[4]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--memory-mib", type=int, default=400, help="the smallest limit; the others are 5/4 and 3/2 of it")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--rate", type=float, help="new users a second; default: full after 0.6 of the time, 0: no limit")
    parser.add_argument("--through-others", action="store_true", help="write through the other replicas only")
    parser.add_argument("--overshoot-max", type=float, default=0.25, help="maximum overshoot as a share of the limit")
    parser.add_argument("--sync", choices=SYNCS, default="default", help="sync interval of nats-server")
    parser.add_argument("--dir", type=Path, default=ROOT / "target", help="parent of the data directories")
    parser.add_argument("--results", type=Path, default=ROOT / "load" / "results")
    parser.add_argument("--name", default="full", help="name of the report")
    args = parser.parse_args()

    # Stops all children, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report()
    with tempfile.TemporaryDirectory(prefix="full-", dir=args.dir) as directory, ExitStack() as stack:
        missed = run(report, args, Path(directory), stack)
    report.keep(args.results, args.name)
    sys.exit(missed)


if __name__ == "__main__":
    main()
