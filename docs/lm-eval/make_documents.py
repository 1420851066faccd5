"""Writes secret_numbers.jsonl: eight facts, each hidden in about 1700 tokens of a text of yours.

python make_documents.py TEXT.txt
"""

import json
import random
import sys
from pathlib import Path

PLACES = ("Lisbon", "Cairo", "Oslo", "Quito", "Delhi", "Lima", "Prague", "Dakar")
CHARACTERS = 6000

text = Path(sys.argv[1]).read_text(encoding="utf-8")
source = random.Random(1)
with Path("secret_numbers.jsonl").open("w", encoding="utf-8") as file:
    for index, place in enumerate(PLACES):
        number = source.randint(1000, 9999)
        start = index * (len(text) - CHARACTERS) // len(PLACES)
        body = text[start : start + CHARACTERS]
        at = body.index("\n", source.randint(500, 5000))
        fact = f"\n\nThe secret number of {place} is {number}.\n\n"
        record = {"context": body[:at] + fact + body[at:], "place": place, "number": str(number)}
        file.write(json.dumps(record) + "\n")
