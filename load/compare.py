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
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from measure import OTHERS_QUIET, PASSWORD, RELEASE, cpu_s, machine_cpu_s, own_cpu_s, wrk

# What a node must keep to, as ratios to the bare server: median of the rounds.
GET_DEMANDS = {"rate": (">=", 0.80), "cpu": ("<=", 1.25)}
SET_DEMANDS = {"rate": (">=", 0.65)}
# A round in which everything else on the machine took more than OTHERS_QUIET of a core does not count;
# it is repeated, up to so many times the rounds asked for. Each begins once the machine is that quiet.
TRIES = 4
QUIET_WAIT_S_MAX = 300
PORTS = {"write": 18080, "read": 18081, "ops": 18082, "bare": 18090}


def url(port):
    return f"http://127.0.0.1:{PORTS[port]}"


def wait_for_quiet():
    deadline = time.monotonic() + QUIET_WAIT_S_MAX
    while time.monotonic() < deadline:
        before = machine_cpu_s()
        time.sleep(1)
        if machine_cpu_s() - before < OTHERS_QUIET:
            return
    sys.exit(f"the machine was busy with other things for {QUIET_WAIT_S_MAX} s: no figure")


def run(script, target, server, args, seed):
    before, began = cpu_s(server.pid), time.monotonic()
    others = machine_cpu_s() - own_cpu_s(server)
    row = wrk(script, target, seed, args, core=1)
    used = cpu_s(server.pid) - before
    others = (machine_cpu_s() - own_cpu_s(server) - others) / (time.monotonic() - began)
    return dict(row, cpu_us=used / row["requests"] * 1e6, others=others)


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
    node_command = [str(RELEASE / "gradestore"), "serve", "--ephemeral",
                    *(f"--{port}-addr=127.0.0.1:{PORTS[port]}" for port in ("write", "read", "ops")),
                    *os.environ.get("SERVE_FLAGS", "").split()]
    node = start(node_command, env, url("ops") + "/readyz")
    bare = start([str(RELEASE / "examples" / "bare"), f"127.0.0.1:{PORTS['bare']}"], os.environ, url("bare"))
    try:
        subprocess.run([str(RELEASE / "examples" / "roundtrip"), "--users", str(args.users), "--write", url("write"),
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
            b = run(script, url("bare"), bare, args, n)
            g = run(script, url(port), node, args, n)
            others = max(b["others"], g["others"])
            disturbed = others > OTHERS_QUIET
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
