"""Tests of the documents. A reader written from protocol.md alone reads the stream and the backups of real nodes. The
commands of the README run in order. The client examples run on real nodes. Every link of every page has a target."""

import asyncio
import csv
import datetime
import gzip
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import nats

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "load"), str(ROOT / "docs" / "internals"), str(ROOT / "dashboards")]

import read  # noqa: E402
from measure import AUTH, PASSWORD, PROGRAM, Broker, Node, free_port  # noqa: E402
from show import until  # noqa: E402

STREAM, SUBJECT = "GRADES", "grades.set"
IDS = ["alice", 'a "b"', "one, two", " =1+1 ", "привет 😀", "é" * 128, "a\\nb\u2028c", "-_.:@/"]
# Messages that a third-party client may publish: headers, payload, and whether it sets a field.
THIRD_PARTY_MESSAGES = [
    (None, b'[{"user_id":"stranger","spp":1}]', True),
    ({"Grade-Format": "1"}, b'[ {"spp" : -9223372036854775808, "user_id": "stranger"} , {"user_id":"bare"} ]', True),
    ({"Grade-Checkpoint": "0 0"}, b'[{"user_id":"stranger","spp":2,"return_fee":3}]', True),
    (None, b'[{"user_id":"minus nothing","spp":-0}]', True),
    (None, b"[]", False),
    (None, b"no JSON", False),
    (None, b'{"user_id":"x"}', False),
    (None, b'[{"user_id":"x","spp":1},{"user_id":"y","spp":1.0}]', False),
    (None, b'[{"user_id":"x","spp":1e2}]', False),
    (None, b'[{"user_id":"x","spp":9223372036854775808}]', False),
    (None, b'[{"user_id":"x","spp":1,"spp":2}]', False),
    (None, b'[{"user_id":"x","unknown":1}]', False),
    (None, b'[{"user_id":"","spp":1}]', False),
    (None, b'[{"user_id":"\\u0001","spp":1}]', False),
    (None, b'[{"user_id":"\\ud800","spp":1}]', False),
    (None, json.dumps([{"user_id": "é" * 128 + "a"}]).encode(), False),
    (None, b'[{"user_id":"x","spp":null}]', False),
    ({"Grade-Format": "0"}, b'[{"user_id":"x","spp":1}]', False),
    ({"Grade-Format": "x"}, b'[{"user_id":"x","spp":1}]', False),
]
# Header blocks, and whether the message is applied.
HEADER_BLOCKS = [
    (b"NATS/1.0\r\n\r\n", True),
    (b"NATS/1.0", True),
    (b"NATS/1.0 200 OK\n\n", True),
    (b"NATS/1.0\r\nTrace-Id: abc\r\n\r\n", True),
    (b"NATS/1.0\r\n\r\nGrade-Format:\xc2\xa01\t\r\n\r\n", True),
    (b"NATS/1.0\r\nGrade-Format: 1\r\nGrade-Format: 99\r\ngrade-format: x\r\n\r\n", True),
    (b"NATS/1.0\r\nA: b\r\n Grade-Format: 99\r\n: \0\x1c", True),
    (b"NATS/1.0\r\nGrade-Format:\r\n 1\r\n\r\n", False),
    (b"NATS/1.0\r\nGrade-Format: \x1c1\r\n\r\n", False),
    (b"NATS/1.0\r\nTrace Id: 1\r\n\r\n", False),
    (b"NATS/1.0\r\nA : b\r\n\r\n", False),
    (b"NATS/1.0\r\nbad header line\r\n\r\n", False),
    (b"NATS/1.0\r\nA: \xe9\r\n\r\n", False),
    (b"NATS/1.0\r\nA: b\rc\r\n\r\n", False),
    (b"nats/1.0\r\n\r\n", False),
    (b"NATS/2.0\r\n\r\n", False),
    (b"A: b\r\n\r\n", False),
    (b"NATS/1.0 503\n\n", False),
    (b"NATS/1.0 100 Idle Heartbeat\n\n", False),
]


