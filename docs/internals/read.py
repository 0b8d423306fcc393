#!/usr/bin/env python3
"""Reads a backup of gradestore, and the messages of its stream, by what protocol.md says and by nothing else. A test runs it
on real ones.

    python3 -m venv reader && reader/bin/pip install xxhash==4.1.0
    reader/bin/python docs/internals/read.py grades.csv.gz
"""

import base64
import csv
import datetime
import io
import json
import re
import struct
import sys
import unicodedata
import zlib

import xxhash

FIELDS = ("postpaid_limit", "spp", "shipping_fee", "return_fee")
BACKUP_FORMAT = 1
BATCH_FORMAT = 1
HEADER_BYTES = 17
LAST_BEGINS, LAST_ENDS = bytes.fromhex("1f8b08040000000000ff"), bytes.fromhex("03000000000000000000")
PIECE_BYTES = 64 * 1024
VERSION = "NATS/1.0"
# Unicode's White_Space; what str.strip removes by itself is more.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200b))) + "\u2028\u2029\u202f\u205f\u3000"


class Unreadable(Exception):
    """What is read is not as protocol.md has it."""


class Newer(Unreadable):
    """What is read has a format that came after this program."""


# Digests.

def record_digest(user_id, values):
    key = user_id.encode()
    text = struct.pack("<Q", len(key)) + key
    for place, value in enumerate(values):
        if value:
            text += struct.pack("<Bq", place, value)
    return xxhash.xxh3_128_intdigest(text)


def digest(state):
    """Of all records: the sum of theirs."""
    return f"{sum(record_digest(user_id, values) for user_id, values in state.items()) % 2**128:032x}"


# A backup.

def member(data, at):
    """The gzip member that begins at `at`: what its subfield GS holds, what it inflates to, and where it ends."""
    if len(data) < at + HEADER_BYTES:
        raise Unreadable("the file is cut")
    if data[at:at + 3] != b"\x1f\x8b\x08":
        raise Unreadable(f"byte {at}: no gzip member begins here")
    flags, extra_bytes = data[at + 3], int.from_bytes(data[at + 10:at + 12], "little")
    extra = data[at + 12:at + 12 + extra_bytes]
    if flags & 0b111_0111 & ~0b100 or not flags & 0b100 or extra[:2] != b"GS":
        raise Unreadable(f"byte {at}: a gzip member, but not one of gradestore")
    if int.from_bytes(extra[2:4], "little") != extra_bytes - 4:
        raise Unreadable(f"byte {at}: the subfield does not fill the extra field")
    inflate, text, end = zlib.decompressobj(zlib.MAX_WBITS | 16), b"", at
    while not inflate.eof:
        piece = data[end:end + PIECE_BYTES]
        if not piece:
            raise Unreadable("the file is cut")
        try:
            text += inflate.decompress(piece)
        except zlib.error as error:
            raise Unreadable(f"byte {at}: {error}") from error
        end += len(piece)
    return extra[4:5], extra[5:], text, end - len(inflate.unused_data)


def record(content, names):
    """A record of the first or the last member."""
    crc, text = int.from_bytes(content[:4], "little"), content[4:]
    if zlib.crc32(text) != crc:
        raise Unreadable("a record has changed")
    try:
        found = json.loads(text)
    except ValueError:
        found = {}
    if not set(names) <= set(found):
        raise Unreadable(f"no record with {', '.join(names)}")
    return found


def read_backup(data):
    """What the first member says, the records, what the last one says."""
    kind, content, header, at = member(data, 0)
    if kind != b"H":
        raise Unreadable("the first member is missing")
    head = record(content, ("format", "created_ns", "log_id", "position", "time_ns"))
    if head["format"] > BACKUP_FORMAT:
        raise Newer(f"format {head['format']}")
    columns = next(csv.reader([header.decode()]))
    # A file of an older version has fewer: the fields that it lacks are 0.
    if columns != ["user_id", *FIELDS][:len(columns)]:
        raise Unreadable(f"columns {columns}")
    records, rows = {}, 0
    while True:
        begin = at
        kind, content, text, at = member(data, begin)
        if kind == b"E":
            break
        if kind != b"M":
            raise Unreadable(f"byte {begin}: a member of an unknown kind")
        member_bytes, text_bytes, member_rows = struct.unpack("<III", content)
        if (member_bytes, text_bytes) != (at - begin, len(text)):
            raise Unreadable(f"byte {begin}: the member is not as long as it says")
        found = list(csv.reader(io.StringIO(text.decode(), newline="")))
        if len(found) != member_rows:
            raise Unreadable(f"byte {begin}: the member has not as many rows as it says")
        for user_id, *values in found:
            records[user_id] = [*map(int, values), *(0 for _ in FIELDS[len(values):])]
        rows += member_rows
    end = record(content, ("position", "rows", "digest", "checksum"))
    # All else in it is always the same, and nothing follows.
    if data[begin:begin + 10] != LAST_BEGINS or data[-10:] != LAST_ENDS or at != len(data):
        raise Unreadable("the last member has changed, or is not the last")
    if end["checksum"] != f"{xxhash.xxh3_128_intdigest(data[:begin]):032x}":
        raise Unreadable("a byte has changed")
    if (end["rows"], end["digest"]) != (rows, digest(records)) or rows != len(records):
        raise Unreadable("not the rows that the end record counts")
    return head, records, end


