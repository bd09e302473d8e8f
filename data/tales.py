"""The embedded corpus: a seeded probabilistic grammar that writes short English tales without limit.

It exists so that training needs no download and can be judged against a number. The grammar knows the
probability of every text that it can write, so the mean of `-log_prob` over given tales is the lowest loss
that any model can expect on them, and `accepts` tells whether a generated text is a tale at all. A tale is
one line of five to ten sentences. The hero's name and pronoun, the friend, the toy and its colour stay the
same to the end, so a model has to look back over the whole tale to get the last sentence right.

How to read the grammar:

- A *table* holds what stays the same within a tale: one row of it is true for one tale. `{thing}` shows the
  cell of column `thing`, `{Thing}` begins it with a capital, `{a thing}` puts "a" or "an" before it.
  Nothing is drawn before it shows: `{child}` draws between "girl" and "boy" and leaves only the rows that
  agree, so that a later `{hero}` draws among the girls. What is never shown costs no bits.
- A *rule* is a phrase that is drawn anew wherever `<rule>` stands. `|` separates alternatives (spaces on
  both sides of it are layout), and brackets hold a choice inside a phrase: `[big|small|]` is "big", "small"
  or nothing. A rule uses only rules above it, so every tale ends.
- What is written first is likelier: of n rows or alternatives the first has twice the weight of the last,
  the others lie evenly between.

Words of a table are kept out of the rules as far as English allows (no house is red, no friend has a hero's
name): a small model copies the right word far sooner when no other word of the kind stands in between.
"""

import math
import random
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from typing import TypeAlias

TABLES = {
    "hero, child, he, him, his": """
        Lily, girl, she, her, her; Tom, boy, he, him, his; Anna, girl, she, her, her;
        Ben, boy, he, him, his; Max, boy, he, him, his; Rosa, girl, she, her, her;
        Leo, boy, he, him, his; Mia, girl, she, her, her; Nora, girl, she, her, her;
        Finn, boy, he, him, his; Ella, girl, she, her, her; Hugo, boy, he, him, his;
        Jack, boy, he, him, his; Clara, girl, she, her, her; Oscar, boy, he, him, his;
        Ida, girl, she, her, her; Eva, girl, she, her, her; Theo, boy, he, him, his
        """,
    "friend, friend_child, friend_him, friend_his": """
        Kate, girl, her, her; Sam, boy, him, his; Adam, boy, him, his; Ruth, girl, her, her;
        Ivy, girl, her, her; Paul, boy, him, his; Luke, boy, him, his; Emma, girl, her, her;
        Noah, boy, him, his; June, girl, her, her
        """,
    "thing, play, played, stuff": """
        kite, fly, flew, paper; ball, throw, threw, wool; boat, sail, sailed, wood; drum, beat, beat, tin;
        wagon, pull, pulled, wood; lantern, light, lit, paper; bell, ring, rang, tin;
        hoop, roll, rolled, wood; book, read, read, paper; top, spin, spun, tin
        """,
    "colour": "red; blue; green; yellow; orange; white; purple; golden",
    "trait": "kind; brave; clever; cheerful; gentle; patient; merry; shy",
    "age": "six; seven; five; eight; nine; four; ten",
    "elder": "mother; father; sister; brother",
    "kin": "grandmother; uncle; aunt; grandfather",
    "animal, cried": """
        dog, barked; cat, purred; duck, quacked; mouse, squeaked; owl, hooted; frog, croaked; goat, bleated;
        hen, clucked
        """,
    "pet": "Pip; Button; Pepper; Moss; Biscuit; Dot; Clover; Patch",
    "food": "bread; apple cake; plum pie; honey cake; apple pie; plum cake",
    "weather, came, ended": """
        rain, began to fall, stopped; wind, began to blow, stopped; snow, began to fall, stopped;
        storm, came, was over; fog, came, was gone
        """,
    "fear, was, scene": """
        the dark, was, the light went out; big dogs, were, a big dog stood at the gate;
        spiders, were, a spider sat on the wall
        """,
    "illness": "cold; fever; cough",
}

