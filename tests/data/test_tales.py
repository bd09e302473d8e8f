"""The embedded corpus: its probabilities are exact, its tales consistent and the same everywhere."""

import hashlib
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from fusedgpt.data import tales
from fusedgpt.data.tales import RULES, TABLES, TALES, Slot, TaleGrammar, accepts, log_prob, sample, stream


def column(name: str) -> list[str]:
    """The cells of one column, read from the tables without the grammar's own code."""
    for names, text in TABLES.items():
        if name in names.split(", "):
            at = names.split(", ").index(name)
            return [" ".join(row.split(",")[at].split()) for row in text.split(";")]
    raise KeyError(name)


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def sentences(text: str) -> list[str]:
    return [found[0].strip() for found in re.finditer(r'.+?[.!?]"?(?= [A-Z"]|$)', text)]


def tokens(text: str) -> int:
    """What a word tokenizer makes of it: a word with its leading space, or a mark."""
    return len(re.findall(r" ?[A-Za-z]+|[^A-Za-z ]", text))


def chi_square(observed: Counter, probability: dict[str, float]) -> float:
    """Standard deviations by which the chi-square statistic exceeds its mean; beyond 5 is no accident."""
    n = observed.total()
    statistic = sum((observed[key] - n * p) ** 2 / (n * p) for key, p in probability.items())
    free = len(probability) - 1
    return (statistic - free) / math.sqrt(2 * free)


@pytest.fixture(scope="module")
def many() -> list[str]:
    return list(islice(stream(1), 20_000))


# A grammar small enough to work out by hand: "an", a pronoun before its name, an empty alternative.
SMALL = TaleGrammar(
    {"name, he": "Ann, she; Bob, he; Eve, she", "thing": "ape; cat"},
    {"end": "far | off", "tale": "{He} saw {a thing}[ <end>|]. {name} left the {thing} <end>."},
)


def small_probability(text: str) -> Fraction:
    """The same from first principles: each choice's weight, read off the text."""
    name, thing = re.search(r"(Ann|Bob|Eve) left the (ape|cat)", text).groups()
    result = {"Ann": Fraction(4, 9), "Bob": Fraction(3, 9), "Eve": Fraction(2, 9)}[name]
    result *= {"ape": Fraction(2, 3), "cat": Fraction(1, 3)}[thing]
    ends = re.findall("far|off", text)
    result *= Fraction(2, 3) if len(ends) == 2 else Fraction(1, 3)
    for end in ends:
        result *= {"far": Fraction(2, 3), "off": Fraction(1, 3)}[end]
    return result


def test_small_grammar_by_hand():
    found = dict(SMALL.derivations())
    assert len(found) == 3 * 2 * (2 * 2 + 2)
    assert "She saw an ape far. Eve left the ape off." in found
    assert "He saw a cat. Bob left the cat far." in found
    for text, probability in found.items():
        assert probability == pytest.approx(float(small_probability(text)), rel=1e-14)
        assert SMALL.log_prob(text) == pytest.approx(math.log(small_probability(text)), abs=1e-13)
    assert not SMALL.accepts("She saw an ape. Bob left the ape far.")
    assert SMALL.log_prob("She saw a ape. Ann left the ape far.") == -math.inf


def test_small_grammar_is_sampled_by_its_probabilities():
    n = 20_000
    drawn = Counter(SMALL.sample(seed) for seed in range(n))
    streamed = Counter(islice(SMALL.stream(3), n))
    expected = dict(SMALL.derivations())
    assert set(drawn) | set(streamed) <= set(expected)
    assert abs(chi_square(drawn, expected)) < 5
    assert abs(chi_square(streamed, expected)) < 5


def shrink(seed: int, keep: float) -> TaleGrammar:
    """The real grammar with one or two rows a table and one or two alternatives a choice."""
    rng = random.Random(seed)

    def some(options: list[str]) -> list[str]:
        count = 2 if rng.random() < keep and len(options) > 1 else 1
        return [options[i] for i in sorted(rng.sample(range(len(options)), count))]

    tables = {names: ";".join(some(text.split(";"))) for names, text in TABLES.items()}
    rules = {}
    for name, text in RULES.items():
        phrase = " ".join(text.split())
        while inner := re.search(
            r"\[([^][]*)\]", phrase
        ):  # innermost first; \1 \2 \3 stand for finished brackets
            kept = "\1" + "\2".join(some(inner[1].split("|"))) + "\3"
            phrase = phrase[: inner.start()] + kept + phrase[inner.end() :]
        phrase = "|".join(part.strip() for part in some(phrase.split("|")))
        rules[name] = phrase.replace("\1", "[").replace("\2", "|").replace("\3", "]")
    return TaleGrammar(tables, rules)


