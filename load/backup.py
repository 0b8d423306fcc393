#!/usr/bin/env python3
"""Measures and checks backups of nodes that it starts on free ports, without a disk.

    cargo build --release
    python3 load/backup.py tools     # zcat, Python and DuckDB read exactly what was written
    python3 load/backup.py compare   # speed and size against pigz, restore against Redis
    python3 load/backup.py memory    # how much memory a backup adds
    python3 load/backup.py slow      # the effect of a slow reader of a backup on POST /set

Exit code 1 if data differs or a goal was missed. `load/install.sh` installs DuckDB, pigz, Redis and wrk; curl is needed
too. The records are those of `generate.py`.
"""

import argparse
import contextlib
import csv
import gzip
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import generate
from measure import AUTH, BUILT, ROOT, Node, Others, demand, wrk

NODE = BUILT / "gradestore"
TOOLS = ROOT / ".tools"
MIB = 1024 * 1024

# The goals, for the medians of the rounds' ratios.
BACKUP_RATE_MIN = 1.0  # rows a second, to `pigz -1 -p2` of the same CSV
BACKUP_SIZE_MAX = 1.05  # bytes, to the same
RESTORE_RATE_MIN = 4.0  # rows a second, to Redis that loads its own dump of the same records
RESTORE_ZCAT_MIN = 0.6  # to `zcat FILE | wc -l`
SLOW_P999_MAX = 1.5  # p99.9 of POST /set, to that without a backup
MEMORY_MIB_MAX = 16  # resident memory at its highest during a backup, less that before

SLOW_BYTES_PER_S = 10_000
REDIS_START_S_MAX = 120


def filled(directory, restore_from, *flags):
    """A node with the records of a file."""
    return Node(directory, "--restore-from", restore_from, *(flags or ["--ephemeral"]))


def generated(directory, users):
    path = Path(directory) / "generated.csv.gz"
    began = time.monotonic()
    generate.write(path, users)
    print(f"{users} records generated in {time.monotonic() - began:.1f} s, {path.stat().st_size / MIB:.1f} MiB of csv.gz")
    return path


def shell(command, directory):
    """The output of `command`, and its duration in seconds."""
    path = f"{TOOLS / 'bin'}:{os.environ['PATH']}"
    began = time.monotonic()
    out = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=directory, env=dict(os.environ, PATH=path),
                         check=True, stdout=subprocess.PIPE, text=True).stdout
    return out.strip(), time.monotonic() - began


# tools


def tools(args, directory):
    path = generated(directory, args.users)
    with filled(directory, path) as node:
        took_s = node.status()["restore"]["duration_s"]
        print(f"restored from that in {took_s:.1f} s; GET /backup")
        subprocess.run(node.curl_backup(directory / "grades.csv.gz"), check=True)
    failed = 0
    for what, check in (("commands of backup.md", documented_commands), ("zcat, every byte", zcat_bytes),
                        ("Python gzip and csv, every value", python_values),
                        ("DuckDB read_csv, every value", duckdb_values),
                        ("gradestore verify", verify)):
        print(f"\n{what}")
        equal = check(args.users, directory)
        print("  equal" if equal else "  DIFFERS")
        failed |= not equal
    return int(failed)


def documented_commands(users, directory):
    """Runs the three commands of docs/operations/backup.md."""
    commands = re.findall(r"```sh\n((?:zcat|python3|duckdb) .*?)\n```", (ROOT / "docs" / "operations" / "backup.md").read_text(), re.DOTALL)
    spp = generate.FIELDS.index("spp")
    sum_spp = sum(generate.value(user, spp) for user in range(users))
    wanted = [[users + 1], [users], [users, sum_spp]]
    found = []
    for command in commands:
        out, took_s = shell(command, directory)
        print(f"  {took_s:5.1f} s  {command}")
        # DuckDB prints a table; the digits of type names such as int64 do not count.
        found.append([int(number) for number in re.findall(r"(?<![\w-])-?\d+(?![\w.])", out)])
        print(f"           {found[-1]}")
    return [numbers[:len(want)] for numbers, want in zip(found, wanted, strict=True)] == wanted


