#!/usr/bin/env python3
"""Measures all goals of speed and size against references, and prints one table.

    load/install.sh && tests/install-nats.sh
    cargo build --profile dist -p gradestore -p gradestore-load --features gradestore/measure
    PROFILE=dist python3 load/compare.py                     # all parts, about forty minutes
    PROFILE=dist python3 load/compare.py get set --rounds 3  # some of them

Each part starts its own servers and loads them in turns of a second, so that a slow moment of the machine affects all
of them; the order changes from turn to turn. Where a ratio is near its goal, each round has its own processes. Where
CPU time is compared, the servers run on the first core and wrk on the second. A turn that other processes disturbed
does not count. Prints each turn, the median of the turns' ratios and finally the table. Exit code 1 if a request failed
or a goal was missed.
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import backup
import generate
import jetstream
from measure import (AUTH, DEMANDED, OTHERS_QUIET, BUILT, ROOT, Node, cpu_s, demand, end_with_parent, free_port,
                     last_line, machine_cpu_s, memory_mib, own_cpu_s, pinned, says, wrk)

MILLION = 1_000_000
# A turn during which everything else on the machine used more than OTHERS_QUIET of a core is repeated, up to this
# multiple of the requested turns. Each turn starts once the machine is quiet.
TRIES = 3
QUIET_WAIT_S_MAX = 120
# The number of distinct users in a run, so that their records do not fit into the cache.
ASKED = "262144"
# Other kinds of GET /get: see get.lua.
KINDS = ["proxied", "encoded", "unknown"]
# The mean delay between two requests of a connection where the load is below the maximum.
THINK_MS = 3


class Server:
    """A reference program on its own port."""

    def __init__(self, command, port, core, answers="/"):
        self.url = f"http://127.0.0.1:{port}"
        # Its log is discarded, because nothing reads a pipe while wrk runs.
        self.child = subprocess.Popen([*pinned(core), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                      preexec_fn=end_with_parent)
        self.pid = self.child.pid
        while True:
            try:
                urllib.request.urlopen(self.url + answers, timeout=1)
                break
            except OSError:
                if self.child.poll() is not None:
                    sys.exit(f"{command[0]} ended")
                time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()


def bare(core=0):
    port = free_port()
    return Server([BUILT / "bare", f"127.0.0.1:{port}"], port, core)


def plain_id(user):
    """The ids of get.lua and set.lua."""
    return str(generate.FIRST_ID + user)


class Files:
    """Backups of a number of users, created once: a node reads its own format fastest."""

    def __init__(self, directory):
        self.directory, self.made = directory, {}

    def __call__(self, users, id_of=plain_id):
        key = users, id_of
        if key not in self.made:
            name = f"{id_of.__name__}-{users}"
            generated, own = self.directory / f"{name}-generated.csv.gz", self.directory / f"{name}.csv.gz"
            generate.write(generated, users, id_of)
            with self.node(generated) as node:
                subprocess.run(node.curl_backup(own), check=True)
            generated.unlink()
            self.made[key] = own
        return self.made[key]

    def node(self, file, *flags, core=None):
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        return Node(directory, "--restore-from", file, *(flags or ["--ephemeral"]), core=core)

    def filled(self, users, *flags, core=None, id_of=plain_id):
        return self.node(self(users, id_of), *flags, core=core)


def wait_for_quiet():
    deadline = time.monotonic() + QUIET_WAIT_S_MAX
    while time.monotonic() < deadline:
        before = machine_cpu_s()
        time.sleep(0.5)
        if machine_cpu_s() - before < OTHERS_QUIET / 2:
            return


def in_turns(args, begin):
    """The results of all turns. In a turn each run takes one second; a result has the measurements of each run by name.
    There are args.rounds rounds of args.seconds turns. `begin` gets a function that starts a server for the duration of
    the round, and returns the runs by name and the servers. Two processes of the same program may differ by a tenth in
    speed for their whole lifetime, so where a ratio is near its goal, each round has its own processes."""
    counted = []
    for n in range(args.rounds):
        with ExitStack() as stack:
            runs, servers = begin(stack.enter_context)
            if n == 0:
                print("  ".join(f"{name:>30}" for name in runs) + "  others' CPU")
            turns = (turn(args, n * args.seconds * TRIES + seed, runs, servers) for seed in range(args.seconds * TRIES))
            counted += itertools.islice((row for row in turns if row), args.seconds)
        if len(counted) < (n + 1) * args.seconds:
            sys.exit("other processes kept the machine busy: no result")
    return counted


def turn(args, seed, runs, servers):
    """The results of each run, by name; `None` if other processes disturbed one."""
    if not args.noisy:
        wait_for_quiet()
    names = list(runs)
    began, others = time.monotonic(), machine_cpu_s() - own_cpu_s(*servers)
    shuffled = random.Random(seed).sample(names, len(names))
    row = {name: runs[name](seed, seconds=1) for name in shuffled}
    others = max(machine_cpu_s() - own_cpu_s(*servers) - others, 0) / (time.monotonic() - began)
    disturbed = others > OTHERS_QUIET and not args.noisy
    print("  ".join(f"{shown(row[name]):>30}" for name in names)
          + f"  {others:10.0%}{'  not counted' if disturbed else ''}", flush=True)
    return None if disturbed else row


def shown(run):
    return f"{run['rate']:.0f}/s {run.get('cpu_us', 0):.2f}us p99 {run['p99_us']}"


def ratio(rows, one, other, key="rate"):
    return statistics.median(row[one][key] / row[other][key] for row in rows)


def report(what, found):
    print(f"reported: {what}: {found:.3f}", flush=True)


def driven(args, script, url, pid, users, **more):
    """The result of a run of wrk, with the server's CPU time per request."""
    def run(seed, seconds=None):
        before = cpu_s(pid)
        row = wrk(script, url, seed, args, core=1, users=users, seconds=seconds, **more)
        return dict(row, cpu_us=(cpu_s(pid) - before) / row["requests"] * 1e6)
    return run


