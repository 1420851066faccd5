#!/usr/bin/env python3
"""Puts the Python sources of other vLLM versions into the cache folder, for tests/test_vllm_interfaces.py.

Usage: fetch_vllm_sources.py [VERSION ...]   (default: 0.31.0 0.33.0)

Each wheel is downloaded with pip (some 330 MB), nothing is installed, and only its .py files are kept. A version
that is there already is left alone.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from topt_vllm.envs import cache_dir

VERSIONS = ("0.31.0", "0.33.0")
# vLLM's GPU build: its CPU build is a distribution of its own, and not released for every version.
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:", "--no-deps")


def fetch(version: str) -> Path:
    """Downloads and unpacks one version.

    Raises:
        RuntimeError: pip can't get it; the message has what pip said.
    """
    folder = cache_dir() / "wheels" / f"vllm-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", *PLATFORM, "--dest", scratch, f"vllm=={version}"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"pip can't download vllm {version}:\n{run.stderr.strip()[-1000:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
        shutil.move(unpacked, folder)
    return folder


def main() -> int:
    """Fetches the versions named on the command line; 1 when one of them can't be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "versions", nargs="*", default=VERSIONS, metavar="VERSION", help=f"default {' '.join(VERSIONS)}"
    )
    status = 0
    for version in parser.parse_args().versions:
        try:
            print(f"vllm {version}: {fetch(version)}")
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