def zcat_bytes(users, directory):
    sums = []
    for name in ("generated.csv.gz", "grades.csv.gz"):
        # The rows of a backup are not sorted, and the header row is first.
        command = f"zcat {name} | (read -r header; echo \"$header\"; LC_ALL=C sort) | sha256sum"
        out, took_s = shell(command, directory)
        print(f"  {took_s:5.1f} s  {command}\n           {out}")
        sums.append(out)
    return sums[0] == sums[1]


def python_values(users, directory):
    began = time.monotonic()
    seen = bytearray(users)
    differ = 0
    with gzip.open(directory / "grades.csv.gz", "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            user = generate.user_of(row["user_id"])
            seen[user] += 1
            differ += row["user_id"] != generate.user_id(user)
            differ += [int(row[field]) for field in generate.FIELDS] != generate.values(user)
    print(f"  {time.monotonic() - began:5.1f} s  {seen.count(1)} users once, {users - seen.count(1)} not or more often, "
          f"{differ} rows differ")
    return seen.count(1) == users and not differ


def duckdb_values(users, directory):
    differs = " OR ".join(f"{name} IS DISTINCT FROM value_of(n, {field})" for field, name in enumerate(generate.FIELDS))
    statements = (
        # It would print a progress bar.
        "SET enable_progress_bar = false",
        # The formulas of generate.py.
        """CREATE MACRO value_of(n, field) AS CASE
            WHEN (4 * n + field) % 101 = 0 THEN -9223372036854775808
            WHEN (4 * n + field) % 101 = 1 THEN 9223372036854775807
            WHEN (4 * n + field) % 101 < 20 THEN 0
            WHEN (4 * n + field) % 101 % 2 = 1 THEN -(4 * n + field)
            ELSE 4 * n + field END""",
        """CREATE MACRO id_of(n) AS
            (1000000000000 + n)::VARCHAR || CASE WHEN n % 1000 = 7 THEN ', "ж"' ELSE '' END""",
        f"""SELECT count(*), count(DISTINCT n), min(n), max(n),
                count(*) FILTER (WHERE user_id IS DISTINCT FROM id_of(n) OR {differs})
            FROM (SELECT *, left(user_id, 13)::BIGINT - 1000000000000 AS n
                FROM read_csv('grades.csv.gz', types = {{'user_id': 'VARCHAR'}}))""",
    )
    program = ("import duckdb, json, sys\n"
               "for statement in json.load(sys.stdin): result = duckdb.execute(statement)\n"
               "print(json.dumps([duckdb.__version__, *result.fetchall()[0]]))")
    began = time.monotonic()
    done = subprocess.run([TOOLS / "venv" / "bin" / "python", "-c", program], cwd=directory, check=True,
                          input=json.dumps(statements), stdout=subprocess.PIPE, text=True)
    version, rows, distinct, least, most, differ = json.loads(done.stdout)
    print(f"  {time.monotonic() - began:5.1f} s  DuckDB {version}: {rows} rows, {distinct} users from {least} to {most}, "
          f"{differ} rows differ")
    return [rows, distinct, least, most, differ] == [users, users, 0, users - 1, 0]


def verify(users, directory):
    out, took_s = shell(f"{NODE} verify grades.csv.gz", directory)
    print(f"  {took_s:5.1f} s  {' '.join(out.split())}")
    return f"rows      {users}\n" in out


# compare


def compare(args, directory):
    path = generated(directory, args.users)
    backup, text = directory / "grades.csv.gz", directory / "grades.csv"
    rounds = []
    with filled(directory, path) as node:
        subprocess.run(node.curl_backup(backup), check=True)
        # The rows in the order of the backup, as the input of pigz.
        shell(f"zcat {backup} > {text}", directory)
        sizes = {"csv": text.stat().st_size, "backup": backup.stat().st_size,
                 "pigz": int(shell(f"pigz -1 -p2 -c {text} | wc -c", directory)[0])}
        make_redis_dump(args.users, directory)
        print(f"{sizes['csv'] / MIB:.1f} MiB of CSV, backup {sizes['backup'] / MIB:.1f} MiB, pigz -1 {sizes['pigz'] / MIB:.1f} "
              f"MiB, Redis dump {(directory / 'dump.rdb').stat().st_size / MIB:.1f} MiB")
        print("million rows a second; others' CPU in cores, of two that all share")
        print("round   backup   pigz -1  backup/pigz   restore    Redis     zcat  restore/Redis  restore/zcat  others' CPU")
        for n in range(1, args.rounds + 1):
            others = Others(node)
            rates = {
                "backup": args.users / timed(node.curl_backup("/dev/null")),
                "pigz": args.users / timed(["pigz", "-1", "-p2", "-c", text]),
                "restore": args.users / restore_s(directory, backup),
                "redis": args.users / redis_load_s(directory),
                "zcat": args.users / shell(f"zcat {backup} | wc -l", directory)[1],
            }
            rounds.append((rates["backup"] / rates["pigz"], rates["restore"] / rates["redis"],
                           rates["restore"] / rates["zcat"]))
            million = {what: rate / 1e6 for what, rate in rates.items()}
            print(f"{n:5} {million['backup']:8.2f} {million['pigz']:9.2f} {rounds[-1][0]:12.3f} {million['restore']:9.2f} "
                  f"{million['redis']:8.2f} {million['zcat']:8.2f} {rounds[-1][1]:14.3f} {rounds[-1][2]:13.3f} "
                  f"{others.cores():12.2f}", flush=True)
    backup_ratio, restore_ratio, zcat_ratio = map(statistics.median, zip(*rounds))
    return (demand("backup rows a second / pigz's, median", backup_ratio, ">=", BACKUP_RATE_MIN)
            | demand("size / pigz's", sizes["backup"] / sizes["pigz"], "<=", BACKUP_SIZE_MAX)
            | demand("restore rows a second / Redis's load, median", restore_ratio, ">=", RESTORE_RATE_MIN)
            | demand("restore rows a second / zcat and wc -l, median", zcat_ratio, ">=", RESTORE_ZCAT_MIN))


def timed(command):
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def restore_s(directory, backup):
    second = directory / "second"
    second.mkdir(exist_ok=True)
    with filled(second, backup) as node:
        return node.status()["restore"]["duration_s"]


@contextlib.contextmanager
def redis(directory):
    """A Redis on a socket in `directory`, and its log once it has loaded dump.rdb."""
    log = directory / "redis.log"
    log.unlink(missing_ok=True)
    child = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", directory / "redis.sock", "--dir", directory,
                              "--save", "", "--logfile", log])
    try:
        deadline = time.monotonic() + REDIS_START_S_MAX
        while not log.exists() or not re.search("ready to accept connections", log.read_text(), re.IGNORECASE):
            if child.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"redis-server did not start, see {log}")
            time.sleep(0.05)
        yield log.read_text()
    finally:
        child.terminate()
        child.wait()