def ask(node, port, path, body=None):
    headers = {"Authorization": f"Basic {AUTH}", "Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(node.urls[port] + path, body, headers), timeout=30)


def write(node, **patch):
    return int(ask(node, "write", "/set", json.dumps(patch).encode()).headers["Grade-Position"])


def backup(node):
    return ask(node, "write", "/backup").read()


def members(data):
    count = at = 0
    while at < len(data):
        *_, at = read.member(data, at)
        count += 1
    return count


def is_rejected(data):
    try:
        read.read_backup(data)
    except read.Unreadable:
        return True
    return False


async def stored(broker, position):
    """The message at `position`, with its header block unparsed."""
    request = json.dumps({"seq": position}).encode()
    answer = await broker.request(f"$JS.API.STREAM.MSG.GET.{STREAM}", request)
    return json.loads(answer.data)["message"]


def publish_raw(url, messages):
    """Publishes header blocks as bytes; returns the position of the last message."""
    address = urllib.parse.urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 30) as connection:
        broker = connection.makefile("rwb")
        broker.write(b'CONNECT {"headers":true,"verbose":false}\r\nSUB ack 1\r\n')
        for block, payload in messages:
            size = len(block), len(block) + len(payload)
            broker.write(b"HPUB %s ack %d %d\r\n" % (SUBJECT.encode(), *size) + block + payload + b"\r\n")
            broker.flush()
            while not (line := broker.readline()).startswith(b"MSG ack"):
                assert line.startswith((b"INFO", b"PING")), line
            ack = json.loads(broker.readline())
        return ack["seq"]


class StreamReader:
    """The state of the stream up to `position`."""

    def __init__(self, url):
        self.url, self.position, self.state, self.digests, self.checkpoints = url, 0, {}, {0: "0" * 32}, []
        self.chains = {}

    def read_through(self, through, digests=True):
        asyncio.run(self.read_messages(through, digests))

    async def read_messages(self, through, digests):
        broker = await nats.connect(self.url)
        for position in range(self.position + 1, through + 1):
            message = await stored(broker, position)
            headers, payload = read.parse_message(message)
            batch = read.parse_batch(headers, payload)
            read.apply(self.state, batch or [])
            if self.chains:
                applied = (headers, payload) if batch is not None else ()
                chain = read.next_chain(self.chains[position - 1], position, read.stored_ns(message), *applied)
                self.chains[position] = chain
            self.position = position
            if digests:
                self.digests[position] = read.digest(self.state)
            if "Grade-Batch" in (headers or {}) and "Grade-Checkpoint" in headers:
                self.checkpoints.append((position, *read.parse_checkpoint(headers)))
        await broker.close()

    def publish(self, messages):
        """Publishes messages; returns the position of the last one."""
        async def publish():
            broker = await nats.connect(self.url)
            for headers, payload in messages:
                stored = await broker.jetstream().publish(SUBJECT, payload, headers=headers)
            await broker.close()
            return stored.seq
        return asyncio.run(publish())


