"""Many keys with a number each stand in the text; asked for one, the numbers of the others are wrong."""

from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.tasks.haystack import WRONG, Haystack, Question

_KEYS = 24
_WORDS = (
    "apple river stone horse tower candle forest garden silver winter mirror basket ladder pocket button castle "
    "bottle blanket hammer needle pepper rabbit saddle ticket turtle valley window anchor barrel bridge camera "
    "carpet cheese church circle coffee copper corner cotton dinner doctor engine finger flower guitar island "
    "jacket kettle letter lemon market monkey museum orange palace pencil pillow planet potato ribbon rocket "
    "sailor salmon school shadow spider spoon summer temple tunnel violin wagon"
)


def multikey(haystack: Haystack, count: int) -> list[Case]:
    """Up to ``count`` cases about one prompt."""
    keys = haystack.alike(_WORDS.split(), _KEYS)
    known = dict(zip(keys, haystack.numbers(_KEYS), strict=True))
    facts = [f"The secret number of the {key} is {number}." for key, number in known.items()]
    questions = []
    for key in haystack.source.sample(keys, min(count, _KEYS)):
        others = haystack.source.sample([number for other, number in known.items() if other != key], WRONG)
        text = f"What is the secret number of the {key}?\nAnswer: The secret number of the {key} is"
        questions.append(Question(text, [known[key], *others]))
    return haystack.cases(facts, questions)