# The stream.

def once(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def is_id(value):
    # A lone half of a surrogate pair, which JSON can write and UTF-8 can't, is of category Cs.
    return (isinstance(value, str) and not any(unicodedata.category(char) in ("Cc", "Cs") for char in value)
            and 1 <= len(value.encode()) <= 256)


def is_value(value):
    return type(value) is int and -2**63 <= value < 2**63


def parse_headers(block):
    """The headers in a header block, the first value of each name."""
    try:
        text = block.decode()
    except ValueError as error:
        raise Unreadable("the header block is not UTF-8") from error
    *lines, last = text.split("\n")
    lines = [line.removesuffix("\r") for line in lines] + [last] * (last != "")
    if not lines or not lines[0].startswith(VERSION):
        raise Unreadable(f"the header block does not begin with {VERSION}")
    if lines[0].removeprefix(VERSION).strip(WHITE_SPACE).split(" ")[0].strip(WHITE_SPACE) not in ("", "200"):
        raise Unreadable("the header block begins with a status other than 200")
    headers, at = {}, 1
    while at < len(lines):
        line, at = lines[at], at + 1
        if not line:
            continue
        name, colon, value = line.partition(":")
        if not colon:
            raise Unreadable("a header line has no colon")
        if not all("!" <= char <= "~" for char in name):
            raise Unreadable("a header name has a byte other than visible ASCII")
        value = value.lstrip(WHITE_SPACE)
        while at < len(lines) and lines[at][:1] in WHITE_SPACE and lines[at]:
            value, at = value + lines[at], at + 1
        value = value.rstrip(WHITE_SPACE)
        if "\r" in value:
            raise Unreadable("a header value has a carriage return")
        headers.setdefault(name, value)
    return headers


def parse_message(message):
    """The headers and the payload in `message` of an answer to $JS.API.STREAM.MSG.GET; None for the headers if they are
    unreadable."""
    block, payload = (base64.b64decode(message.get(name, "")) for name in ("hdrs", "data"))
    try:
        return parse_headers(block) if block else {}, payload
    except Unreadable:
        return None, payload


def batch_format(text):
    """The number from 1 up that a Grade-Format is; None if it is not one."""
    digits = re.fullmatch(r"\+?0*([1-9][0-9]{0,19})", text)
    number = int(digits[1]) if digits else 0
    return number if 1 <= number < 2**64 else None


def parse_batch(headers, payload):
    """The entries of a message's batch; None where all replicas skip it."""
    if headers is None:
        return None
    wanted = batch_format(headers.get("Grade-Format", "1"))
    if not wanted:
        return None
    if wanted > BATCH_FORMAT:
        raise Newer(f"format {wanted}")
    try:
        entries = json.loads(payload.decode(), object_pairs_hook=once)
    except ValueError:
        return None
    if not isinstance(entries, list):
        return None
    for entry in entries:
        if not isinstance(entry, dict):
            return None
        if set(entry) == {"delete"} and is_id(entry["delete"]):
            continue
        changes = {name: value for name, value in entry.items() if name != "user_id"}
        if not is_id(entry.get("user_id")) or set(changes) - set(FIELDS) or not all(map(is_value, changes.values())):
            return None
    return entries


def apply(state, entries):
    """What a replica does with a batch."""
    for entry in entries:
        if "delete" in entry:
            state.pop(entry["delete"], None)
            continue
        values = state.setdefault(entry["user_id"], [0] * len(FIELDS))
        for place, name in enumerate(FIELDS):
            values[place] = entry.get(name, values[place])


def parse_checkpoint(headers):
    """A position, and the sender's chain and digest there."""
    _replica, position, chain, digest, _round, _mac = headers["Grade-Checkpoint"].split(" ")
    return int(position), chain, digest


# The chain.

def first_chain(log_id, base=0):
    return xxhash.xxh3_128_intdigest(log_id.encode() + struct.pack("<Q", base))


def batch_id(headers):
    """The writer and its number of the batch; zeros where the message does not say."""
    said = re.fullmatch(r"([0-9a-fA-F]{32})-\+?([0-9]+)", headers.get("Grade-Batch", ""))
    named = said and int(said[2]) < 2**64
    return (int(said[1], 16), int(said[2])) if named else (0, 0)


def next_chain(chain, position, time_ns, headers=None, payload=None):
    """The chain at `position`; without headers for a message that all replicas skip."""
    text = chain.to_bytes(16, "little") + struct.pack("<QQ", position, time_ns)
    if headers is not None:
        writer, number = batch_id(headers)
        text += bytes([BATCH_FORMAT]) + writer.to_bytes(16, "little") + struct.pack("<Q", number) + payload
    return xxhash.xxh3_128_intdigest(text)


def stored_ns(message):
    """When the stream stored `message` of an answer to $JS.API.STREAM.MSG.GET, in nanoseconds since 1970."""
    seconds, _, fraction = message["time"].removesuffix("Z").partition(".")
    whole = datetime.datetime.fromisoformat(seconds + "+00:00")
    return int(whole.timestamp()) * 10**9 + int(fraction.ljust(9, "0") or 0)


def main():
    with open(sys.argv[1], "rb") as file:
        head, records, end = read_backup(file.read())
    print(json.dumps({"head": head, "end": end, "records": len(records)}, indent=2))


if __name__ == "__main__":
    main()