@pytest.mark.parametrize("seed", range(12))
def test_shrunken_grammar_enumerated(seed):
    grammar = shrink(seed, keep=0.2)
    texts, probabilities = zip(*grammar.derivations(), strict=True)
    assert 1 < len(texts) < 200_000
    assert len(set(texts)) == len(texts)
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)
    some = random.Random(seed).sample(range(len(texts)), min(200, len(texts)))
    for i in some:
        assert grammar.log_prob(texts[i]) == pytest.approx(math.log(probabilities[i]), abs=1e-12)
        assert accepts(texts[i])  # what is left of the grammar writes nothing that the whole could not


def test_whole_grammar_is_unambiguous_and_accepts_its_own(many):
    for text in many[:1500]:
        ((found, probability),) = TALES.derivations(text)
        assert found == text
        assert log_prob(text) == pytest.approx(math.log(probability), abs=1e-12)


def test_rows_are_drawn_by_their_weights(many):
    names = column("hero")
    n = len(names)
    weight = {
        name: 2 - i / (n - 1) for i, name in enumerate(names)
    }  # the first twice the last, evenly between
    expected = {name: value / sum(weight.values()) for name, value in weight.items()}
    drawn = Counter(next(word for word in words(text) if word in weight) for text in many)
    assert abs(chi_square(drawn, expected)) < 5


def test_hero_object_and_pronoun_stay_the_same(many):
    hero_child = dict(zip(column("hero"), column("child"), strict=True))
    friends, colours, things = set(column("friend")), set(column("colour")), set(column("thing"))
    for text in many[:5000]:
        told = words(text)
        heroes = {word for word in told if word in hero_child}
        (hero,) = heroes
        assert {word.lower() for word in told if word.lower() in ("he", "she")} <= {
            "he" if hero_child[hero] == "boy" else "she"
        }
        (colour,) = {word for word in told if word in colours}
        (thing,) = {word for word in told if word in things}
        assert len({word for word in told if word in friends}) <= 1
        last = sentences(text)[-1]
        assert hero in words(last), text
        assert f"the {colour} {thing}" in last, text
        assert 4 <= len(sentences(text)) <= 11


def test_a_friend_has_fitting_pronouns(many):
    child = dict(zip(column("friend"), column("friend_child"), strict=True))
    met = 0
    for text in many[:5000]:
        if found := re.search(r"met an? \w+ (boy|girl) (?:named|called) (\w+)", text):
            met += 1
            assert child[found[2]] == found[1]
            gift = re.search(rf"{found[2]} [a-z ]*gave (?:him|her) [a-z ]* of (his|her) ", text)
            assert gift[1] == ("his" if found[1] == "boy" else "her")
    assert met > 300


def swap(text: str, word: str, others: list[str], last: bool = True) -> str:
    """`text` with the last (or first) `word` in it replaced by another one."""
    places = [found.span() for found in re.finditer(rf"\b{word}\b", text)]
    start, end = places[-1 if last else 0]
    return text[:start] + next(other for other in others if other != word) + text[end:]


