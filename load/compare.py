#!/usr/bin/env python3
"""Measures a node against a bare hyper server, side by side.

Both run at once, each on the first core; wrk on the second drives one after the other, in turns, so
that a slow minute of the machine hits both. Printed is each round and the median of the rounds'
ratios: server CPU per request, and requests a second. A round that others' work disturbed is not
counted. Exit code 1 when a request failed or a demand is missed.

    cargo build --release --bins --examples
    python3 load/compare.py --rounds 5 --seconds 5 --users 100000

Needs wrk and taskset.
"""

import argparse
import base64
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "compare"
AUTH = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# What a node must keep to, as ratios to the bare server: median of the rounds.
GET_DEMANDS = {"rate": (">=", 0.80), "cpu": ("<=", 1.25)}
SET_DEMANDS = {"rate": (">=", 0.65)}
# A round in which everything else on the machine took more than this share of a core does not count;
# it is repeated, up to so many times the rounds asked for. Each begins once the machine is that quiet.
OTHERS_MAX = 0.08
TRIES = 4
QUIET_WAIT_S_MAX = 300
PORTS = {"write": 18080, "read": 18081, "ops": 18082, "bare": 18090}


def url(port):
    return f"http://127.0.0.1:{PORTS[port]}"


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def machine_cpu_s():
    """What all processes have used: user, nice, system, irq, softirq, and steal by other machines."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK_S


def own_cpu_s(server):
    us = os.times()
    return cpu_s(server.pid) + us.user + us.system + us.children_user + us.children_system


def wait_for_quiet():
    deadline = time.monotonic() + QUIET_WAIT_S_MAX
    while time.monotonic() < deadline:
        before = machine_cpu_s()
        time.sleep(1)
        if machine_cpu_s() - before < OTHERS_MAX:
            return
    sys.exit(f"the machine was busy with other things for {QUIET_WAIT_S_MAX} s: no figure")


def wrk(script, target, server, args, seed):
    env = dict(os.environ, USERS=str(args.users), SEED=str(seed), AUTH=AUTH)
    command = ["taskset", "-c", "1", "wrk", "-t1", f"-c{args.connections}", f"-d{args.seconds}s",
               "-s", str(ROOT / "load" / script), target]
    before, began = cpu_s(server.pid), time.monotonic()
    others = machine_cpu_s() - own_cpu_s(server)
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    used = cpu_s(server.pid) - before
    others = (machine_cpu_s() - own_cpu_s(server) - others) / (time.monotonic() - began)
    row = {k: int(v) for k, v in re.findall(r"(\w+) (\d+)", out.splitlines()[-1])}
    if row["errors"]:
        sys.exit(f"{row['errors']} failed requests against {target}:\n{out}")
    rate = row["requests"] / (row["duration_us"] / 1e6)
    return {"rate": rate, "cpu_us": used / row["requests"] * 1e6, "p99_us": row["p99_us"], "others": others}


def start(command, env, ready_url):
    # Its log goes to a file: nobody reads a pipe while wrk runs.
    log = tempfile.TemporaryFile()
    child = subprocess.Popen(["taskset", "-c", "0", *command], env=env, stdout=log, stderr=log)
    for _ in range(200):
        try:
            urllib.request.urlopen(ready_url, timeout=1)
            return child
        except OSError:
            time.sleep(0.05)
    log.seek(0)
    sys.exit(f"{command[0]} did not answer on {ready_url}: {log.read().decode()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=64)
    args = parser.parse_args()

    env = dict(os.environ, GRADESTORE_PASSWORD=PASSWORD)
    release = ROOT / "target" / "release"
    node_command = [str(release / "gradestore"), "serve", "--ephemeral",
                    *(f"--{port}-addr=127.0.0.1:{PORTS[port]}" for port in ("write", "read", "ops")),
                    *os.environ.get("SERVE_FLAGS", "").split()]
    node = start(node_command, env, url("ops") + "/readyz")
    bare = start([str(release / "examples" / "bare"), f"127.0.0.1:{PORTS['bare']}"], os.environ, url("bare"))
    try:
        subprocess.run([str(release / "examples" / "roundtrip"), "--users", str(args.users), "--write", url("write"),
                        "--read", url("read"), "--password", PASSWORD], check=True)
        failed = report(args, node, bare)
    finally:
        node.terminate()
        bare.terminate()
        node.wait()
        bare.wait()
    sys.exit(failed)


def report(args, node, bare):
    failed = 0
    for name, script, port, demands in (("GET /get", "get.lua", "read", GET_DEMANDS),
                                        ("POST /set", "set.lua", "write", SET_DEMANDS)):
        ratios = {"cpu": [], "rate": [], "p99": []}
        print(f"\n{name}, {args.connections} connections, {args.users} users, "
              f"{args.seconds} s a run, server on one core, wrk on the other")
        print("round      bare/s      node/s    bare us    node us   rate ratio   CPU ratio   others' CPU")
        for n in range(1, args.rounds * TRIES + 1):
            wait_for_quiet()
            b = wrk(script, url("bare"), bare, args, n)
            g = wrk(script, url(port), node, args, n)
            others = max(b["others"], g["others"])
            disturbed = others > OTHERS_MAX
            row = {what: g[key] / b[key] for what, key in (("cpu", "cpu_us"), ("rate", "rate"), ("p99", "p99_us"))}
            print(f"{n:5} {b['rate']:11.0f} {g['rate']:11.0f} {b['cpu_us']:10.2f} {g['cpu_us']:10.2f} "
                  f"{row['rate']:12.3f} {row['cpu']:11.3f} {others:12.0%}{'  not counted' if disturbed else ''}")
            if not disturbed:
                for what, ratio in row.items():
                    ratios[what].append(ratio)
            if len(ratios["cpu"]) == args.rounds:
                break
        else:
            sys.exit("the machine was too busy with other things: no figure")
        medians = {what: statistics.median(of_rounds) for what, of_rounds in ratios.items()}
        print(f"median of the rounds' ratios: requests a second {medians['rate']:.3f}, "
              f"server CPU per request {medians['cpu']:.3f}, p99 {medians['p99']:.3f}")
        for what, (sign, bound) in demands.items():
            met = medians[what] >= bound if sign == ">=" else medians[what] <= bound
            print(f"demand: {what} ratio {sign} {bound:.2f}: {'met' if met else 'MISSED'}")
            failed |= not met
    return int(failed)


if __name__ == "__main__":
    main()