RULES = {
    "day": "day | morning | afternoon",
    "the mill": "the [mill|bridge|market|farm|church|harbour|bakery|tower]",
    "the park": "the [park|river|meadow|hill|forest|pond|garden|lake]",
    "in the park": """
        in the park | by the river | in the meadow | on the hill | in the forest | by the pond | in the garden
        | by the lake
        """,
    "sunny": "sunny | warm | windy | cold | bright | quiet | grey | fine",
    "One day": "One <sunny> <day> | One <day>",
    "two": "three | two | four | five | six | seven | eight | nine | ten",
    "an old": "an old | a small | a strange | a big | a muddy | a grey | a funny | a wet",
    "a shoe": "<an old> [shoe|sock|button|leaf|hat|spoon]",
    "behind a tree": "[behind|under|near|beside] <an old> [tree|rock|bush|fence|gate|log|wall|bench]",
    "softly": "softly | kindly | with a smile | quietly | gently | gladly | slowly | bravely",
    "said": "said | called | whispered | cried",
    "took": "took | carried | brought",
    "ran": "ran | hurried | walked | rushed | went",
    "smiled": "smiled | laughed | nodded | clapped | danced | sang | jumped",
    "named": "named | called",
    "a dragon": "<an old> [dragon|king|castle|ship|bear|fish|cloud|star]",
    "until dark": """
        until [it was dark|dinner|bedtime|the stars came out|the sun went down|{his} {elder} called]
        """,
    "friend": "{friend}[ from [<the mill>|school|next door|the city]|]",
    "said hero": "<said> {hero}[| <softly>]",
    "said elder": "<said> {his} {elder}[| <softly>]",
    "praise": """
        "[What a {trait} {child} you are|You are [such |]{a trait} {child}][, {hero}|]," <said elder>.
        """,
    "Once": "Once upon a time | Long ago | Once | In the old days",
    "start": """
        In a [stone|wooden|crooked|narrow|tall|little|round|brick] house [by|near|behind|beside] <the mill>
        lived {a trait} {child}[ of {age}|] <named> {hero}
        | <Once> there [was|lived] {a trait} {child}[ of {age}|] <named> {hero}
        | {Hero} was {a trait} {child}[ of {age}|]
        """,
    "every day": "every [day|morning|evening] | on <sunny> days | all day long | <in the park>",
    "had": """
        who had {a colour} {thing}[ and {played} it <every day>|].
        | who loved {his} {colour} {thing} more than [anything else|any other toy|<two> plum cakes].
        | who {played} {a colour} {thing} <every day>.
        """,
    "He had": """
        {He} had {a colour} {thing}[ and {played} it <every day>|].
        | Of all {his} <two> toys, {he} liked {his} {colour} {thing} best.
        | {His} {elder} had [made|given|bought] {him} {a colour} {thing}[ and <two> other toys|].
        | Every <day>, {he} {played} {his} {colour} {thing} <in the park>.
        """,
    "From then on": "From that day on | From then on | After that | Ever since that day",
    "end": """
        That [night|evening], {hero} [slept|fell asleep|lay] [beside|near|next to]
        the {colour} {thing} and dreamed of <a dragon>.
        | <From then on>, {hero} {played} the {colour} {thing} <every day>.
        | <From then on>, {hero} [took good care of|looked after|was proud of] the {colour} {thing}.
        | {Hero} <smiled> and {played} the {colour} {thing} [<until dark>|<softly>|<in the park>].
        | Then {hero} <took> the {colour} {thing} home and <smiled>.
        """,
    "end together": """
        <From then on>, {hero} and {friend} {played} the {colour} {thing} [together|<in the park>]
        [every <day>|<two> times a day].
        | {Hero} and {friend} <smiled> and {played} the {colour} {thing}
        [together|side by side|<in the park>].
        | So {hero} and {friend} [became|were] [best|good] friends
        and {played} the {colour} {thing} <until dark>.
        """,
    "end with animal": """
        <From then on>, {hero} and {pet} the {animal} watched over the {colour} {thing} together.
        | <From then on>, {pet} [sat|slept|lay] [beside|near|next to] the {colour} {thing}
        and waited for {hero}.
        """,
    "found by friend": """
        "[Do not worry|Do not cry|Do not be sad|We will find it|I will help you|I have good eyes][, {hero}|],"
        <said> <friend> and [looked|searched] <behind a tree>. There was something {colour}: the {thing}!
        [<end>|<end together>]
        """,
    "found by animal": """
        Then <an old> {animal} <named> {pet} <ran> by. {Pet} looked <behind a tree> and {cried} <two> times
        at something {colour}: the {thing}! [<end>|<end with animal>]
        """,
    "lost": """
        <One day>, {he} <took> it to <the park>, but [on the way home|soon|by noon] it was [gone|lost].
        {He} looked <behind a tree> and found <a shoe>, but no {colour} {thing}.
        [<found by friend>|<found by animal>]
        """,
    "weather": """
        <One day>, {hero} and <friend> <ran> to <the park> to {play} it.
        But [soon|before long|all at once] the {weather} {came}.
        They <ran> into <an old> [barn|shed|cave|hut|mill] and [told stories|sang songs|laughed]
        about <a dragon> until the {weather} {ended}. [<end>|<end together>]
        """,
    "share": """
        <One day>, {he} met a [lonely|sad|quiet|hungry|tired|small] {friend_child} <named> {friend}
        <in the park>.
        "[May I|Can I] {play} it[ too|, please|]?" asked {friend}[ <softly>|].
        {Hero} [thought for a moment|was not sure|looked at the ground|looked at {friend_him}],
        [but|and] then {he} <smiled>.
        {Friend} [<smiled> and |]gave {him} [half of|a piece of|some of|<two> pieces of] {friend_his} {food}.
        [|<praise> ]<end together>
        """,
    "trip": """
        <One day>, {he} took the {colour} {thing} along and <ran> <two> miles to the house of {his} {kin}.
        On the way, {he} saw <an old> {animal} and <two> [ships|flowers|stones].
        {His} {kin} <smiled> and gave {him} <two> pieces of {food}.
        They told stories about <a dragon> <until dark>. <end>
        """,
    "rescue": """
        <One day>, {he} heard a [sad|small|strange|soft] sound <in the park> and found <an old> {animal} stuck
        <behind a tree>.
        {Hero} put down the {colour} {thing} and [pulled|pushed|dug] for <two> [minutes|hours]
        until the {animal} was free.
        The {animal} {cried} <two> times and <ran> home with {him}, and {he} <named> it {pet}.
        [|<praise> ][<end>|<end with animal>]
        """,
    "ill": """
        <One day>, {he} heard that <friend> had {a illness} and could not [play|come out|go to school]
        for <two> days.
        {Hero} <took> {friend_him} the {colour} {thing} and <two> pieces of {food}.
        "[You may keep it|It is yours] for <two> days[, {friend}|]," <said hero>.
        Soon {friend} was well, <took> it back and <smiled>. [|<praise> ]<end together>
        """,
    "quarrel": """
        <One day>, {hero} and <friend> both wanted to {play} it.
        "[It is mine|I had it first|It is my turn|Let go][, {friend}|]!" cried {hero}.
        They [pulled|pushed|fought|shouted] for <two> [minutes|hours] until the {colour} {thing} fell into
        <an old> [puddle|hole|bush|pond].
        {Friend} <ran> [home|away] and did not come back for <two> [hours|days].
        Then {hero} <took> {friend_him} [<two> pieces of {food}|<two> flowers|some {food}].
        "[I am sorry|Let us be friends again][, {friend}|]," <said hero>. <end together>
        """,
    "fear": """
        But {hero} was [afraid|scared] of {fear}. One [windy|cold|quiet|warm] [night|evening], {scene},
        and {he} [wanted|began] to [cry|run|shout|hide].
        "[Take my hand|I am here|Do not be afraid|Think of <a dragon>][, {hero}|]," <said elder>.
        {Hero} [thought of|looked at] the {colour} {thing} and counted to <two>[ <softly>|].
        Soon {he} <smiled>, for {fear} {was} not [so|very] [bad|strange] after all.
        [<end>|<From then on>, {hero} {played} the {colour} {thing} [even when {scene}|day and night].]
        """,
    "build": """
        "[Let us|We can|I will help you] make one[, {hero}|]," <said> <friend>.
        They found some {stuff}, <two> [strings|nails|ropes|sticks] and {colour} paint <behind a tree>.
        The first {thing} [broke|fell apart|was lost] after <two> [minutes|hours|days], but they <smiled> and
        tried again, and after <two> more the {colour} {thing} was [done|ready]. [<end>|<end together>]
        """,
    "plot": "<lost> | <weather> | <share> | <trip> | <rescue> | <ill> | <quarrel> | <fear>",
    "tale": """
        <start> <had> <plot> | <start>. <He had> <plot>
        | <start> who [wanted|wished for] {a colour} {thing}[ of {his} own|]. <build>
        """,
}


