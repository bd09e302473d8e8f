"""Mutations of real files and of argument lists: of their bytes, and of what their format says.

Everything is drawn from one `random.Random`, so a seed gives the same input again.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    1e-320,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    255,
    65_535,
    65_536,
    10**7,
    10**9,
)
NUMBERS += tuple(sign * 2**power + d for power in (31, 32, 46, 63, 64) for d in (-1, 0) for sign in (1, -1))
WORDS = (
    *(
        "",
        "x",
        "../outside/other.safetensors",
        "/dev/zero",
        "/etc/passwd",
        ".",
        "..",
        "~",
        "model",
        "float32",
        "NaN",
    ),
    *(
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "a\nb\r\nc",
        "\x00",
        "\x7f",
        "\u202egnp",
        "\u2028",
        "\ud800",
        "\udcff",
    ),
    *("é" * 300, "x" * 5_000, "%s%n", "{0}", "[red]x[/red]", "-1", "1e5", "<|endoftext|>", "step-000009"),
)
# spellings that a writer of JSON would not write
RAW = (
    *(
        "9" * 5_000,
        "1e999",
        "-",
        "01",
        "'x'",
        "NaN",
        "Infinity",
        '"\\ud800"',
        '"\\u0000"',
        '"\x1b[2J"',
        "tru",
        "//",
        "",
    ),
    *("[" * n + "]" * n for n in (60, 600, 3_000, 100_000)),
    *('{"a":' * n + "1" + "}" * n for n in (60, 600, 3_000, 100_000)),
    *("[" * 50_000, "[" + "{}," * 20_000 + "{}]", '{"k":1,"k":2}'),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "")
TOML = (
    *("nan", "inf", "-1", "0", "1", "3", "10_000_000", "1_000_000_000", "9223372036854775807", "9" * 4_000, "1e308", "0.5"),
    *("true", '""', '"x"', '"\\u001b[31mred"', '"\\n\\r"', "'''\na\nb'''", "[]", "[1, 2]", "{}", "{a = 1}", "-"),
    *("1979-05-27T07:32:00Z", "0xffffffff", "[" * 600 + "]" * 600, "[" * 60_000, '"' + "x" * 5_000 + '"', '"\x1b[31m"', "{a = " * 500),
)  # fmt: skip


def mutate(data: bytes, form: str, random: Random, others: Sequence[bytes]) -> bytes:
    """The bytes of a file with one to three mutations.

    Args:
        data: of the real file.
        form: its format: a key of `FORMATS`, or "bytes".
        random: decides.
        others: files to splice with.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if form in FORMATS and random.random() < 0.7:
            try:
                data = FORMATS[form](data, random)
                continue
            except (
                ValueError,
                KeyError,
                IndexError,
                TypeError,
                AttributeError,
                struct.error,
                RecursionError,
            ):
                pass  # an earlier mutation has left nothing to edit
        data = _bytes(data, random, others)
    return data


def _bytes(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    n = len(data)
    a, b = sorted((random.randint(0, n), random.randint(0, n)))
    block = data[a:b][:4096]
    kind = random.randrange(10)
    if kind == 0:
        return data[:a]
    if kind == 1 and n:
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 2, 8, 64))):
            changed[random.randrange(n)] ^= 1 << random.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:a] + random.randbytes(random.choice((1, 2, 8, 100))) + data[a:]
    if kind == 3:
        return data[:a] + data[b:]
    if kind == 4:
        return data[:b] + block * random.choice((1, 2, 50)) + data[b:]
    if kind == 5:
        middle = (a + b) // 2
        return data[:a] + data[middle:b] + data[a:middle] + data[b:]
    if kind == 6:
        return random.choice(others)
    if kind == 7:
        other = random.choice(others)
        return data[:a] + other[min(a, len(other)) :]
    if kind == 8:
        return (
            data[:a]
            + random.choice((b"\0", b"\xff", b"\n", b"\x1b[31m", b"\xed\xa0\x80", b"\xc3"))
            * random.choice((1, 8))
            + data[a:]
        )
    return random.choice(
        (b"", b"\0" * n, b"\xff" * n, data + data, data + b"\0", data[1:], b"\xef\xbb\xbf" + data)
    )


# ---- by format: each raises ValueError and the like where the data is no longer of it


def _json(data: bytes, random: Random) -> bytes:
    holder = [json.loads(data)]
    raw = _edit(holder, random)
    text = json.dumps(holder[0], indent=random.choice((None, 1)), ensure_ascii=random.random() < 0.5)
    return text.replace('"@raw@"', raw).encode(errors="surrogatepass")