def get(args, files):
    """GET /get against a bare hyper server; with few records, without metrics, without the fast path, of other kinds;
    at 70 % of the load."""
    def asks(server, users, **more):
        url = server.url if isinstance(server, Server) else server.urls["read"]
        return driven(args, "get.lua", url, server.pid, users, REQUESTS=ASKED, **more)

    def begin(start):
        reference = start(bare())
        node = start(files.filled(args.users, core=0))
        few = start(files.filled(10_000, core=0))
        uncounted = start(files.filled(10_000, "--ephemeral", "--measure-without=metrics", core=0))
        routed = start(files.filled(10_000, "--ephemeral", "--measure-without=fast-path", core=0))
        return {"bare": asks(reference, args.users), "node": asks(node, args.users),
                "10,000 records": asks(few, 10_000), "and no metrics": asks(uncounted, 10_000),
                "and no fast path": asks(routed, 10_000),
                **{kind: asks(few, 10_000, KIND=kind) for kind in KINDS}}, [reference, node, few, uncounted, routed]

    print(f"\nGET /get, {args.connections} connections")
    rows = in_turns(args, begin)
    of = f"/get, {args.users:,} records"
    demand(f"{of}: server CPU a request / bare hyper", ratio(rows, "node", "bare", "cpu_us"), "<=", 1.05)
    demand(f"{of}: requests a second / bare hyper", ratio(rows, "node", "bare"), ">=", 0.95)
    demand(f"{of}: requests a second / with 10,000", ratio(rows, "node", "10,000 records"), ">=", 0.9)
    report("/get without / with the fast path: server CPU a request",
         ratio(rows, "and no fast path", "10,000 records", "cpu_us"))
    for kind in KINDS:
        demand(f"/get, {kind} / plain: server CPU a request", ratio(rows, kind, "10,000 records", "cpu_us"), "<=", 1.1)
    demand("/get, metrics on / off, requests a second", ratio(rows, "10,000 records", "and no metrics"), ">=", 0.99)

    rate = 0.7 * statistics.median(row["node"]["rate"] for row in rows)
    connections = int(rate * THINK_MS / 1000)
    think = {"connections": connections, "delay_ms": THINK_MS, "DELAY_SPREAD": "1"}

    def begin_thinking(start):
        reference, node = start(bare()), start(files.filled(args.users, core=0))
        runs = {"bare": asks(reference, args.users, **think), "node": asks(node, args.users, **think)}
        return runs, [reference, node]

    print(f"\nGET /get at 70 % of that: {connections} connections that wait {THINK_MS} ms, more or less")
    rows = in_turns(args, begin_thinking)
    demand(f"{of}: p99 at 70 % / bare hyper's", ratio(rows, "node", "bare", "p99_us"), "<=", 1.2)