class Protocol(unittest.TestCase):
    def setUp(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.broker = self.enterContext(Broker(directory / "nats", "default"))
        self.nodes = []
        for n in range(2):
            home = directory / str(n)
            home.mkdir()
            flags = ("--nats-url", self.broker.url, "--data-dir", home / "data", "--checkpoint-interval=100ms")
            self.nodes.append(self.enterContext(Node(home, *flags)))
        self.directory = directory

    def status_at(self, at_least=0):
        """The status of the first node once it has applied this position."""
        def behind():
            self.status = self.nodes[0].status()
            return self.status["position"] < at_least and self.status
        until(behind)
        return self.status

    def fill(self):
        for n, user in enumerate(IDS):
            for field, value in zip(read.FIELDS, (n, -n, 2**63 - 1, -2**63)):
                write(self.nodes[n % 2], **{"user_id": user, field: value})
        write(self.nodes[0], user_id="zeros", spp=0)
        return write(self.nodes[1], user_id="alice", spp=0)

    def test_the_reader_has_the_state_of_a_node(self):
        reader = StreamReader(self.broker.url)
        reader.chains[0] = read.first_chain(self.status_at()["log_id"])
        self.fill()
        before = self.nodes[0].metric("gradestore_log_poisoned_total")
        reader.publish((headers, payload) for headers, payload, _ in THIRD_PARTY_MESSAGES)
        end = write(self.nodes[0], user_id="last", spp=1)
        status = self.status_at(end)
        reader.read_through(status["position"])
        self.assertEqual(len(reader.state), status["records"])
        self.assertEqual(reader.digests[status["position"]], status["digest"])
        self.assertEqual(f"{reader.chains[status['position']]:032x}", status["chain"])
        skipped = sum(read.parse_batch(headers or {}, payload) is None for headers, payload, _ in THIRD_PARTY_MESSAGES)
        # The empty array is a batch, although it sets nothing.
        self.assertEqual(skipped, sum(not sets for *_, sets in THIRD_PARTY_MESSAGES) - 1)
        self.assertEqual(self.nodes[0].metric("gradestore_log_poisoned_total") - before, skipped)

        # The checkpoints of the nodes have the same digests.
        def no_checkpoint():
            reader.read_through(self.status_at()["position"])
            return not [position for _, position, *_ in reader.checkpoints if position > end]

        until(no_checkpoint)
        for at, position, chain, digest in reader.checkpoints:
            self.assertEqual(digest, reader.digests[position], f"in message {at}")
            if position > 0:
                self.assertEqual(chain, f"{reader.chains[position]:032x}", f"in message {at}")

        # A newer format stops both.
        newer = reader.publish([({"Grade-Format": "99"}, b'[{"user_id":"alice","spp":7}]')])
        until(lambda: self.nodes[0].ready())
        with self.assertRaises(read.Newer):
            reader.read_through(newer)
        self.assertEqual(self.nodes[0].status()["position"], newer - 1)
        self.assertEqual(reader.position, newer - 1)

    def test_header_blocks_are_parsed_like_by_a_node(self):
        reader = StreamReader(self.broker.url)
        self.status_at(write(self.nodes[0], user_id="first", spp=1))
        before = self.nodes[0].metric("gradestore_log_poisoned_total")
        blocks = [(block, f'[{{"user_id":"{n}","spp":{n}}}]'.encode()) for n, (block, _) in enumerate(HEADER_BLOCKS)]
        self.status_at(publish_raw(self.broker.url, blocks))
        end = write(self.nodes[0], user_id="last", spp=1)
        status = self.status_at(end)
        reader.read_through(status["position"])
        applied = {str(n) for n, (_, applies) in enumerate(HEADER_BLOCKS) if applies}
        self.assertEqual(set(reader.state), applied | {"first", "last"})
        self.assertEqual(reader.digests[status["position"]], status["digest"])
        skipped = len(HEADER_BLOCKS) - len(applied)
        self.assertEqual(self.nodes[0].metric("gradestore_log_poisoned_total") - before, skipped)

    def test_a_resent_batch_is_stored_once(self):
        reader = StreamReader(self.broker.url)
        headers = {"Grade-Format": "1", "Grade-Batch": "a" * 32 + "-1", "Nats-Msg-Id": "a" * 32 + "-1"}
        reader.publish([(headers, b'[{"user_id":"alice","spp":1}]')] * 3)
        self.status_at(write(self.nodes[0], user_id="bob", spp=1))
        end = self.status_at()["position"]
        reader.read_through(end)
        ids = asyncio.run(self.batch_ids(end))
        self.assertEqual(ids.count("a" * 32 + "-1"), 1)
        # The sequences of each writer are increasing.
        writers = {batch_id.rsplit("-", 1)[0] for batch_id in ids}
        for writer in writers:
            numbers = [int(batch_id.rsplit("-", 1)[1]) for batch_id in ids if batch_id.startswith(writer)]
            self.assertEqual(numbers, sorted(set(numbers)))

    async def batch_ids(self, end):
        broker = await nats.connect(self.broker.url)
        found = [(await broker.jetstream().get_msg(STREAM, position)).headers for position in range(1, end + 1)]
        await broker.close()
        for headers in found:
            self.assertEqual(headers["Nats-Msg-Id"], headers["Grade-Batch"])
        return [headers["Nats-Msg-Id"] for headers in found]

    def test_a_backup_has_the_documented_bytes(self):
        reader = StreamReader(self.broker.url)
        self.status_at(self.fill())
        data = backup(self.nodes[0])
        head, records, end = read.read_backup(data)
        self.assertEqual(head["log_id"], self.nodes[0].status()["log_id"])
        # No client writes, but a checkpoint may be appended meanwhile.
        self.assertLessEqual(head["position"], end["position"])
        reader.read_through(end["position"])
        self.assertEqual(records, reader.state)
        self.assertEqual(end["digest"], reader.digests[end["position"]])
        # It is plain CSV to other tools.
        rows = list(csv.DictReader(io.StringIO(gzip.decompress(data).decode(), newline="")))
        self.assertEqual({row.pop("user_id"): [int(row[field]) for field in read.FIELDS] for row in rows}, records)
        # The documented bytes that the reader ignores.
        self.assertEqual(data[3], 0x0c)
        self.assertEqual(data[8:10], b"\x00\xff")
        self.assertEqual(int.from_bytes(data[4:8], "little"), head["created_ns"] // 10**9)
        extra_bytes = int.from_bytes(data[10:12], "little")
        name, after = data[12 + extra_bytes:].split(b"\0", 1)
        created = datetime.datetime.fromtimestamp(head["created_ns"] // 10**9, datetime.UTC)
        self.assertEqual(name.decode(), created.strftime("grades-%Y%m%dT%H%M%SZ.csv"))
        self.assertEqual(after[0], 1)

    def test_any_change_of_a_backup_is_detected(self):
        self.status_at(self.fill())
        data = backup(self.nodes[0])
        self.assertFalse(is_rejected(data))
        for at in range(len(data)):
            self.assertTrue(is_rejected(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:]), at)
            self.assertTrue(is_rejected(data[:at]), at)
        self.assertTrue(is_rejected(data + b"\0"))
        self.assertTrue(is_rejected(data + data))

    def test_a_backup_under_writes_and_the_log_after_it_give_the_state(self):
        self.status_at(self.fill())
        for first in range(0, 40_000, 1000):
            entries = [{"user_id": f"user-{n}", "spp": n} for n in range(first, first + 1000)]
            StreamReader(self.broker.url).publish([(None, json.dumps(entries).encode())])
        stop = threading.Event()

        def keep_writing():
            n = 0
            while not stop.is_set():
                n += 1
                write(self.nodes[1], user_id=f"user-{n * 7919 % 40_000}", spp=-n)

        writer = threading.Thread(target=keep_writing)
        writer.start()
        try:
            overlapping = []

            def no_overlap():
                head, records, end = read.read_backup(backup(self.nodes[0]))
                overlapping[:] = [head, records, end]
                return head["position"] == end["position"] and "nothing was written during a backup"

            until(no_overlap)
        finally:
            stop.set()
            writer.join()
        head, records, end = overlapping
        self.assertGreater(members(backup(self.nodes[0])), 3)
        status = self.status_at(write(self.nodes[0], user_id="last", spp=1))
        reader = StreamReader(self.broker.url)
        reader.position, reader.state = head["position"], records
        reader.read_through(status["position"], digests=False)
        self.assertEqual(read.digest(reader.state), status["digest"])

    def test_the_reader_of_the_document_reads_a_backup(self):
        self.status_at(self.fill())
        file = self.directory / "grades.csv.gz"
        file.write_bytes(backup(self.nodes[0]))
        result = subprocess.run([sys.executable, ROOT / "docs" / "internals" / "read.py", file], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(json.loads(result.stdout)["records"], len(IDS) + 1)
        result = subprocess.run([PROGRAM, "verify", file], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)


class Operations(unittest.TestCase):
    def test_the_steps_of_a_restore_into_a_cluster(self):
        """The steps of docs/operations/backup.md, under "Into a cluster"."""
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        broker = self.enterContext(Broker(directory / "nats", "default"))
        homes = [directory / str(n) for n in range(2)]

        def start(home, *flags):
            return Node(home, "--nats-url", broker.url, "--data-dir", home / "data", *flags)

        def stop(nodes):
            for node in nodes:
                node.__exit__()

        for home in homes:
            home.mkdir()
        nodes = [start(home) for home in homes]
        self.addCleanup(lambda: stop(nodes))
        write(nodes[0], user_id="alice", spp=1)
        file = directory / "grades.csv.gz"
        file.write_bytes(backup(nodes[0]))
        # The restore must undo this write, which is in the snapshots of both.
        write(nodes[0], user_id="alice", spp=666)
        stop(nodes)

        async def remove():
            client = await nats.connect(broker.url)
            await client.jetstream().delete_stream(STREAM)
            await client.close()

        asyncio.run(remove())
        for home in homes:
            (home / "data").rename(home / "moved-away")
        nodes[:] = [start(homes[0], "--restore-from", file)]
        nodes.append(start(homes[1]))
        for node in nodes:
            self.assertEqual(json.load(ask(node, "read", "/get?user_id=alice"))["spp"], 1)
        # Restarted without --restore-from.
        stop(nodes[:1])
        nodes[0] = start(homes[0])
        position = write(nodes[0], user_id="alice", spp=2)
        for node in nodes:
            found = urllib.request.Request(f"{node.urls['read']}/get?user_id=alice", headers={"Grade-Position": str(position)})
            self.assertEqual(json.load(urllib.request.urlopen(found))["spp"], 2)


class ProtocolExamples(unittest.TestCase):
    text = (ROOT / "docs" / "internals" / "protocol.md").read_text()

    def test_the_digest(self):
        self.assertEqual(read.digest({"alice": [0, 5, 0, 0]}), "dd6a0570c454b97f66aac1625bf5536d")
        self.assertIn("dd6a0570c454b97f66aac1625bf5536d", self.text)

    def test_a_batch_with_deletions(self):
        state = {}
        batch = b'[{"user_id":"a","spp":1},{"delete":"a"},{"delete":"nobody"},{"user_id":"b"}]'
        read.apply(state, read.parse_batch({"Grade-Format": "1"}, batch))
        self.assertEqual(state, {"b": [0, 0, 0, 0]})

    def test_the_message(self):
        headers, payload = self.text.split("### A message\n\n```\n")[1].split("\n```")[0].split("\n\n")
        headers = dict(line.split(": ") for line in headers.splitlines())
        self.assertEqual([entry["user_id"] for entry in read.parse_batch(headers, payload.encode())], ["alice", "bob"])


def blocks(page):
    """The fenced code blocks of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


class Clients(unittest.TestCase):
    """The program of each page in docs/clients writes on one node and reads on another."""

    def setUp(self):
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        broker = self.enterContext(Broker(self.directory / "nats", "default"))
        self.nodes = []
        for n in range(2):
            home = self.directory / str(n)
            home.mkdir()
            self.nodes.append(self.enterContext(Node(home, "--nats-url", broker.url, "--data-dir", home / "data")))

    def run_program(self, page, language, file, *command):
        page_blocks = blocks(ROOT / "docs" / "clients" / page)
        (program,) = (text for name, text in page_blocks if name == language)
        (printed,) = (text for name, text in page_blocks if name == "")
        (self.directory / file).write_text(program)
        # The first node of each list is down, so every first request is retried.
        down = f"http://127.0.0.1:{free_port()}"
        settings = {
            "GRADES_WRITE": f"{down},{self.nodes[0].urls['write']}",
            "GRADES_READ": f"{down},{self.nodes[1].urls['read']}",
            "GRADES_PASSWORD": PASSWORD,
        }
        done = subprocess.run([*command, file], cwd=self.directory, env=os.environ | settings, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout, printed)
        self.assertEqual(self.nodes[0].status()["records"], 1 + 2500)

    def test_python(self):
        self.run_program("python.md", "python", "client.py", sys.executable)

    @unittest.skipUnless(shutil.which("node"), "needs Node.js")
    def test_javascript(self):
        self.run_program("javascript.md", "javascript", "client.mjs", "node")

    @unittest.skipUnless(shutil.which("go"), "needs Go")
    def test_go(self):
        self.run_program("go.md", "go", "main.go", "go", "run")

    @unittest.skipUnless(shutil.which("java"), "needs Java")
    def test_java(self):
        self.run_program("java.md", "java", "Client.java", "java")


class Readme(unittest.TestCase):
    page = ROOT / "README.md"
    # The parts of the repository that its commands use.
    PARTS = ("Makefile", "load", "tests", ".tools")
    # Commands that run until they are stopped, and the ops ports on which they become ready.
    SERVERS = {
        "GRADESTORE_PASSWORD=secret cargo run --release": (8082,),
        "make cluster": (18082, 28082, 38082),
        "gradestore serve": (9082,),
    }
    # The program is built already, and on the PATH as a shim.
    SKIPPED = ("cargo build", "sudo install")
    HEAD = """set -eu
ip link set lo up
ready() {
    for port; do
        tries=0
        until curl -fso /dev/null "http://127.0.0.1:$port/readyz/write"; do
            tries=$((tries + 1)); test $tries -lt 300; sleep 0.1
        done
    done
}
"""

    def test_is_short_and_names_the_main_commands(self):
        text = self.page.read_text()
        self.assertLessEqual(text.count("\n"), 150)
        self.assertIn("cargo run --release", text)
        self.assertIn("make test", text)

    def test_its_commands_run_in_order(self):
        """In network and PID namespaces, because the README has fixed ports and kills a process by its name."""
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        for part in self.PARTS:
            (directory / part).symlink_to(ROOT / part)
        program = Path(PROGRAM).resolve()
        shims = directory / "shims"
        shims.mkdir()
        for name, text in {"gradestore": f'exec {program} "$@"', "cargo": f'test "$1" = run && exec {program}'}.items():
            (shims / name).write_text(f"#!/bin/sh\n{text}\n")
            (shims / name).chmod(0o755)

        script, printed, servers, skipped = [self.HEAD], [], 0, 0
        page_blocks = blocks(self.page)
        for n, (language, text) in enumerate(page_blocks):
            if language == "python":
                (directory / f"{n}.py").write_text(text)
                script.append(f"python3 {n}.py >{n}.out")
            elif language == "sh":
                for k, command in enumerate(re.split(r"(?<!\\)\n", text.strip())):
                    if command.startswith(self.SKIPPED):
                        skipped += 1
                        continue
                    (directory / f"{n}-{k}.sh").write_text(command)
                    ports = [ports for start, ports in self.SERVERS.items() if command.startswith(start)]
                    if ports:
                        servers += 1
                        script.append(f"bash {n}-{k}.sh >{n}-{k}.log 2>&1 &\nready {' '.join(map(str, *ports))}")
                    else:
                        script.append(f"bash {n}-{k}.sh >>{n}.out")
            elif language == "json":
                # The output of the block before it.
                printed.append((n - 1, text))
        script.append("curl -s 'http://127.0.0.1:9081/get?user_id=alice' >restored.out")
        (directory / "all.sh").write_text("\n".join(script))
        self.assertEqual((servers, skipped), (len(self.SERVERS), len(self.SKIPPED)))

        env = {name: value for name, value in os.environ.items() if not name.startswith("GRADESTORE_")}
        env |= {"PATH": f"{shims}:{env['PATH']}", "PROGRAM": str(program)}
        namespaces = ("--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        done = subprocess.run(["unshare", *namespaces, "bash", "all.sh"], cwd=directory, env=env, capture_output=True, text=True)
        logs = "\n".join(f"{log.name}: {log.read_text()}" for log in directory.glob("*.log"))
        self.assertEqual(done.returncode, 0, done.stderr + logs)
        self.assertGreater(len(printed), 1)
        for n, text in printed:
            self.assertEqual((directory / f"{n}.out").read_text().splitlines()[-1], text.strip())
        (python,) = (n for n, (language, _) in enumerate(page_blocks) if language == "python")
        self.assertIn("'spp': 6", (directory / f"{python}.out").read_text())
        self.assertEqual(json.loads((directory / "restored.out").read_text())["spp"], 6)


class Troubleshooting(unittest.TestCase):
    def test_each_message_is_in_the_source(self):
        source = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.rs")))
        # The compiler joins continued string literals like this.
        source = re.sub(r"\\\n\s*", "", source)
        text = (ROOT / "docs" / "operations" / "troubleshooting.md").read_text()
        found = 0
        for section in text.split("\n## "):
            if "\n| message" not in section:
                continue
            for message in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE):
                pattern = r'[^"]*?'.join(re.escape(part.strip()) for part in message.split("..."))
                self.assertRegex(source, pattern)
                found += 1
        self.assertGreater(found, 20)


def anchors(page):
    """The anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


class Links(unittest.TestCase):
    def test_each_link_has_a_target(self):
        listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
        links = 0
        for page in (ROOT / name for name in listed.stdout.split()):
            for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
                file, _, anchor = link.partition("#")
                if "://" in file:
                    continue
                links += 1
                to = (page.parent / file).resolve() if file else page
                self.assertTrue(to.exists(), f"{page.relative_to(ROOT)}: {link}")
                if anchor:
                    self.assertIn(anchor, anchors(to), f"{page.relative_to(ROOT)}: {link}")
        self.assertGreater(links, 50)


if __name__ == "__main__":
    unittest.main()
