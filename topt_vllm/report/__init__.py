"""One self-contained HTML page about a threshold table: what a person wants to see before trusting it."""