def _edit(holder: list[Any], random: Random) -> str:
    """Change one value somewhere in a JSON document; returns what the string "@raw@" in it stands for."""
    where: Any = holder
    key: Any = 0
    while isinstance(where[key], dict | list) and where[key] and random.random() < 0.75:
        where = where[key]
        key = random.choice(list(where)) if isinstance(where, dict) else random.randrange(len(where))
    value = where[key]
    kind = random.randrange(12)
    if kind == 0 and where is not holder:
        del where[key]
    elif kind == 1 and isinstance(where, dict):
        where[random.choice(WORDS)] = where.pop(key)
    elif kind == 2 and isinstance(where, dict):
        where[random.choice(WORDS)] = random.choice((*NUMBERS, *WORDS))
    elif kind == 3 and isinstance(where, list):
        where.insert(key, where[random.randrange(len(where))])
    elif kind == 4 and isinstance(value, list):
        where[key] = value * random.choice((2, 3, 300))
    elif kind == 5 and isinstance(value, list) and value and isinstance(value[0], list):
        where[key] = [[97, 97], *([i, i] for i in range(256, 256 + random.choice((10, 28, 45, 900))))]
    elif kind == 6:
        where[key] = random.choice(([value], {"a": value}, [], {}, None, str(value)))
    elif kind == 7 and isinstance(value, int | float):
        where[key] = random.choice(
            (value + 1, value - 1, -value, value * 2, value * 10**6, value / 2, str(value), bool(value))
        )
    elif kind == 8 and isinstance(value, str):
        where[key] = random.choice((value[:-1], value + random.choice(WORDS), value * 300, value.upper()))
    elif kind == 9:
        where[key] = "@raw@"
        return random.choice(RAW)
    else:
        where[key] = random.choice(random.choice((NUMBERS, WORDS, (None, True, False))))
    return ""


