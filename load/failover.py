#!/usr/bin/env python3
"""Measures the effect of a failover of the NATS cluster on the clients of the replicas.

Starts three nats-servers and three replicas on a stream of --replicas 3, and writes at a fixed rate to all replicas;
each write has its due time, whether or not earlier ones have been answered. In each run one fault hits a server:

    kill        kill -9 of the server of the stream leader
    term        SIGTERM to it
    lame-duck   SIGUSR2 to it: it transfers its leadership, then disconnects its clients
    frozen      SIGSTOP to it, SIGCONT 15 s later
    isolated    the routes of a follower are cut for 15 s; its clients still reach it

Each run reports, in seconds since the fault:

    leader      when the stream had a leader again and kept it, according to STREAM.INFO on the other servers
    first acknowledged, after, pause
                when each replica acknowledged a write after its longest pause; how long the last of them took after the
                stream had a leader; the longest pause
    failed      failed writes of the 30 s after the fault, by status
    longest     the longest time from sending a write to its acknowledgement
    reconnects  of each replica
    consumers   the largest number of consumers at one time
    log lines   of each replica

A run in which NATS had no leader for more than 9 s is reported and not counted. At the end all replicas must be equal
and hold every acknowledged write. Exit code 1 if they do not, or a goal was missed.

    tests/install-nats.sh
    cargo build --release
    python3 load/failover.py --runs 20
    python3 load/failover.py --runs 5 term lame-duck frozen isolated

The report is written to load/results/failover.txt, or to --results; not with --only-print.
"""

import argparse
import asyncio
import json
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

from drill import NAMES, Report, machine
from measure import AUTH, ROOT, SYNCS, Node
from servers import SERVERS, Client, Servers, consumer_names, settled, stream_info

WARM_UP_S = 2
WATCHED_S = 30
STRUCK_S = 15
ASK_EVERY_S = 0.05
ASK_S_MAX = 0.5
EQUAL_S_MAX = 60
# So many that a user is written again only after the previous write has failed or been acknowledged.
USERS = 50_000
IDS_A_REQUEST = 500
LEADER_S_MAX = 9
# A leader that no server reports for this long does not count.
UNNAMED_S_MAX = 1
SENT_MIN = 0.95
FAILED_MAX = 0.01
ACCEPT_S_MAX = 0.5
RECONNECTS_MAX = 10
# The share of the counted runs that must meet each goal.
RUNS_MET_MIN = 0.95
MODES = ("kill", "term", "lame-duck", "frozen", "isolated")
# Faults that leave the stream without a leader until an election.
LEADERLESS = ("kill", "frozen")
NO_FAILED_WRITE = ("term", "lame-duck")
GONE_AFTER_S = 0.5


class Write:
    def __init__(self, number, replica, sent):
        self.number, self.replica, self.sent = number, replica, sent
        self.ended, self.outcome, self.response = None, None, ""


class Load:
    """Writes at a fixed rate, round robin over the replicas."""

    def __init__(self, nodes, args):
        self.addresses = [node.urls["write"].removeprefix("http://").split(":") for node in nodes]
        self.args = args
        self.idle = [[] for _ in nodes]
        self.writes = []
        self.running = set()
        self.stopped = False

    async def run(self):
        due = time.monotonic()
        while not self.stopped:
            write = Write(
                len(self.writes), len(self.writes) % len(self.addresses), time.monotonic()
            )
            self.writes.append(write)
            task = asyncio.create_task(self.send(write))
            self.running.add(task)
            task.add_done_callback(self.running.discard)
            due += 1 / self.args.writes_per_s
            await asyncio.sleep(max(0, due - time.monotonic()))

    async def stop(self):
        self.stopped = True
        while self.running:
            await asyncio.wait(set(self.running))

    async def send(self, write):
        body = json.dumps({"user_id": f"user-{write.number % USERS}", "spp": write.number})
        request = (
            f"POST /set HTTP/1.1\r\nhost: localhost\r\nauthorization: Basic {AUTH}\r\n"
            f"content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}"
        ).encode()
        try:
            async with asyncio.timeout(self.args.client_timeout):
                write.outcome, write.response = await self.exchange(write.replica, request)
        except TimeoutError:
            write.outcome = "timeout"
        except (OSError, EOFError) as error:
            write.outcome, write.response = "connection", str(error)
        write.ended = time.monotonic()

    async def exchange(self, replica, request):
        # The replica closes connections that were idle for long.
        while self.idle[replica] and self.idle[replica][-1][0].at_eof():
            self.idle[replica].pop()[1].close()
        streams = self.idle[replica].pop() if self.idle[replica] else None
        reader, writer = streams or await asyncio.open_connection(*self.addresses[replica])
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head.lower():
            writer.close()
        else:
            self.idle[replica].append((reader, writer))
        return int(head.split(b" ", 2)[1]), body.decode()


