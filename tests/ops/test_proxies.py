"""Tests of docs/operations/proxies.md: each configuration in the real proxy, in front of three real nodes."""

import http.client
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "load"), str(ROOT / "dashboards"), str(ROOT / "tests" / "ops")]

from faults import Proxy as NatsProxy  # noqa: E402
from measure import AUTH, PROGRAM, Broker, Node, end_with_parent, free_port  # noqa: E402
from programs import UNPACKED, environment, program  # noqa: E402
from show import until  # noqa: E402
from test_docs import blocks  # noqa: E402

PAGE = ROOT / "docs" / "operations" / "proxies.md"
HOST = "grades.example.org"
NAMES = ("one", "two", "three")
# Random ids, so that a backup is larger than the buffers between a node and a client.
USERS = 30_000
ID_BYTES = 240
WAIT_S_MAX = 20


class Proxy:
    """A proxy with the configuration of the document, on its own port."""

    def __init__(self, directory, nodes, name):
        self.directory, self.name, self.port = directory, name, free_port()
        (text,) = (text for language, text in blocks(PAGE) if language == self.language)
        for node_name, node in zip(NAMES, nodes):
            for port, number in (("write", 8080), ("read", 8081)):
                address = node.urls[port].removeprefix("http://")
                assert f"{node_name}:{number}" in text, f"{node_name}:{number} is missing"
                text = text.replace(f"{node_name}:{number}", address)
        self.file = directory / name
        self.file.write_text(self.config(re.sub(r"/etc/(nginx|haproxy|apache2)/", f"{directory}/", text)))
        env = environment(HOME=str(directory))
        self.log = directory / "log"
        with open(self.log, "w") as log:
            self.child = subprocess.Popen(self.command(), env=env, stdout=log, stderr=log, preexec_fn=end_with_parent)

    def until_it_serves(self):
        def not_yet():
            assert self.child.poll() is None, self.log.read_text()
            with suppress(OSError, http.client.HTTPException):
                return self.get("/get?user_id=nobody").status != 404 and "still starting"
            return "no answer yet"
        until(not_yet)

    def connect(self):
        """A new connection."""
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(HOST, timeout=WAIT_S_MAX, context=context)
        raw = socket.create_connection(("127.0.0.1", self.port), WAIT_S_MAX)
        connection.sock = context.wrap_socket(raw, server_hostname=HOST)
        return connection

    def get(self, path, connection=None, **headers):
        return self.ask("GET", path, None, headers, connection)

    def set(self, body, connection=None, kind="application/json"):
        return self.ask("POST", "/set", body, {"Content-Type": kind, "Authorization": f"Basic {AUTH}"}, connection)

    def ask(self, method, path, body, headers, connection=None):
        """The response, with its body as `text`; over a new connection by default."""
        used = connection or self.connect()
        used.request(method, path, body, headers)
        response = used.getresponse()
        response.text = response.read()
        if not connection:
            used.close()
        return response

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()


