#!/usr/bin/env python3
"""Writes the records that the load tests of backups use, as gzip CSV: always the same ones.

    python3 load/generate.py --users 5000000 -o grades.csv.gz
    target/release/gradestore serve --ephemeral --restore-from grades.csv.gz
"""

import argparse
import gzip
import multiprocessing
import signal

from measure import end_with_parent

FIELDS = ("postpaid_limit", "spp", "shipping_fee", "return_fee")
HEADER = ",".join(("user_id", *FIELDS)) + "\n"
FIRST_ID = 1_000_000_000_000
BLOCK_USERS = 50_000


def user_id(user):
    """The ids of the other load tools; one in a thousand has what CSV must quote behind it."""
    return f'{FIRST_ID + user}, "ж"' if user % 1000 == 7 else str(FIRST_ID + user)


def user_of(user_id):
    return int(user_id[:13]) - FIRST_ID


def value(user, field):
    """As in `roundtrip.rs`: another one for each user and field, negative ones, zeros, both ends of 64 bits."""
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


def csv_row(user):
    name = user_id(user)
    if '"' in name:
        name = '"' + name.replace('"', '""') + '"'
    return ",".join((name, *map(str, values(user)))) + "\n"


def csv_block(users):
    return "".join(map(csv_row, users)).encode()


def gzip_block(users):
    return gzip.compress(csv_block(users), compresslevel=1, mtime=0)


def alone():
    """A worker ends when it is told to, whatever who started it does then, and with it; Ctrl-C is not for it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def blocks(users, make):
    """What `make` makes of each block of users, in order, on all cores."""
    ranges = (range(first, min(first + BLOCK_USERS, users)) for first in range(0, users, BLOCK_USERS))
    with multiprocessing.Pool(initializer=alone) as pool:
        yield from pool.imap(make, ranges)


def write(path, users):
    with open(path, "wb") as file:
        file.write(gzip.compress(HEADER.encode(), mtime=0))
        for member in blocks(users, gzip_block):
            file.write(member)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=5_000_000)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    write(args.output, args.users)


if __name__ == "__main__":
    main()
