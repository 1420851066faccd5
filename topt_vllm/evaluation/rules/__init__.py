"""Rules that choose V rows, each from its own source, in one file each."""