class ClusterWatch:
    """The stream leader as each server reports it, and the number of consumers."""

    def __init__(self, servers):
        self.leaders, self.consumers, self.asking = [], [], []
        for server in servers:
            self.asking.append(asyncio.create_task(self.poll(server, stream_info(), self.leader)))
            self.asking.append(
                asyncio.create_task(self.poll(server, consumer_names(), self.consumer))
            )

    async def poll(self, server, subject, note):
        client = Client(server)
        try:
            while True:
                began = time.monotonic()
                answer = await client.ask(subject, ASK_S_MAX)
                if answer:
                    note(answer)
                await asyncio.sleep(max(0, began + ASK_EVERY_S - time.monotonic()))
        finally:
            client.close()

    def leader(self, answer):
        leader = (answer.get("cluster") or {}).get("leader")
        if leader:
            self.leaders.append((time.monotonic(), leader))

    def consumer(self, answer):
        if answer.get("consumers") is not None:
            self.consumers.append((time.monotonic(), len(answer["consumers"])))

    async def stop(self):
        for task in self.asking:
            task.cancel()
        await asyncio.gather(*self.asking, return_exceptions=True)


def strike(mode, servers, struck):
    """Injects the fault."""
    if mode == "isolated":
        servers.isolate(struck)
        return
    what = {
        "kill": signal.SIGKILL,
        "term": signal.SIGTERM,
        "lame-duck": signal.SIGUSR2,
        "frozen": signal.SIGSTOP,
    }[mode]
    struck.child.send_signal(what)


def end_fault(mode, servers, struck):
    """Ends the fault, unless a restart of the server does."""
    if mode == "isolated":
        servers.heal()
    elif mode == "frozen":
        struck.child.send_signal(signal.SIGCONT)


async def start_again(mode, servers, struck):
    if mode in ("kill", "term", "lame-duck"):
        await asyncio.to_thread(struck.child.wait)
        await asyncio.to_thread(struck.start)
    return await settled(servers)


async def counted(nodes):
    """The number of reconnects and of log lines of each replica so far."""

    def now():
        return [
            (node.metric("gradestore_log_reconnects_total"), node.log.read_text().count("\n"))
            for node in nodes
        ]

    return await asyncio.to_thread(now)


async def run(mode, servers, nodes, load):
    leader = await settled(servers)
    await asyncio.sleep(WARM_UP_S)
    struck = (
        next(server for server in servers.all if server is not leader)
        if mode == "isolated"
        else leader
    )
    name = f"server-{servers.all.index(leader)}"
    watch = ClusterWatch([server for server in servers.all if server is not struck])
    before = await counted(nodes)
    began = time.monotonic()
    strike(mode, servers, struck)
    await asyncio.sleep(STRUCK_S)
    end_fault(mode, servers, struck)
    await asyncio.sleep(WATCHED_S - STRUCK_S)
    after = await counted(nodes)
    # Wait for the responses to the last writes.
    sent = [write for write in load.writes if began <= write.sent < began + WATCHED_S]
    while any(write.ended is None for write in sent):
        await asyncio.sleep(0.1)
    await watch.stop()
    found = judge(mode, nodes, load, watch, began, name)
    found["reconnects"] = [int(b[0] - a[0]) for a, b in zip(before, after, strict=True)]
    found["lines"] = [b[1] - a[1] for a, b in zip(before, after, strict=True)]
    await start_again(mode, servers, struck)
    return found


