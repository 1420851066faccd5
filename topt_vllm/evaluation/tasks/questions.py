"""Invented persons, each in a short paragraph somewhere in the text; asked for one thing about one of them.

The question puts it in other words than the paragraph, and what is true of other persons is wrong.
"""

from itertools import product

from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.tasks.haystack import WRONG, Haystack, Question

_PERSONS = 8
_FIRST = "Martha Oliver Helena Walter Judith Arthur Sophia Edmund Bertha Julian Louisa Victor"
_LAST = "Keller Norton Fisher Mercer Barlow Harris Lawson Palmer Dawson Porter Wilson Turner"
_PARAGRAPH = (
    "{name} was born in {town} and spent a happy childhood there. People pay {first} for work as a {job}. "
    "At home, {first} is never alone, for a {pet} lives there too."
)
# What is known of a person: values, and a question.
_FACTS = {
    "town": (
        "Lisbon Prague London Berlin Madrid Vienna Dublin Moscow Warsaw Athens Geneva Naples Boston Sydney",
        "Where did {name} grow up?\nAnswer: {name} grew up in",
    ),
    "job": (
        "farmer lawyer tailor sailor doctor dancer singer writer banker barber painter teacher baker pilot",
        "How does {name} earn a living?\nAnswer: {name} is a",
    ),
    "pet": (
        "parrot rabbit monkey turtle lizard donkey pigeon spider kitten hamster snake horse mouse tiger",
        "Which animal does {name} keep?\nAnswer: {name} keeps a",
    ),
}


def questions(haystack: Haystack, count: int) -> list[Case]:
    """Up to ``count`` cases about one prompt."""
    last = haystack.source.sample(_LAST.split(), _PERSONS)
    persons = [
        f"{first} {second}"
        for first, second in zip(haystack.alike(_FIRST.split(), _PERSONS), last, strict=True)
    ]
    known = {fact: haystack.alike(values.split(), _PERSONS) for fact, (values, _) in _FACTS.items()}
    paragraphs = [
        _PARAGRAPH.format(
            name=name, first=name.split()[0], **{fact: values[person] for fact, values in known.items()}
        )
        for person, name in enumerate(persons)
    ]
    pairs = list(product(range(_PERSONS), _FACTS))
    asked = []
    for person, fact in haystack.source.sample(pairs, min(count, len(pairs))):
        right = known[fact][person]
        wrong = haystack.source.sample([value for value in known[fact] if value != right], WRONG)
        asked.append(Question(_FACTS[fact][1].format(name=persons[person]), [right, *wrong]))
    return haystack.cases(paragraphs, asked)
