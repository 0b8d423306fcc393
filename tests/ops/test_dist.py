"""Tests of the output of `make dist`: the program runs in an empty root directory, and the package contains it."""

import os
import subprocess
import sys
import tempfile
import unittest
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "target" / "packages"
sys.path[:0] = [str(ROOT / "load"), str(ROOT / "dashboards")]

from measure import AUTH, PASSWORD, Broker, free_port  # noqa: E402
from show import until  # noqa: E402


def one(pattern):
    [path] = DIST.glob(pattern)
    return path


class Dist(unittest.TestCase):
    def test_the_program_runs_in_an_empty_root(self):
        root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        broker = self.enterContext(Broker(Path(self.enterContext(tempfile.TemporaryDirectory())) / "nats", "default"))
        (root / "data").mkdir()
        # A name that only this file can resolve.
        (root / "etc").mkdir()
        (root / "etc" / "hosts").write_text("127.0.0.1 broker\n")
        program = root / "gradestore"
        os.link(one("gradestore-*-linux-*"), program)
        write, read, ops = (f"127.0.0.1:{free_port()}" for _ in range(3))
        command = ["unshare", "--map-root-user", f"--root={root}", "/gradestore", "serve", "--data-dir", "/data",
                   "--write-addr", write, "--read-addr", read, "--ops-addr", ops,
                   "--nats-url", f"nats://broker:{broker.address[1]}"]
        node = subprocess.Popen(command, env={"GRADESTORE_PASSWORD": PASSWORD}, stderr=subprocess.PIPE)
        self.addCleanup(node.wait)
        self.addCleanup(node.kill)

        def not_ready():
            try:
                urllib.request.urlopen(f"http://{ops}/readyz/write", timeout=5)
            except OSError as error:
                return str(error)
        until(not_ready)
        body = urllib.request.Request(f"http://{write}/set", b'{"user_id":"alice","spp":5}',
                                      {"content-type": "application/json", "authorization": f"Basic {AUTH}"})
        self.assertEqual(urllib.request.urlopen(body, timeout=5).status, 204)
        answer = urllib.request.urlopen(f"http://{read}/get?user_id=alice", timeout=5).read()
        self.assertIn(b'"spp":5', answer)
        node.terminate()
        _, log = node.communicate(timeout=60)
        self.assertEqual(node.returncode, 0, log)
        self.assertEqual(sorted(path.name for path in root.iterdir()), ["data", "etc", "gradestore"])

    def test_the_package_installs_the_program_and_its_unit(self):
        package = one("gradestore_*.deb")
        root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        subprocess.run(["dpkg-deb", "--raw-extract", package, root], check=True)
        self.assertEqual((root / "usr/bin/gradestore").read_bytes(), one("gradestore-*-linux-*").read_bytes())
        unit = (root / "usr/lib/systemd/system/gradestore.service").read_text()
        self.assertIn("ExecStart=/usr/bin/gradestore serve\n", unit)
        for script in ("postinst", "postrm"):
            subprocess.run(["sh", "-n", root / "DEBIAN" / script], check=True)

    def test_the_sums_are_those_of_the_files(self):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=DIST, check=True)
        listed = {line.split()[1] for line in (DIST / "SHA256SUMS").read_text().splitlines()}
        self.assertEqual(listed, {path.name for path in DIST.iterdir()} - {"SHA256SUMS"})


if __name__ == "__main__":
    unittest.main()
