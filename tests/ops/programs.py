"""Programs that tests/ops/install.sh unpacks, if they are not on the PATH."""

import os
import shutil
from pathlib import Path

UNPACKED = Path(__file__).resolve().parents[2] / ".tools" / "debian" / "usr"


def program(*names):
    """The path of the program with the first of `names` that exists."""
    dirs = [os.environ["PATH"], "/usr/sbin", UNPACKED / "sbin", UNPACKED / "bin"]
    found = [shutil.which(name, path=":".join(map(str, dirs))) for name in names]
    path = next(filter(None, found), None)
    assert path, f"{names[0]} is missing: tests/ops/install.sh gets it"
    return path


def environment(**more):
    """With the libraries of unpacked programs."""
    libraries = list((UNPACKED / "lib").glob("*-linux-gnu"))
    ruby = [directory for parent in (UNPACKED / "lib", *libraries) for directory in (parent / "ruby").glob("[0-9]*")]
    paths = {"LD_LIBRARY_PATH": libraries, "RUBYLIB": ruby}
    return {**os.environ, **{name: ":".join(map(str, dirs)) for name, dirs in paths.items()}, **more}
