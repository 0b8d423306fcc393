#!/usr/bin/env python3
"""Writes reproducible records for the load tests as gzip CSV, or requests for them as URLs.

    python3 load/generate.py --users 5000000 -o grades.csv.gz
    target/release/gradestore serve --ephemeral --restore-from grades.csv.gz

    python3 load/generate.py --users 5000000 --urls 100000 --zipf 1.1 -o urls.txt
    .tools/bin/oha --urls-from-file urls.txt -z 10s -q 1000 --latency-correction --no-tui

Ids are `sequential`; `numeric`, of the same length in random order; or `uuid`, version 4. `load/k6/ids.js` generates the
same ones. With --zipf S the k-th user is requested in proportion to 1/k^S, as in `load/k6/zipf.js`; 0 requests all
equally.
"""

import argparse
import functools
import gzip
import itertools
import multiprocessing
import random
import signal
import sys
import urllib.parse
import uuid

from measure import end_with_parent

FIELDS = ("postpaid_limit", "spp", "shipping_fee", "return_fee")
HEADER = ",".join(("user_id", *FIELDS)) + "\n"
FIRST_ID = 1_000_000_000_000
BLOCK_USERS = 50_000


def user_id(user):
    """The ids of the other load tools; one in a thousand has a suffix that CSV must quote."""
    return f'{FIRST_ID + user}, "ж"' if user % 1000 == 7 else str(FIRST_ID + user)


def scramble(n):
    """A bijection of 32-bit numbers that separates neighbours: the finalizer of MurmurHash3."""
    n = (n ^ n >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    n = (n ^ n >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return n ^ n >> 16


def numeric_id(user):
    return str(FIRST_ID + scramble(user))


def uuid_id(user):
    words = (scramble(user * 4 + word & 0xFFFFFFFF) for word in range(4))
    return str(uuid.UUID(bytes=b"".join(word.to_bytes(4, "big") for word in words), version=4))


IDS = {"sequential": user_id, "numeric": numeric_id, "uuid": uuid_id}


def user_of(user_id):
    return int(user_id[:13]) - FIRST_ID


def value(user, field):
    """As in `roundtrip.rs`: distinct for each user and field, negative values, zeros, the extremes of 64 bits."""
    n = user * len(FIELDS) + field
    rest = n % 101
    if rest == 0:
        return -2**63
    if rest == 1:
        return 2**63 - 1
    if rest < 20:
        return 0
    return -n if rest % 2 else n


def values(user):
    return [value(user, field) for field in range(len(FIELDS))]


def csv_row(user, id_of=user_id):
    name = id_of(user)
    if '"' in name:
        name = '"' + name.replace('"', '""') + '"'
    return ",".join((name, *map(str, values(user)))) + "\n"


def csv_block(users, id_of=user_id):
    return "".join(csv_row(user, id_of) for user in users).encode()


def gzip_block(users, id_of=user_id):
    return gzip.compress(csv_block(users, id_of), compresslevel=1, mtime=0)


def isolate_worker():
    """A worker ends with its parent, and ignores Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def blocks(users, make):
    """`make` of each block of users, in order, on all cores."""
    ranges = (range(first, min(first + BLOCK_USERS, users)) for first in range(0, users, BLOCK_USERS))
    with multiprocessing.Pool(initializer=isolate_worker) as pool:
        yield from pool.imap(make, ranges)


def write(path, users, id_of=user_id):
    with open(path, "wb") as file:
        file.write(gzip.compress(HEADER.encode(), mtime=0))
        for member in blocks(users, functools.partial(gzip_block, id_of=id_of)):
            file.write(member)


def draw(count, users, zipf, seed=1):
    """Random users with Zipf's distribution."""
    weights = itertools.accumulate((user + 1) ** -zipf for user in range(users))
    return random.Random(seed).choices(range(users), cum_weights=list(weights), k=count)


def write_urls(path, count, users, zipf, id_of, read_urls):
    with open(path, "w") as file:
        for user, read_url in zip(draw(count, users, zipf), itertools.cycle(read_urls)):
            file.write(f"{read_url}/get?user_id={urllib.parse.quote(id_of(user))}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=5_000_000)
    parser.add_argument("--ids", choices=IDS, default="sequential")
    parser.add_argument("--urls", type=int, metavar="COUNT", help="write this many requests instead of records")
    parser.add_argument("--zipf", type=float, default=0)
    parser.add_argument("--read-url", default="http://127.0.0.1:8081", help="read ports, separated by commas")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    if args.users < 1:
        sys.exit(f"--users {args.users}: give 1 or more")
    if args.urls is None:
        write(args.output, args.users, IDS[args.ids])
    else:
        write_urls(args.output, args.urls, args.users, args.zipf, IDS[args.ids], args.read_url.split(","))


if __name__ == "__main__":
    main()