def judge(mode, nodes, load, watch, began, old_leader):
    led_by = [(at - began, leader) for at, leader in watch.leaders if at >= began]
    # Isolating a follower does not change the leader.
    new = [at for at, leader in led_by if mode == "isolated" or leader != old_leader]
    leader_s = new[0] if new else None
    for before, after in zip(new, new[1:]):
        if after - before > UNNAMED_S_MAX:
            leader_s = after
    sent = [write for write in load.writes if began <= write.sent < began + WATCHED_S]
    failed = Counter(str(write.outcome) for write in sent if write.outcome != 204)
    acknowledged = [write for write in sent if write.outcome == 204]
    if mode in LEADERLESS:
        # A write that was sent after the leader was gone and was acknowledged proves that there is
        # another.
        proofs = [
            write.ended - began for write in acknowledged if write.sent >= began + GONE_AFTER_S
        ]
        leader_s = min((at for at in (leader_s, *proofs) if at is not None), default=None)
    accepted, paused = [], []
    for replica in range(len(nodes)):
        ended = sorted(
            write.ended - began
            for write in load.writes
            if write.replica == replica and write.outcome == 204 and 0 <= write.ended - began
        )
        pauses = [(after - before, after) for before, after in zip([0, *ended], ended)]
        pauses.append((WATCHED_S - ended[-1] if ended else WATCHED_S, None))
        longest_s, over = max(pauses, key=lambda pause: pause[0])
        accepted.append(over)
        paused.append(longest_s)
    return {
        "mode": mode,
        "leader_s": leader_s,
        "accepted_s": accepted,
        "paused_s": paused,
        "sent": len(sent),
        "due": WATCHED_S * load.args.writes_per_s,
        "failed": failed,
        "errors": Counter(write.response[:300] for write in sent if write.outcome != 204).most_common(3),
        "longest_s": max((write.ended - write.sent for write in acknowledged), default=None),
        "consumers": max((count for _, count in watch.consumers), default=None),
    }


def seconds(value):
    return "-" if value is None else f"{value:.2f}"


def show(report, n, found):
    failed = sum(found["failed"].values())
    by_status = ", ".join(f"{count} x {status}" for status, count in found["failed"].most_common())
    # If the load was lower than requested, the figures are of another load.
    slow = f"  only {found['sent']} sent" if found["sent"] < SENT_MIN * found["due"] else ""
    accepted = " ".join(f"{seconds(at):>6}" for at in found["accepted_s"])
    late = late_s(found)
    report(
        f"{n:3} {found['mode']:9} {seconds(found['leader_s']):>6} {accepted} {seconds(late):>6} "
        f"{max(found['paused_s']):6.2f} {failed:6} "
        f"{failed / max(1, found['sent']):7.2%} {seconds(found['longest_s']):>7} "
        f"{'/'.join(map(str, found['reconnects'])):>14} {found['consumers']!s:>9} "
        f"{'/'.join(map(str, found['lines'])):>14}  {by_status}{slow}"
        f"{'' if counts(found) else '  not counted'}"
    )


def late_s(found):
    """Seconds from the election of a leader until the last replica acknowledged a write."""
    if found["mode"] not in LEADERLESS or found["leader_s"] is None or None in found["accepted_s"]:
        return None
    return max(0, max(found["accepted_s"]) - found["leader_s"])


def counts(found):
    return found["leader_s"] is not None and found["leader_s"] <= LEADER_S_MAX


def demands(report, mode, runs):
    runs = [found for found in runs if counts(found)]
    if not runs:
        report(f"{mode}: no run counts")
        return True

    def met(what, holds):
        share = sum(map(holds, runs)) / len(runs)
        return report.demand(f"{mode}: runs in which {what}", share, ">=", RUNS_MET_MIN)

    failed_max = 0 if mode in NO_FAILED_WRITE else FAILED_MAX
    missed = met(
        f"at most {failed_max:.0%} of the writes failed",
        lambda found: sum(found["failed"].values()) <= failed_max * found["sent"],
    )
    if mode in LEADERLESS:
        missed |= met(
            f"every replica accepted writes at most {ACCEPT_S_MAX} s after the stream had a leader",
            lambda found: late_s(found) is not None and late_s(found) <= ACCEPT_S_MAX,
        )
    missed |= met(
        f"no replica reconnected more than {RECONNECTS_MAX} times",
        lambda found: max(found["reconnects"]) <= RECONNECTS_MAX,
    )
    missed |= met(
        "the stream never had more consumers than replicas",
        lambda found: (found["consumers"] or 0) <= len(found["reconnects"]),
    )
    return missed


async def equal(nodes):
    """The status of each replica once all are ready at the same position, or after the timeout."""
    deadline = time.monotonic() + EQUAL_S_MAX
    while True:
        statuses = await asyncio.to_thread(lambda: [node.status() for node in nodes])
        same = len({(status["position"], status["log_end"]) for status in statuses}) == 1
        if (
            same and all(status["state"] == "ready" for status in statuses)
        ) or time.monotonic() > deadline:
            return statuses
        await asyncio.sleep(0.1)


