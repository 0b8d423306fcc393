#!/usr/bin/env python3
"""Runs the k6 scripts and oha on one node and on a cluster of three, which it starts. Saves their output in results/,
below the command. Exit code 1 if a threshold was missed or a request failed.

    load/install.sh
    cargo build --release
    python3 load/k6.py
    python3 load/k6.py smoke spike oha
"""

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import generate
from measure import PASSWORD, ROOT, Broker, Node

RESULTS = ROOT / "load" / "results"
K6, OHA = ".tools/bin/k6", ".tools/bin/oha"
# The settings of each script besides NODES.
SCRIPTS = {
    "smoke": {"DURATION": "15s"},
    "read-heavy": {"DURATION": "15s"},
    "write-heavy": {"DURATION": "15s"},
    "spike": {"DURATION": "15s"},
    "backup": {"DURATION": "15s", "USERS": "50000"},
    "soak": {"DURATION": "30s", "BACKUP_EVERY": "10s"},
}
USERS, ZIPF = 10_000, 1.1


def port(node, name):
    return node.urls[name].rsplit(":", 1)[1]


def run_and_save(file, command, env=None):
    """Runs a command from the top of the repository and saves its output."""
    settings = "".join(f"{name}={value} " for name, value in (env or {}).items())
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"GRADESTORE_PASSWORD": PASSWORD} | (env or {}),
                          stdout=subprocess.PIPE, text=True)
    text = f"$ {settings}{shlex.join(command)}\n\n{done.stdout}\n"
    print(text, flush=True)
    file.write(text)
    return done


def k6(script, clusters):
    """Whether the script passed on each of the clusters."""
    failed = 0
    with open(RESULTS / f"k6-{script}.txt", "w") as file:
        for nodes in clusters:
            addresses = ",".join(f"127.0.0.1:{port(node, 'write')}/{port(node, 'read')}" for node in nodes)
            settings = {"NODES": addresses, **SCRIPTS[script]}
            done = run_and_save(file, [K6, "run", "--quiet", f"load/k6/{script}.js"], settings)
            failed |= done.returncode != 0
    return failed


def oha(clusters, directory):
    """Reads of a few users most of the time, and writes, at fixed rates. Returns whether all succeeded."""
    rate = [OHA, "-z", "10s", "-c", "64", "--latency-correction", "--no-tui", "--no-color"]
    body = f'{{"user_id":"{generate.user_id(0)}","spp":5}}'
    write = ["-m", "POST", "-T", "application/json", "-a", f"admin:{PASSWORD}", "-d", body]
    failed = 0
    with open(RESULTS / "oha-zipf.txt", "w") as reads, open(RESULTS / "oha-set.txt", "w") as writes:
        for nodes in clusters:
            urls = directory / f"zipf-{len(nodes)}.txt"
            generate.write_urls(urls, 10 * USERS, USERS, ZIPF, generate.user_id, [node.urls["read"] for node in nodes])
            done = run_and_save(reads, [*rate, "-q", "2000", "--urls-from-file", str(urls.relative_to(ROOT))])
            failed |= statuses(done) != ["200"]
            done = run_and_save(writes, [*rate, "-q", "1000", *write, f"{nodes[0].urls['write']}/set"])
            failed |= statuses(done) != ["204"]
    return failed


def statuses(done):
    return re.findall(r"\[(\d+)\] \d+ responses", done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"{', '.join([*SCRIPTS, 'oha'])}; default: all")
    args = parser.parse_args()
    what = args.what or [*SCRIPTS, "oha"]
    if unknown := set(what) - {*SCRIPTS, "oha"}:
        parser.error(f"no such script: {', '.join(unknown)}; scripts are {', '.join([*SCRIPTS, 'oha'])}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="k6-", dir=ROOT / "target") as directory:
        directory = Path(directory)
        homes = [directory / str(n) for n in range(4)]
        for home in homes:
            home.mkdir()
        generate.write(directory / "grades.csv.gz", USERS)
        with contextlib.ExitStack() as stack:
            records = ("--restore-from", directory / "grades.csv.gz")
            alone = stack.enter_context(Node(homes[0], "--data-dir", homes[0] / "data", *records))
            broker = stack.enter_context(Broker(directory / "nats", "default"))
            three = [stack.enter_context(Node(home, "--nats-url", broker.url, "--data-dir", home / "data", *seed))
                     for home, seed in zip(homes[1:], (records, (), ()))]
            clusters = ([alone], three)
            for name in what:
                failed |= oha(clusters, directory) if name == "oha" else k6(name, clusters)
    sys.exit(failed)


if __name__ == "__main__":
    main()