def test_a_slip_is_not_accepted(many):
    heroes, friends = column("hero"), column("friend")
    for text in many[:100]:
        assert accepts(text)
        hero = next(word for word in words(text) if word in heroes)
        colour = next(word for word in words(text) if word in column("colour"))
        thing = next(word for word in words(text) if word in column("thing"))
        wrong = [
            swap(text, hero, heroes),
            swap(text, hero, friends),
            swap(text, colour, column("colour")),
            swap(text, colour, column("colour"), last=False),
            swap(text, thing, column("thing")),
            *(swap(text, word, ["she", "he"]) for word in ("he", "she") if word in words(text)),
            *(swap(text, word, ["his", "her"]) for word in ("his",) if word in words(text)),
            *(swap(text, word, ["girl", "boy"]) for word in ("girl", "boy") if word in words(text)),
            text + " ",
            " " + text,
            text + "\n",
            text + " " + text,
            text.replace(" ", "  ", 1),
            text.lower(),
            text[:-1],
            text[: len(text) // 2],
            " ".join(text.split(" ")[:-1]),
        ]
        for slip in wrong:
            assert not accepts(slip), slip
            assert log_prob(slip) == -math.inf
    assert not accepts("")
    assert not accepts("Once upon a time")
    assert not accepts("Zo\u00eb \udc80")


def test_typography(many):
    for text in many:
        assert text.isascii()
        assert text == text.strip()
        assert "  " not in text
        assert not re.search(r"[][{}<>|\n\t']", text), text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", text), text
        assert not re.search(r"\b[Aa]n [^aeiou]", text), text
        assert not re.search(r" [.,!?:]|[.!?][A-Za-z]|,[^ \"]", text), text
        assert not re.search(r"[.!] [a-z]|\b(\w+) \1\b", text), text
        assert text.count('"') % 2 == 0
        assert text[0].isupper()
        assert text.endswith(".")


def test_size(many):
    """Small enough for a tiny model in two minutes, large enough that nothing can be learnt by heart."""
    assert len(set(many)) == len(many)
    assert len({word.lower() for text in many for word in words(text)}) <= 460
    lengths = [len(words(text)) for text in many]
    assert min(lengths) >= 40
    assert max(lengths) <= 115
    scored = many[:1500]
    bits = [-log_prob(text) / math.log(2) for text in scored]
    assert min(bits) > 40  # so the streams of two seeds do not meet
    assert 0.18 < sum(bits) / sum(map(len, scored)) < 0.3


def longest(grammar, measure=len):
    """A bound that no tale exceeds, in units of `measure`, which of a text must not exceed its sum over the text's pieces.

    It takes the longest reading of every slot, whether or not one row of the table has them all: close but not sharp.
    """

    def size(node):
        if isinstance(node, str):
            return measure(node)
        if isinstance(node, Slot):
            return max(map(measure, node.readings))
        return max(sum(map(size, option)) for option in node.options)

    return size(grammar._start[0])


def test_every_tale_fits_the_context_of_its_preset(many):
    assert longest(TALES, tokens) <= 150
    for measure in (len, tokens, lambda text: len(words(text))):
        found = max(map(measure, many))
        assert found <= longest(TALES, measure) <= 1.2 * found
    assert longest(SMALL) == max(len(text) for text, _ in SMALL.derivations())


def test_streams_are_independent_and_resumable(many):
    first, second = many[:5000], list(islice(stream(2), 5000))
    assert not set(first) & set(second)
    assert list(islice(stream(1, start=100), 50)) == many[100:150]
    one_by_one = {sample(seed) for seed in range(-500, 500)}
    assert len(one_by_one) == 1000
    assert not one_by_one & set(many)
    # Tales of equal number in two streams share no more than any two tales do: here, the hero.
    hero = [
        [next(word for word in words(text) if word in column("hero")) for text in tales]
        for tales in (first, second)
    ]
    same = sum(a == b for a, b in zip(*hero, strict=True)) / 5000
    weights = [2 - i / (len(column("hero")) - 1) for i in range(len(column("hero")))]
    by_chance = sum(weight**2 for weight in weights) / sum(weights) ** 2
    assert abs(same - by_chance) < 5 * math.sqrt(by_chance / 5000)


PINNED = (
    "Rosa was a kind girl of five who read a blue book in the forest. One warm morning, she heard a "
    "sad sound by the river and found a muddy hen stuck beside a funny log. Rosa put down the blue "
    "book and pushed for two hours until the hen was free. The hen clucked three times and rushed "
    "home with her, and she called it Patch. From then on, Rosa was proud of the blue book."
)
PINNED_SHA256 = "708f00283246eaa2b31e66c487824b6ef58636be1f895c2aa567d9359121e1f2"


def test_the_same_in_every_process():
    assert sample(0) == PINNED
    program = (
        "import hashlib, itertools; from fusedgpt.data.tales import stream;"
        "print(hashlib.sha256('\\n'.join(itertools.islice(stream(0), 100)).encode()).hexdigest())"
    )
    for hash_seed in ("0", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == PINNED_SHA256
    here = hashlib.sha256("\n".join(islice(stream(0), 100)).encode()).hexdigest()
    assert here == PINNED_SHA256


@pytest.mark.parametrize(
    ("tables", "rules", "message"),
    [
        ({"name": "Ann"}, {"tale": "{nmae} ran."}, "nmae"),
        ({"name": "Ann"}, {"tale": "<end>.", "end": "ran"}, "<end>"),
        ({"name": "Ann"}, {"tale": "[{name} ran."}, "brackets"),
        ({"name": "Ann"}, {"tale": "{name ran."}, "brackets"),
        ({"name, he": "Ann, she; Bob"}, {"tale": "{name}"}, "name, he"),
    ],
)
def test_a_wrong_grammar_is_named(tables, rules, message):
    with pytest.raises(ValueError, match=message):
        TaleGrammar(tables, rules)


def test_module_functions_are_those_of_the_default_grammar():
    assert tales.sample(5) == TALES.sample(5)
    assert next(tales.stream(5, 7)) == next(TALES.stream(5, 7))


def test_the_module_prints_tales() -> None:
    command = [sys.executable, "-m", "fusedgpt.data.tales"]
    printed = subprocess.run([*command, "3"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == list(islice(stream(0), 3))
    assert subprocess.run([*command, "x"], capture_output=True, check=False).returncode == 1
