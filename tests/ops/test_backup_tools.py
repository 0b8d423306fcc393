"""A backup of 300,000 users read by other tools, as docs/operations/backup.md shows: all rows, with the right values, by the
tools' own guesses about the file."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import duckdb
import pandas
import polars

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "load"), str(ROOT / "tests" / "ops")]

from measure import AUTH, Node  # noqa: E402
from programs import environment, program  # noqa: E402

USERS = 300_000
# More rows than DuckDB reads to guess the format of a file, and pandas to guess the type of a column.
GUESSED_FROM_ROWS = 270_000
HEADER = b'"user_id","postpaid_limit","spp","shipping_fee","return_fee"\n'
# What the rows add up to: count, users, sum of spp, least return_fee.
WANTED = (USERS + 1, USERS + 1, sum(range(USERS)) + 7, -2**63)


def backup(directory, id_of):
    """A backup of users without quotes, and of one in quotes that comes after the rows that tools guess from."""
    file = directory / "other.csv.gz"
    # The order of a backup is that of a seeded hash: of so many ids one is among the last tenth but once in 10^13 runs.
    quoted = [f"x,{n}" for n in range(300)]
    with gzip.open(file, "wt", compresslevel=1) as text:
        text.write("user_id,spp\n")
        text.writelines(f"{id_of(user)},{user}\n" for user in range(USERS))
        text.writelines(f'"{user}",7\n' for user in quoted)
    with Node(directory, "--ephemeral", "--restore-from", file, core=min(os.sched_getaffinity(0))) as node:
        def ask(path, method="GET", body=None):
            headers = {"Authorization": f"Basic {AUTH}", "Content-Type": "application/json"}
            request = urllib.request.Request(node.urls["write"] + path, body, headers, method=method)
            return urllib.request.urlopen(request, timeout=60).read()

        rows = gzip.decompress(ask("/backup")).splitlines()
        late = max(quoted, key=lambda user: rows.index(f'"{user}",0,7,0,0'.encode()))
        for user in quoted:
            if user != late:
                ask(f"/set?user_id={urllib.parse.quote(user)}", "DELETE")
        ask("/set", "POST", json.dumps({"user_id": late, "return_fee": -2**63}).encode())
        data = ask("/backup")
    rows = gzip.decompress(data).splitlines()
    first_quoted = next(n for n, row in enumerate(rows) if n > 0 and row.startswith(b'"'))
    assert first_quoted > GUESSED_FROM_ROWS, first_quoted
    return data


class Tools(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.file = cls.directory / "grades.csv.gz"
        cls.file.write_bytes(backup(cls.directory, lambda user: f"user-{user}"))
        # DuckDB takes the columns of ids that are numbers for numbers.
        cls.numeric = cls.directory / "numeric.csv.gz"
        cls.numeric.write_bytes(backup(cls.directory, lambda user: str(10**12 + user)))

    def test_duckdb(self):
        for source in (f"'{self.file}'", f"'{self.numeric}', types = {{'user_id': 'VARCHAR'}}"):
            found = duckdb.sql("SELECT count(*), count(DISTINCT user_id), sum(spp)::BIGINT, min(return_fee) "
                               f"FROM read_csv({source})").fetchall()
            self.assertEqual(found, [WANTED])

    def test_pandas(self):
        for read in (lambda: pandas.read_csv(self.file), lambda: pandas.read_csv(self.numeric, dtype={"user_id": str})):
            table = read()
            found = (len(table), table.user_id.nunique(), table.spp.sum(), table.return_fee.min())
            self.assertEqual(found, WANTED)

    def test_polars(self):
        for file in (self.file, self.numeric):
            # Polars guesses the types from the first 100 rows.
            table = polars.read_csv(file, schema_overrides={"user_id": str})
            found = (len(table), table["user_id"].n_unique(), table["spp"].sum(), table["return_fee"].min())
            self.assertEqual(found, WANTED)

    def test_python(self):
        with gzip.open(self.file, "rt", newline="") as text:
            rows = list(csv.DictReader(text, strict=True))
        found = (len(rows), len({row["user_id"] for row in rows}), sum(int(row["spp"]) for row in rows),
                 min(int(row["return_fee"]) for row in rows))
        self.assertEqual(found, WANTED)

    def test_zcat(self):
        lines = subprocess.run(["sh", "-c", 'zcat "$0" | wc -l', self.file], capture_output=True, check=True).stdout
        self.assertEqual(int(lines), 1 + WANTED[0])

    def test_readers_of_one_member_find_the_header_row_alone(self):
        """As the document says."""
        self.assertEqual(zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(self.file.read_bytes()), HEADER)

    def text_of(self, *command):
        """What a program prints for the backup."""
        return subprocess.run([*command, self.file], env=environment(), capture_output=True, check=True).stdout

    def test_ruby(self):
        ruby = (program("ruby", "ruby3.1"), "--disable-gems", "-rzlib", "-e")
        whole = "print Zlib::GzipReader.zcat(File.open(ARGV[0], 'rb'))"
        self.assertEqual(self.text_of(*ruby, whole), gzip.decompress(self.file.read_bytes()))
        first = "print Zlib::GzipReader.open(ARGV[0]).read"
        self.assertEqual(self.text_of(*ruby, first), HEADER)

    def test_php(self):
        php = (program("php", "php8.2"), "-n", "-d", "memory_limit=-1", "-r")
        rows = """$file = gzopen($argv[1], "r"); $names = fgetcsv($file, null, ",", '"', "");
            for ($rows = $sum = $least = 0; $row = fgetcsv($file, null, ",", '"', ""); $rows++) {
                $row = array_combine($names, $row); $users[$row["user_id"]] = 1;
                $sum += (int) $row["spp"]; $least = min($least, (int) $row["return_fee"]); }
            echo json_encode([$rows, count($users), $sum, $least]);"""
        self.assertEqual(tuple(json.loads(self.text_of(*php, rows))), WANTED)
        first = "echo gzdecode(file_get_contents($argv[1]));"
        self.assertEqual(self.text_of(*php, first), HEADER)

    @unittest.skipUnless(shutil.which("perl"), "needs Perl")
    def test_perl(self):
        program = "gunzip shift, \\$text, MultiStream => shift or die; print $text"
        for all_members, wanted in (("1", gzip.decompress(self.file.read_bytes())), ("0", HEADER)):
            text = subprocess.run(["perl", "-MIO::Uncompress::Gunzip=gunzip", "-e", program, self.file, all_members],
                                  capture_output=True, check=True).stdout
            self.assertEqual(text, wanted)


if __name__ == "__main__":
    unittest.main()