def redis_load_s(directory):
    """As reported by Redis."""
    with redis(directory) as log:
        return float(re.search(r"DB loaded from disk: ([\d.]+) seconds", log)[1])


def redis_commands(users, id_of=generate.user_id):
    parts = []
    for user in users:
        words = ["HSET", id_of(user)]
        for field, value in zip(generate.FIELDS, generate.values(user)):
            words += (field, str(value))
        parts.append(f"*{len(words)}\r\n")
        parts += (f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    return "".join(parts).encode()


def make_redis_dump(users, directory):
    cli = ["redis-cli", "-s", directory / "redis.sock"]
    with redis(directory):
        pipe = subprocess.Popen([*cli, "--pipe"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for commands in generate.blocks(users, redis_commands):
            pipe.stdin.write(commands)
        pipe.stdin.close()
        pipe.wait()
        replies = [subprocess.run([*cli, command], check=True, capture_output=True, text=True).stdout.strip()
                   for command in ("DBSIZE", "SAVE")]
    if replies != [str(users), "OK"]:
        sys.exit(f"Redis did not store all records: {replies}")


# memory


def memory(args, directory):
    failed = 0
    for users in args.users:
        with filled(directory, generated(directory, users)) as node:
            time.sleep(2)
            before = node.rss_mib()
            print(f"RSS before {before:.1f} MiB; all figures are relative to it, so memory that one backup retains "
                  "counts for the next one too")
            grown = 0
            for n in range(1, args.rounds + 1):
                samples = [node.rss_mib()]
                began = time.monotonic()
                client = subprocess.Popen(node.curl_backup("/dev/null"))
                while client.poll() is None:
                    samples.append(node.rss_mib())
                    time.sleep(0.01)
                took_s = time.monotonic() - began
                if client.returncode:
                    sys.exit("the backup was aborted")
                grown = max(grown, max(samples) - before)
                print(f"  backup {n}: {took_s:.2f} s, {len(samples)} samples, RSS at most {max(samples):.1f} MiB, "
                      f"{max(samples) - before:+.1f} MiB; after it {node.rss_mib() - before:+.1f} MiB", flush=True)
            failed |= demand(f"growth in MiB at {users} records", grown, "<=", MEMORY_MIB_MAX)
    return failed


# slow


class Client(threading.Thread):
    """Requests a backup and reads it at some bytes a second; with 0 only the header."""

    def __init__(self, url, bytes_per_s):
        super().__init__(daemon=True)
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        # A small buffer, so that unread bytes stay in the node.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((host, int(port)))
        self.socket.sendall(f"GET /backup HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {AUTH}\r\n\r\n".encode())
        if not self.socket.recv(64).startswith(b"HTTP/1.1 200 "):
            sys.exit("GET /backup was rejected")
        self.bytes_per_s, self.bytes_read = bytes_per_s, 0
        self.stopped = threading.Event()

    def run(self):
        every_s = 0.1
        while not self.stopped.wait(every_s):
            if self.bytes_per_s:
                self.bytes_read += len(self.socket.recv(int(self.bytes_per_s * every_s)))

    def stop(self):
        self.stopped.set()
        self.join()
        self.socket.close()


def slow(args, directory):
    kinds = {"idle": None, "slow": SLOW_BYTES_PER_S, "stopped": 0}
    flags = ["--data-dir", directory / "data"] if args.disk else []
    ratios = {"slow": [], "stopped": []}
    with filled(directory, generated(directory, args.users), *flags) as node:
        print(f"POST /set over {args.connections} connections, {args.delay_ms} ms between an answer and the next request, "
              f"{args.seconds} s a run, {'log on disk' if args.disk else 'no disk'}")
        print("p99.9 of POST /set in us; slow: a client reads a backup at "
              f"{SLOW_BYTES_PER_S / 1000:.0f} KB/s; stopped: one that stops reading")
        print("round     idle     slow  stopped   slow/idle  stopped/idle   set/s idle  others' CPU")
        for n in range(1, args.rounds + 1):
            others = Others(node)
            p999_us, rate = {}, {}
            # Another case goes first each time.
            order = list(kinds)[n % 3:] + list(kinds)[:n % 3]
            for kind in order:
                client = None
                if kinds[kind] is not None:
                    client = Client(node.urls["write"], kinds[kind])
                    client.start()
                    time.sleep(1)
                run = wrk("set.lua", node.urls["write"], n, args, delay_ms=args.delay_ms)
                p999_us[kind], rate[kind] = run["p999_us"], run["rate"]
                if client:
                    client.stop()
            for kind, of_rounds in ratios.items():
                of_rounds.append(p999_us[kind] / p999_us["idle"])
            print(f"{n:5} {p999_us['idle']:8} {p999_us['slow']:8} {p999_us['stopped']:8} {ratios['slow'][-1]:11.3f} "
                  f"{ratios['stopped'][-1]:13.3f} {rate['idle']:12.0f} {others.cores():12.2f}", flush=True)
    return (demand("p99.9 with a slow reader / idle, median", statistics.median(ratios["slow"]), "<=", SLOW_P999_MAX)
            | demand("p99.9 with one that stopped / idle, median", statistics.median(ratios["stopped"]), "<=", SLOW_P999_MAX))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, users, rounds=None):
        it = commands.add_parser(run.__name__)
        it.set_defaults(run=run)
        it.add_argument("--users", type=int, default=users, nargs="+" if isinstance(users, list) else None)
        if rounds:
            it.add_argument("--rounds", type=int, default=rounds)
        return it

    command(tools, 5_000_000)
    command(compare, 5_000_000, rounds=5)
    command(memory, [1_000_000, 10_000_000], rounds=3)
    it = command(slow, 1_000_000, rounds=9)
    it.add_argument("--connections", type=int, default=16)
    it.add_argument("--delay-ms", type=int, default=5)
    it.add_argument("--seconds", type=int, default=6)
    it.add_argument("--disk", action="store_true", help="use the log on disk")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gradestore-") as directory:
        sys.exit(args.run(args, Path(directory)))


if __name__ == "__main__":
    main()