def webdis(args, files):
    """GET /get against Redis behind Webdis, each system on one core."""
    directory = files.directory / "webdis"
    directory.mkdir()
    redis_port, port = free_port(), free_port()
    config = directory / "webdis.json"
    config.write_text(json.dumps({"redis_host": "127.0.0.1", "redis_port": redis_port, "http_host": "127.0.0.1",
                                  "http_port": port, "threads": 1, "pool_size": 16, "daemonize": False,
                                  "acl": [{"enabled": ["HGETALL", "PING"]}], "verbosity": 0,
                                  "logfile": str(directory / "webdis.log")}))
    users = MILLION
    with ExitStack() as stack:
        node = stack.enter_context(files.filled(users, core=0))
        redis = subprocess.Popen([*pinned(0), "redis-server", "--port", str(redis_port), "--save", "", "--dir", directory,
                                  "--logfile", directory / "redis.log"], preexec_fn=end_with_parent)
        stack.callback(redis.kill)
        fill_redis(["-p", str(redis_port)], users, plain_id)
        front = stack.enter_context(Server(["webdis", str(config)], port, 0, "/PING"))
        print(f"\nGET /get and HGETALL through Webdis, {users:,} records, {args.connections} connections")
        runs = {"Webdis": driven(args, "get.lua", front.url, front.pid, users, GET_PATH="/HGETALL/"),
                "node": driven(args, "get.lua", node.urls["read"], node.pid, users)}
        rows = in_turns(args, lambda _: (runs, [node, redis, front]))
        demand("/get requests a second / Redis behind Webdis, HGETALL", ratio(rows, "node", "Webdis"), ">=", 3)