def missing(node, writes):
    """How many users were read, and for which of them a replica holds neither the last acknowledged value nor one
    with an unknown outcome."""
    last, doubtful = {}, {}
    for write in writes:
        user = write.number % USERS
        if write.outcome == 204:
            last[user] = write.number
            doubtful[user] = []
        elif write.outcome != 503:
            doubtful.setdefault(user, []).append(write.number)
    users, lost = sorted(last), []
    for first in range(0, len(users), IDS_A_REQUEST):
        part = users[first : first + IDS_A_REQUEST]
        query = urllib.parse.urlencode([("user_ids", f"user-{user}") for user in part])
        with urllib.request.urlopen(f"{node.urls['read']}/get?{query}", timeout=10) as answer:
            grades = json.load(answer)
        for user, grade in zip(part, grades, strict=True):
            value = grade and grade["spp"]
            if value != last[user] and value not in doubtful[user]:
                lost.append((user, last[user], value))
    return len(last), lost


async def measure(report, args, directory, stack):
    machine(report, args, "load/failover.py")
    servers = Servers(directory, args.sync, stack, proxied="isolated" in args.modes)
    nodes = []
    for name in NAMES:
        (directory / name).mkdir()
        flags = [
            "--nats-url",
            servers.url,
            "--replicas",
            str(SERVERS),
            "--data-dir",
            directory / name / "data",
        ]
        nodes.append(
            stack.enter_context(await asyncio.to_thread(Node, directory / name, *flags, *args.flag))
        )
    load = Load(nodes, args)
    writing = asyncio.create_task(load.run())
    missed = False
    try:
        report(
            f"\n{args.writes_per_s} writes/s over {len(nodes)} replicas, client timeout {args.client_timeout} s; "
            "seconds since the fault"
        )
        report(
            "run mode      leader   first acknowledged  after  pause failed          longest     reconnects "
            "consumers      log lines"
        )
        runs = []
        for mode in args.modes:
            for _ in range(args.runs):
                runs.append(await run(mode, servers, nodes, load))
                show(report, len(runs), runs[-1])
        for found in runs:
            for error, count in found["errors"]:
                if args.verbose:
                    report(f"{found['mode']}: {count} x {error}")
        report()
        for mode in args.modes:
            of_mode = [found for found in runs if found["mode"] == mode]
            late = [
                late_s(found) for found in of_mode if counts(found) and late_s(found) is not None
            ]
            if late:
                report(
                    f"{mode}: {len(of_mode)} runs, {len(late)} counted; after the leader median "
                    f"{statistics.median(late):.2f} s, most {max(late):.2f} s"
                )
            missed |= demands(report, mode, of_mode)
    finally:
        await load.stop()
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing
    statuses = await equal(nodes)
    report()
    for name, status in zip(NAMES, statuses, strict=True):
        report(
            f"{name:7} {status['state']}, position {status['position']}, {status['records']} records, digest "
            f"{status['digest']}"
        )
    missed |= report.demand(
        "different digests", len({status["digest"] for status in statuses}), "==", 1, 0
    )
    outcomes = Counter(str(write.outcome) for write in load.writes)
    report(
        f"{len(load.writes)} writes in all: "
        + ", ".join(f"{count} x {what}" for what, count in outcomes.most_common())
    )
    ready = [n for n, status in enumerate(statuses) if status["state"] == "ready"]
    missed |= report.demand("replicas ready in the end", len(ready), "==", len(nodes), 0)
    if ready:
        users, lost = await asyncio.to_thread(missing, nodes[ready[0]], load.writes)
        report(f"{users} users read back from the {NAMES[ready[0]]} replica")
        missed |= report.demand("acknowledged writes that are missing", len(lost), "==", 0, 0)
    return missed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modes", nargs="*", metavar="MODE", help=f"{', '.join(MODES)}; default: kill"
    )
    parser.add_argument("--runs", type=int, default=20, help="runs of each mode")
    parser.add_argument("--writes-per-s", type=int, default=200)
    parser.add_argument("--client-timeout", type=float, default=12)
    parser.add_argument(
        "--flag", action="append", default=[], help="another flag for the replicas, as --flag=--x=y"
    )
    parser.add_argument(
        "--sync", choices=SYNCS, default="default", help="sync interval of the servers"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print the most frequent errors of failed writes"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the data directories and logs"
    )
    parser.add_argument("--only-print", action="store_true")
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT / "target",
        help="parent of the data directories",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "load" / "results")
    args = parser.parse_args()
    args.modes = args.modes or ["kill"]
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"no such mode: {', '.join(unknown)}; modes are {', '.join(MODES)}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    args.dir.mkdir(exist_ok=True)
    report = Report()
    directory = Path(tempfile.mkdtemp(prefix="failover-", dir=args.dir))
    try:
        with ExitStack() as stack:
            missed = asyncio.run(measure(report, args, directory, stack))
    finally:
        if not args.keep:
            shutil.rmtree(directory)
    if not args.only_print:
        report.keep(args.results, "failover")
    sys.exit(missed)


if __name__ == "__main__":
    main()
