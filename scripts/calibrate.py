#!/usr/bin/env python3
"""The same as ``topt-vllm calibrate``, for a checkout."""

import sys

from topt_vllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