def fill_redis(to, users, id_of):
    """Hashes with the four field names."""
    cli = ["redis-cli", *to]
    while subprocess.run([*cli, "ping"], capture_output=True, text=True).stdout.strip() != "PONG":
        time.sleep(0.05)
    pipe = subprocess.Popen([*cli, "--pipe"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for commands in generate.blocks(users, Commands(id_of)):
        pipe.stdin.write(commands)
    pipe.stdin.close()
    pipe.wait()
    stored = subprocess.run([*cli, "dbsize"], check=True, capture_output=True, text=True).stdout.strip()
    if stored != str(users):
        sys.exit(f"Redis did not store all records: {stored}")


class Commands:
    """A callable that can be sent to another process."""

    def __init__(self, id_of):
        self.id_of = id_of

    def __call__(self, users):
        return backup.redis_commands(users, self.id_of)


def sets(args, files):
    """POST /set against a bare hyper server, with and without a disk, and without the password check."""
    users = 100_000

    def begin(start):
        reference = start(bare())
        nodes = {"memory log": ["--ephemeral"], "unchecked": ["--ephemeral", "--measure-without=auth"],
                 "no fast path": ["--ephemeral", "--measure-without=fast-path"],
                 "disk log": ["--data-dir", tempfile.mkdtemp(dir=files.directory)]}
        nodes = {name: start(files.filled(users, *flags, core=0)) for name, flags in nodes.items()}
        runs = {"bare": driven(args, "set.lua", reference.url, reference.pid, users)}
        runs |= {name: driven(args, "set.lua", node.urls["write"], node.pid, users) for name, node in nodes.items()}
        runs |= {name: Parts(nodes["memory log"], split) for name, split in [("one part", False), ("two parts", True)]}
        return runs, [reference, *nodes.values()]

    print(f"\nPOST /set, {args.connections} connections, {users:,} records")
    rows = in_turns(args, begin)
    report("/set without / with the fast path: server CPU a request", ratio(rows, "no fast path", "memory log", "cpu_us"))
    demand("/set, memory log, requests a second / bare hyper POST", ratio(rows, "memory log", "bare"), ">=", 0.85)
    demand("/set, disk log / memory log, requests a second", ratio(rows, "disk log", "memory log"), ">=", 0.7)
    report("/set, body in a second part / in one part: server CPU a request", ratio(rows, "two parts", "one part", "cpu_us"))
    demand("/set, auth on / off, requests a second", ratio(rows, "memory log", "unchecked"), ">=", 0.99)


class Parts:
    """POST /set on some connections at once. With `split`, all of them send their bodies after all have sent their
    headers, so that the node reads each request in two parts, as many HTTP clients send it."""

    def __init__(self, node, split, connections=64):
        self.pid = node.pid
        host, port = node.urls["write"].removeprefix("http://").split(":")
        self.sockets = [socket.create_connection((host, int(port))) for _ in range(connections)]
        for each in self.sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = f'{{"user_id":"{plain_id(0)}","spp":1}}'.encode()
        header = (f"POST /set HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                  f"Authorization: Basic {AUTH}\r\nContent-Length: {len(body)}\r\n\r\n").encode()
        self.parts = [header, body] if split else [header + body]

    def __call__(self, _seed, seconds):
        requests, began, before = 0, time.monotonic(), cpu_s(self.pid)
        while time.monotonic() - began < seconds:
            for part in self.parts:
                for each in self.sockets:
                    each.sendall(part)
            for each in self.sockets:
                if not each.recv(4096).startswith(b"HTTP/1.1 204 "):
                    sys.exit("a write failed")
            requests += len(self.sockets)
        cpu_us = (cpu_s(self.pid) - before) / requests * 1e6
        return {"rate": requests / seconds, "cpu_us": cpu_us, "p99_us": 0}


def broker(args, files):
    """POST /set through JetStream against one message per write."""
    of_jetstream = argparse.Namespace(rounds=args.rounds, seconds=args.seconds, users=100_000, connections=[64, 256],
                                      sync=["default", "always"], dir=files.directory, )
    jetstream.measure(of_jetstream)


def apply(args, _files):
    """Applying batches of other replicas against parsing them."""
    print("\na replica that applies others' batches, and parsing alone")
    command = [*pinned(0), BUILT / "apply", "--rounds", str(args.rounds)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(out, end="")
    rows = [last_line(line) for line in out.splitlines()]
    demand("patches applied a second / simd-json parse of the same messages",
           statistics.median(row["parse_us"] / row["apply_us"] for row in rows), ">=", 0.6)


def backups(args, files):
    """Backup and restore against pigz, Redis and zcat; memory during a backup."""
    print("\nbackup and restore")
    of_backup = argparse.Namespace(rounds=args.rounds, users=5 * MILLION)
    backup.compare(of_backup, Path(tempfile.mkdtemp(dir=files.directory)))
    of_memory = argparse.Namespace(rounds=2, users=[args.users])
    backup.memory(of_memory, Path(tempfile.mkdtemp(dir=files.directory)))


def reading(args, files):
    """p99 of GET /get while backups are taken one after the other."""
    with files.filled(args.users) as node:
        stop = threading.Event()

        def take():
            while not stop.is_set():
                subprocess.run(node.curl_backup("/dev/null"), check=True)

        think = {"connections": 64, "delay_ms": 10, "DELAY_SPREAD": "1", "REQUESTS": ASKED}
        ask = driven(args, "get.lua", node.urls["read"], node.pid, args.users, **think)

        def during(seed, seconds):
            stop.clear()
            taking = threading.Thread(target=take)
            taking.start()
            try:
                return ask(seed, seconds)
            finally:
                stop.set()
                taking.join()

        print(f"\nGET /get, 64 connections that wait 10 ms, {args.users:,} records, while backups are taken")
        rows = in_turns(args, lambda _: ({"idle": ask, "during backups": during}, [node]))
        demand("/get p99 during a backup / idle", ratio(rows, "during backups", "idle", "p99_us"), "<=", 2)


def memory(args, files):
    """Resident memory per record against Redis; the maximum while restoring against the steady state."""
    with files.filled(0) as node:
        empty = node.rss_mib()
    for name, id_of, bound in (("13-byte ids", plain_id, 0.35), ("36-byte ids", generate.uuid_id, 0.45)):
        with files.filled(args.users, id_of=id_of) as node:
            time.sleep(2)
            held, most = node.rss_mib(), memory_mib(node.pid, "VmHWM")
        directory = Path(tempfile.mkdtemp(dir=files.directory))
        socket = directory / "redis.sock"
        redis = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--dir", directory,
                                  "--logfile", directory / "redis.log"], preexec_fn=end_with_parent)
        try:
            while not socket.exists():
                time.sleep(0.05)
            before = memory_mib(redis.pid, "VmRSS")
            fill_redis(["-s", socket], args.users, id_of)
            of_redis = memory_mib(redis.pid, "VmRSS") - before
        finally:
            redis.kill()
            redis.wait()
        a_record = (held - empty) * 2**20 / args.users
        redis_record = of_redis * 2**20 / args.users
        print(f"\n{args.users:,} records, {name}: {a_record:.1f} bytes a record, Redis {redis_record:.1f}; "
              f"at most {most:.0f} MiB while restoring, then {held:.0f}")
        demand(f"RSS a record, {name} / Redis hashes", a_record / redis_record, "<=", bound)
        demand(f"RSS at most while restoring / steady, {name}", most / held, "<=", 1.2)


def growing(args, files):
    """p99.9 of POST /set, and memory, while a store grows tenfold."""
    begin = args.users // 10
    with files.filled(begin, core=0) as node:
        url = node.urls["write"]
        steady = [driven(args, "set.lua", url, node.pid, begin)(n) for n in range(1, 4)]
        rate = statistics.median(run["rate"] for run in steady)
        seconds = int((args.users - begin) / rate * 1.2) + 1
        grown = driven(args, "grow.lua", url, node.pid, begin, FIRST=str(begin))(1, seconds)
        records = node.status()["records"]
        steady += [driven(args, "set.lua", url, node.pid, records)(n) for n in range(4, 7)]
        time.sleep(2)
        held, most = node.rss_mib(), memory_mib(node.pid, "VmHWM")
    print(f"\nPOST /set while the store grows from {begin:,} to {records:,} records")
    for name, run in [*(("steady", run) for run in steady), ("growing", grown)]:
        print(f"{name:8} {run['rate']:9.0f}/s p99 {run['p99_us']} us, p99.9 {run['p999_us']} us")
    p999_us = statistics.median(run["p999_us"] for run in steady)
    demand("/set p99.9 while growing / steady", grown["p999_us"] / p999_us, "<=", 3)
    demand("RSS at most while growing / steady", most / held, "<=", 1.2)


def start(args, files):
    """An empty node, from its start to ready."""
    took_ms = []
    for _ in range(10):
        directory = Path(tempfile.mkdtemp(dir=files.directory))
        began = time.monotonic()
        node = Node(directory, "--ephemeral", wait=False)
        while not node.ready():
            time.sleep(0.001)
        took_ms.append((time.monotonic() - began) * 1000)
        node.__exit__()
    print("\nan empty node is ready after, ms: " + " ".join(f"{ms:.0f}" for ms in took_ms))
    demand("start of an empty node to ready, ms", statistics.median(took_ms), "<=", 50)


PARTS = {"start": start, "get": get, "webdis": webdis, "set": sets, "broker": broker, "apply": apply,
         "backups": backups, "reading": reading, "memory": memory, "growing": growing}


def machine():
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    revision = says("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    print(f"gradestore at {revision}; {os.cpu_count()} cores of {cpu}, Linux {platform.release().split('-')[0]}")
    print(f"{says('wrk', '-v').split(' [')[0]}; {says('redis-server', '--version')}; pigz {says('pigz', '--version')}; "
          f"{says('rustc', '--version')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS) + "; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds with their own processes, where a ratio is near its goal")
    parser.add_argument("--seconds", type=int, default=4, help="duration of each run in a round")
    parser.add_argument("--users", type=int, default=10 * MILLION)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--noisy", action="store_true", help="count disturbed turns too")
    parser.add_argument("--dir", type=Path, default=ROOT / "target", help="parent of the data directories, on a disk")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {unknown[0]}; parts are {', '.join(PARTS)}")

    machine()
    with tempfile.TemporaryDirectory(prefix="compare-", dir=args.dir) as directory:
        files = Files(Path(directory))
        for part in args.parts or PARTS:
            PARTS[part](args, files)
    print("\n| what | found | demand | |\n| --- | ---: | ---: | --- |")
    for what, found, sign, bound, met in DEMANDED:
        print(f"| {what} | {found:.3f} | {sign} {bound} | {'met' if met else 'MISSED'} |")
    sys.exit(not all(met for *_, met in DEMANDED))


if __name__ == "__main__":
    main()