@dataclass(frozen=True, eq=False)  # compared by identity: a slot is part of a cache's key
class Slot:
    """A cell of table number `table`: `readings[r]` stands in the text if row r is the tale's."""

    table: int
    readings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of several sequences of nodes: literal text, slots and further choices."""

    options: tuple[tuple["Node", ...], ...]


Node: TypeAlias = str | Slot | Choice
Todo: TypeAlias = tuple[Node, "Todo"] | None  # what is still to be written: the next node, and the rest
Rows: TypeAlias = tuple[tuple[int, ...], ...]  # for each table the rows that agree with the text so far

_TOKEN = re.compile(r"\{[^{}]+\}|<[^<>]+>|[\[\]|]|[^\[\]|{}<>]+")


@cache
def _weights(n: int) -> tuple[float, ...]:
    """Probabilities of n alternatives, falling evenly from the first to the last, which has half as much."""
    falling = [2 * n - 2 - i if n > 1 else 1 for i in range(n)]
    return tuple(weight / sum(falling) for weight in falling)


@cache
def _readings(slot: Slot, rows: tuple[int, ...]) -> list[tuple[float, str, tuple[int, ...]]]:
    """What `slot` can read when its table is down to `rows`: (probability, text, rows that read so)."""
    weights = _weights(len(slot.readings))
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(slot.readings[row], []).append(row)
    total = sum(weights[row] for row in rows)
    return [
        (sum(weights[row] for row in group) / total, text, tuple(group)) for text, group in groups.items()
    ]


class TaleGrammar:
    """A grammar in the notation of this module; the last rule writes the tale.

    Sampling, scoring and enumeration all follow `_branches`, so none can know a tale that another does not.

    Args:
        tables: column names ("a, b") to rows ("a1, b1; a2, b2").
        rules: rule names to their phrases, each using only rules above it.

    Raises:
        ValueError: a rule names an unknown column or a rule that is not above it, its brackets do not match,
            or a table's row has not one cell for each column.
    """

    def __init__(self, tables: Mapping[str, str], rules: Mapping[str, str]) -> None:
        self._columns: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._rules: dict[str, Choice] = {}
        rows: list[tuple[int, ...]] = []
        for names, text in tables.items():
            cells = [[" ".join(cell.split()) for cell in row.split(",")] for row in text.split(";")]
            if any(len(row) != len(names.split(", ")) for row in cells):
                raise ValueError(f"table {names!r}: a row has not one cell for each column")
            for name, column in zip(names.split(", "), zip(*cells, strict=True), strict=True):
                self._columns[name] = len(rows), column
            rows.append(tuple(range(len(cells))))
        for name, text in rules.items():
            phrase = " ".join(text.split()).replace(" | ", "|")
            tokens = _TOKEN.findall(phrase)
            if "".join(tokens) != phrase or tokens.count("[") != tokens.count("]"):
                raise ValueError(f"rule <{name}>: brackets do not match in {phrase!r}")
            self._rules[name] = self._choice(iter(tokens))
        self._rows: Rows = tuple(rows)
        self._start: tuple[Node, Todo] = (self._rules[name], None)

    def _choice(self, tokens: Iterator[str]) -> Choice:
        """Read alternatives up to the bracket that closes them."""
        options: list[list[Node]] = [[]]
        for token in tokens:
            if token == "]":
                break
            if token == "|":
                options.append([])
            elif token == "[":
                options[-1].append(self._choice(tokens))
            elif token[0] == "{":
                options[-1].append(self._slot(token[1:-1]))
            elif token[0] == "<":
                if token[1:-1] not in self._rules:
                    raise ValueError(f"{token} is used before it is defined")
                options[-1].append(self._rules[token[1:-1]])
            else:
                options[-1].append(token)
        return Choice(tuple(tuple(option) for option in options))

    def _slot(self, name: str) -> Slot:
        """The slot written `{name}`: "thing", "a thing", or with a capital "Thing", "A thing"."""
        column = name.lower().removeprefix("a ")
        if column not in self._columns:
            raise ValueError(f"{{{name}}}: no table has a column {column!r}")
        table, readings = self._columns[column]
        if name.lower().startswith("a "):
            readings = tuple(f"{'an' if cell[0] in 'aeiou' else 'a'} {cell}" for cell in readings)
        if name[0].isupper():
            readings = tuple(cell[0].upper() + cell[1:] for cell in readings)
        return Slot(table, readings)

    def _branches(self, todo: tuple[Node, Todo], rows: Rows) -> Iterator[tuple[float, str, Todo, Rows]]:
        """Every way to write the next node: (probability, its text, what is left to write, the rows left)."""
        node, rest = todo
        if isinstance(node, str):
            yield 1.0, node, rest, rows
        elif isinstance(node, Choice):
            for probability, option in zip(_weights(len(node.options)), node.options, strict=True):
                after = rest
                for part in reversed(option):
                    after = part, after
                yield probability, "", after, rows
        else:
            for probability, text, left in _readings(node, rows[node.table]):
                yield probability, text, rest, (*rows[: node.table], left, *rows[node.table + 1 :])

    def derivations(self, target: str | None = None) -> Iterator[tuple[str, float]]:
        """Yield (text, probability) for every way to write `target`, or anything at all where it is None.

        The grammar is unambiguous (a test holds it to that), so a text has one derivation or none.
        """
        stack: list[tuple[float, str, Todo, Rows]] = [(1.0, "", self._start, self._rows)]
        while stack:
            probability, text, todo, rows = stack.pop()
            if todo is None:
                if target is None or text == target:
                    yield text, probability
                continue
            for share, piece, rest, left in self._branches(todo, rows):
                if target is None or target.startswith(piece, len(text)):
                    stack.append((probability * share, text + piece, rest, left))

    def log_prob(self, text: str) -> float:
        """Natural logarithm of the probability of `text`, -inf if the grammar cannot write it."""
        probability = math.fsum(probability for _, probability in self.derivations(text))
        return math.log(probability) if probability else -math.inf

    def accepts(self, text: str) -> bool:
        """Whether the grammar can write `text`: a whole tale, to the letter."""
        return any(True for _ in self.derivations(text))

    def sample(self, seed: int) -> str:
        """One tale, the same for the same seed on every machine."""
        return self._write(random.Random(f"{seed}"))  # a str seeds by its SHA-512: as an int, -1 would be 1

    def stream(self, seed: int, start: int = 0) -> Iterator[str]:
        """Tales without end, beginning with number `start` of the sequence that belongs to `seed`.

        Every tale has a generator of its own: a stream is resumed at any number at no cost, and the streams
        of two seeds share a tale only by chance, which is as good as never.
        """
        for number in count(start):
            yield self._write(random.Random(f"{seed}:{number}"))

    def _write(self, rng: random.Random) -> str:
        pieces: list[str] = []
        todo: Todo = self._start
        rows = self._rows
        while todo is not None:
            x = rng.random()
            for branch in self._branches(todo, rows):
                x -= branch[0]
                if x < 0:
                    break  # if rounding keeps x from falling below 0, the last branch is it
            _, piece, todo, rows = branch
            pieces.append(piece)
        return "".join(pieces)


TALES = TaleGrammar(TABLES, RULES)
sample, log_prob, accepts, stream = TALES.sample, TALES.log_prob, TALES.accepts, TALES.stream


def main() -> None:
    """`python -m fusedgpt.data.tales 3000` prints that many tales, a line each."""
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python -m fusedgpt.data.tales NUMBER > tales.txt")
    for tale in islice(stream(seed=0), int(sys.argv[1])):
        print(tale)


if __name__ == "__main__":
    main()