def _jsonl(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    i = random.randrange(len(lines) - 1)
    lines[i] = random.choice(
        (_json(lines[i], random).replace(b"\n", b" "), lines[i][:-3], b"", b"null", b"[1]", b"{}")
    )
    return b"\n".join(lines)


def _text(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    kind = random.randrange(6)
    if kind == 0:
        lines[i] = random.choice(WORDS).encode(errors="surrogatepass")
    elif kind == 1:
        lines[i] = lines[i].replace(b" ", random.choice((b"", b"  ", b"\t", b"\r\n", b"\0", b" x ")))
    elif kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines[i] *= random.choice((2, 1_000))
    elif kind == 4:
        return data.decode(errors="replace").encode(random.choice(("utf-16", "utf-8-sig", "utf-32")))
    else:
        del lines[i]
    return b"\n".join(lines)


def _toml(data: bytes, random: Random) -> bytes:
    lines = data.decode().split("\n")
    i = random.choice([i for i, line in enumerate(lines) if " = " in line])
    key, value = re.match(r"(.*?) = (.*?) *(?:  # .*)?$", lines[i]).groups()  # type: ignore[union-attr]
    kind = random.randrange(9)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(i, lines[i])
    elif kind == 2:
        lines[i] = f"{json.dumps(random.choice(WORDS))} = {value}"
    elif kind == 3:
        lines.insert(
            i,
            random.choice(
                ("[x]", "[model]", "[[train]]", f"[{'a.' * 900}a]", f"{'a.' * 900}a = 1", "[model.x]", "x")
            ),
        )
    elif kind == 4:
        lines.insert(i, f"{key}.x = 1")
    elif kind == 5 and re.fullmatch(r"[-\d.e]+", value):
        sign, more = random.choice((("-", ""), ("", "0000000"), ("", ".5"), ("", "e9"), ('"', '"')))
        lines[i] = f"{key} = {sign}{value}{more}"
    else:
        lines[i] = f"{key} = {random.choice(TOML)}"
    return "\n".join(lines).encode(errors="surrogatepass")


def _safetensors(data: bytes, random: Random) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    kind = random.randrange(11)
    claimed, raw = None, ""
    if kind == 0:
        entry["dtype"] = random.choice(DTYPES)
    elif kind == 1:
        i = random.randrange(len(entry["shape"])) if entry["shape"] else 0
        entry["shape"][i : i + 1] = random.choice(
            ([], [0], [1, 1], [2**62, 4], [-1], *([n] for n in NUMBERS[:12]))
        )
    elif kind == 2:
        entry["data_offsets"][random.randrange(2)] = random.choice(
            (0, 1, 4, len(body), len(body) + 4, *NUMBERS[-20:])
        )
    elif kind == 3:
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        header[other + random.choice(("", "x", "|step", "|exp_avg", "\x1b[31m"))] = header.pop(name)
    elif kind == 5:
        claimed = random.choice((0, 1, length - 1, length + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
    elif kind == 6:  # one tensor fewer, or of another size, in a file that is consistent
        a, b = entry["data_offsets"]
        n = random.choice((0, 4, (b - a) // 8 * 4, 2 * (b - a)))
        body = body[:a] + random.randbytes(n) + body[b:]
        for left in (header[one] for one in names):
            left["data_offsets"] = [
                place + n - (b - a) if place >= b else place for place in left["data_offsets"]
            ]
        entry |= {"data_offsets": [a, a + n], "shape": [n // 4]}
        if n == 0 or random.random() < 0.3:
            del header[name]
            body = body[:a] + body[a + n :]
            for left in header.values():
                if "data_offsets" in left:
                    left["data_offsets"] = [
                        place - n if place >= a + n else place for place in left["data_offsets"]
                    ]
    elif kind == 7:  # another shape or dtype of the same size
        entry["shape"] = random.choice(
            ([math.prod(entry["shape"])], [1, *entry["shape"]], entry["shape"][::-1])
        )
    elif kind == 8:
        a, b = entry["data_offsets"]
        body = (
            body[:a]
            + random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f")) * ((b - a) // 4)
            + body[b:]
        )
    else:
        holder = [header]
        raw = _edit(holder, random)
        header = holder[0]
    text = json.dumps(header).replace('"@raw@"', raw).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + body


def _shard(data: bytes, random: Random) -> bytes:
    fields = list(struct.unpack_from("<3i", data))
    tokens = bytearray(data[1024:])
    kind = random.randrange(6)
    if kind < 3:
        fields[kind] = random.choice((0, 1, -1, 2, fields[kind] + 1, fields[kind] - 1, 2**31 - 1, -(2**31)))
    elif kind == 3:
        place = 2 * random.randrange(len(tokens) // 2)
        tokens[place : place + 2] = random.choice((b"\xff\xff", b"\0\x80", b"\x2c\x01"))
    elif kind == 4:  # short, and says so
        fields[2] = random.choice((0, 1, 2, 5, 9))
        del tokens[2 * fields[2] :]
    else:
        fields = [int.from_bytes(struct.pack("<i", field), "big", signed=True) for field in fields]
    return struct.pack("<3i", *fields) + data[12:1024] + bytes(tokens)


def _parquet(data: bytes, random: Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one text. " * 9, "another. " * 9, "", "ünï"]
    strings = pa.array([*texts, None] if random.random() < 0.3 else texts)
    column = random.choice(
        (
            *(strings, strings.dictionary_encode(), strings.cast("large_string"), strings.cast("binary")),
            *(
                pa.array([1, 2]),
                pa.array([["a"], ["b"]]),
                pa.array([{"a": "b"}]),
                pa.nulls(3),
                pa.array([b"\xff\xfe", b"\x80"]),
            ),
            *(pa.array([], "string"), pa.array(["x" * 10**6] * 2), pa.array([1.5])),
        )
    )
    name = random.choice(("text", "text", "text", "Text", "\x1b[31mtext", "x" * 3_000, "a\nb", ""))
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), file, compression=random.choice(("snappy", "zstd", "none")))
    written = file.getvalue().to_pybytes()
    return written if random.random() < 0.7 else _bytes(written, random, [data])


FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": _json,
    "jsonl": _jsonl,
    "text": _text,
    "toml": _toml,
    "safetensors": _safetensors,
    "shard": _shard,
    "parquet": _parquet,
}


def mutate_words(words: Sequence[str], random: Random) -> list[str]:
    """A command line with one to three mutations of its words."""
    words = list(words)
    for _ in range(random.choice((1, 1, 2, 3))):
        i = random.randrange(len(words))
        value = random.choice(
            random.choice(
                (WORDS, [repr(n) for n in NUMBERS], ["9" * 5_000, "1_0", "٣", "0x10", "None", "true"])
            )
        )
        # without what no argument can hold; and no absolute path, for it might be overwritten
        value = value.replace("\0", "").replace("\ud800", "").lstrip("/") or "''"
        kind = random.randrange(7)
        if kind == 0 and len(words) > 1:
            del words[i]
        elif kind == 1:
            words.insert(i, words[i])
        elif kind == 2:
            words.insert(
                i,
                random.choice(
                    (f"--{value}", f"--steps={value}", "--", "-h=3", "--no-bias", "--seed", f"-{value}")
                ),
            )
        elif kind == 3 and "=" not in words[i]:
            words[i] = f"{words[i]}={value}" if words[i].startswith("--") else words[i] + value
        else:
            words[i] = value
    return words