class Nginx(Proxy):
    language = "nginx"

    def config(self, text):
        text = text.replace("listen 443", f"listen 127.0.0.1:{self.port}")
        user = "user root;\n" if os.geteuid() == 0 else ""
        paths = "".join(f"{kind}_temp_path {self.directory}/{kind};\n"
                        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        return f"{user}daemon off;\npid {self.directory}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{text}}}\n"

    def command(self):
        return [program("nginx"), "-c", self.file, "-e", "stderr", "-p", self.directory]


class Haproxy(Proxy):
    language = "haproxy"

    def config(self, text):
        return text.replace("bind :443", f"bind 127.0.0.1:{self.port}")

    def command(self):
        return [program("haproxy"), "-db", "-f", self.file]


class Apache(Proxy):
    language = "apache"
    # Those that the document names, and what every configuration needs.
    MODULES = ("mpm_event", "authz_core")

    def config(self, text):
        named = PAGE.read_text().split("With the modules ")[1].split(".\n")[0]
        modules = [*self.MODULES, *re.findall(r"`(\w+)`", named)]
        dirs = [UNPACKED / "lib/apache2/modules", Path("/usr/lib/apache2/modules")]
        (modules_dir, *_) = (path for path in dirs if path.exists())
        # Debian's has the watchdog built in.
        files = {name: modules_dir / f"mod_{name}.so" for name in modules if name != "watchdog"}
        loads = "".join(f"LoadModule {name}_module {file}\n" for name, file in files.items())
        text = text.replace("*:443", f"127.0.0.1:{self.port}")
        user = "User nobody\nGroup nogroup\n" if os.geteuid() == 0 else ""
        return (f"{user}ServerRoot {self.directory}\nPidFile {self.directory}/pid\nDefaultRuntimeDir {self.directory}\n"
                f"ServerName localhost\nErrorLog /dev/stderr\nListen 127.0.0.1:{self.port}\n{loads}{text}")

    def command(self):
        return [program("apache2"), "-D", "FOREGROUND", "-f", self.file]


class Caddy(Proxy):
    language = "caddyfile"

    def config(self, text):
        # Its own certificates instead of those of a public authority. HTTP/3 would need the UDP port.
        return (f"{{\nservers {{\nprotocols h1 h2\n}}\nadmin off\nhttps_port {self.port}\nhttp_port {free_port()}\nlocal_certs\nskip_install_trust\n"
                f"storage file_system {self.directory}\n}}\n{text}")

    def command(self):
        return [program("caddy"), "run", "--config", self.file, "--adapter", "caddyfile"]


class Proxies(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        broker = cls.enterClassContext(Broker(cls.directory / "nats", "default"))
        cls.to_nats = NatsProxy(broker.address)
        cls.nodes = []
        for name in NAMES:
            home = cls.directory / name
            home.mkdir()
            url = cls.to_nats.url if name == "three" else broker.url
            # The nodes listen on loopback addresses, and the proxies pass the name on.
            flags = ("--nats-url", url, "--data-dir", home / "data", "--allowed-host", HOST)
            cls.nodes.append(cls.enterClassContext(Node(home, *flags)))
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                   "-subj", f"/CN={HOST}", "-keyout", cls.directory / "grades.key", "-out", cls.directory / "grades.crt"]
        subprocess.run(command, check=True, capture_output=True)
        pem = (cls.directory / "grades.crt").read_text() + (cls.directory / "grades.key").read_text()
        (cls.directory / "grades.pem").write_text(pem)

    def start(self, kind):
        directory = self.directory / kind.language
        directory.mkdir()
        for file in self.directory.glob("grades.*"):
            shutil.copy(file, directory)
        proxy = self.enterContext(kind(directory, self.nodes, "config"))
        proxy.until_it_serves()
        return proxy

    def connections(self):
        """Connections that the nodes have accepted on their read ports."""
        name = re.escape('gradestore_http_connections_accepted_total{port="read"}')
        return sum(node.metric(name) for node in self.nodes)

    def assert_requests_pass(self, proxy):
        connection = proxy.connect()
        self.addCleanup(connection.close)
        for n in range(20):
            response = proxy.set(json.dumps({"user_id": "alice", "spp": n}), connection)
            self.assertEqual(response.status, 204, response.text)
            # Any node may answer.
            position = {"Grade-Position": response.headers["Grade-Position"]}
            response = proxy.ask("GET", "/get?user_id=alice", None, position, connection)
            self.assertEqual(json.loads(response.text)["spp"], n)
        self.assertEqual(proxy.get("/status", connection).status, 404)
        # 16 KiB in one line.
        ids = "&".join(f"user_ids={n:013}" for n in range(700))
        response = proxy.get(f"/get?{ids}", connection)
        self.assertEqual((response.status, len(json.loads(response.text))), (200, 700))

    def assert_lines_and_backup_pass(self, proxy, cuts_answers):
        lines = [json.dumps({"user_id": secrets.token_hex(ID_BYTES // 2), "spp": n}) + "\n" for n in range(USERS)]
        upload = "".join(lines).encode()
        for body in (upload, (line.encode() for line in lines)):
            response = proxy.set(body, kind="application/x-ndjson")
            self.assertEqual((response.status, json.loads(response.text)["accepted"]), (200, USERS))
        # An error in a line comes back although the body is not read to its end. curl reads it while it sends.
        file = proxy.directory / "lines"
        file.write_bytes(b'{"user_id":""}\n' + upload)
        url = f"https://{HOST}:{proxy.port}/set"
        answered = subprocess.run(
            ["curl", "-sk", "--resolve", f"{HOST}:{proxy.port}:127.0.0.1", "-H", f"Authorization: Basic {AUTH}",
             "-H", "Content-Type: application/x-ndjson", "-H", "Expect:", "--data-binary", f"@{file}", url],
            capture_output=True, text=True)
        if not cuts_answers:
            self.assertIn("line 1", answered.stdout, answered)

        response = proxy.get("/backup", Authorization=f"Basic {AUTH}")
        self.assertEqual(response.status, 200)
        verified = self.verify(proxy, response.text)
        self.assertEqual(verified.returncode, 0, verified.stderr)

    def assert_connections_are_reused(self, proxy):
        """Also for clients without keep-alive."""
        requests, began = 200, time.monotonic()
        before = self.connections()
        for _ in range(requests):
            self.assertEqual(proxy.get("/get?user_id=alice").status, 200)
        # A health check of each node every second may use a connection of its own.
        checks = len(self.nodes) * (time.monotonic() - began + 1)
        self.assertLess(self.connections() - before, checks + requests / 4)

    def assert_a_node_that_is_not_ready_is_left_out(self, proxy, rejected_max):
        """Node three cannot reach NATS: it serves reads and rejects writes."""
        three = self.nodes[2]
        rejected = 'gradestore_http_requests_total{route="/set",status="503"}'
        reads = 'gradestore_http_requests_total{route="/get",status="200"}'
        self.to_nats.reject()
        self.addCleanup(self.to_nats.accept_again)
        until(lambda: three.ready() and "still ready for writes")

        def is_used():
            before = self.count(three, rejected)
            for n in range(15):
                response = proxy.set(json.dumps({"user_id": "alice", "spp": n}))
                if response.status != 204:
                    return f"{response.status} {response.text}"
            return self.count(three, rejected) - before > rejected_max and "it still gets writes"

        until(is_used)
        before = self.count(three, reads)
        for _ in range(15):
            self.assertEqual(proxy.get("/get?user_id=alice").status, 200)
        self.assertGreater(self.count(three, reads), before, "it serves reads")
        self.to_nats.accept_again()
        until(lambda: not three.ready() and "not ready")

        # It gets writes again.
        answered = 'gradestore_http_requests_total{route="/set",status="204"}'
        before = self.count(three, answered)

        def is_unused():
            self.assertEqual(proxy.set(b'{"user_id":"alice","spp":1}').status, 204)
            return self.count(three, answered) == before and "it gets no writes"

        until(is_unused)

    def count(self, node, name):
        """A counter; 0 before its first increment."""
        try:
            return node.metric(re.escape(name))
        except TypeError:
            return 0

    def assert_a_killed_node_is_noticed(self, proxy, cuts_answers):
        """Kills the node that sends a backup. The client or `gradestore verify` notices, and other requests go to
        other nodes."""
        connection = proxy.connect()
        self.addCleanup(connection.close)
        connection.request("GET", "/backup", headers={"Authorization": f"Basic {AUTH}"})
        response = connection.getresponse()
        self.assertEqual(response.status, 200)
        data = response.read(1000)
        (sending,) = (node for node in self.nodes if node.metric("gradestore_backups_running") == 1)
        sending.kill()
        try:
            data += response.read()
            is_noticed = False
        except (http.client.IncompleteRead, ConnectionError, ssl.SSLError):
            is_noticed = True
        if not cuts_answers:
            self.assertTrue(is_noticed)
        self.assertNotEqual(self.verify(proxy, data).returncode, 0)
        for n in range(15):
            self.assertEqual(proxy.get("/get?user_id=alice").status, 200)
        sending.start()
        sending.until_ready()

    def verify(self, proxy, data):
        file = proxy.directory / "grades.csv.gz"
        file.write_bytes(data)
        return subprocess.run([PROGRAM, "verify", file], capture_output=True, text=True)

    def assert_the_configuration_works(self, kind, rejected_max=0, cuts_answers=False):
        proxy = self.start(kind)
        self.assert_requests_pass(proxy)
        self.assert_lines_and_backup_pass(proxy, cuts_answers)
        self.assert_connections_are_reused(proxy)
        self.assert_a_node_that_is_not_ready_is_left_out(proxy, rejected_max)
        self.assert_a_killed_node_is_noticed(proxy, cuts_answers)

    def test_nginx(self):
        # Without health checks it tries the node every ten seconds.
        self.assert_the_configuration_works(Nginx, rejected_max=1)

    def test_haproxy(self):
        self.assert_the_configuration_works(Haproxy)

    def test_apache(self):
        self.assert_the_configuration_works(Apache)

    def test_caddy(self):
        # Caddy 2.6 ends a truncated response like a complete one, and may truncate one that comes during an upload.
        self.assert_the_configuration_works(Caddy, cuts_answers=True)


if __name__ == "__main__":
    unittest.main()
