"""Change an input by what its files are: numbers, names and structure of JSON and TOML, headers and tensors."""

from __future__ import annotations

import json
import random
import re
import struct
from typing import Any

from tests.fuzz.bundle import joined, parted

LARGEST = 200_000
OUTSIDE = "../outside/model.safetensors"
_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    -(2**31),
    2**63,
    2**64,
    10**40,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "\x00",
    "\ud800",
    "ä😀",
    "a" * 3000,
    "..",
    OUTSIDE,
    "/etc/passwd",
    "re:(",
    "*",
    "(a+)+$",
    "[/x]",
    "\x1b[31m",
    "[]",
    "{}",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    {"a": 1},
    {"": {}},
    "float32",
    "1",
    "1.5",
    "default",
    "tree",
]
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X", "")
_BITS = {"F64": 64, "I64": 64, "C64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "F4": 4}
_NUMBERS = (b"\x00" * 8, b"\xff" * 8, struct.pack("<d", 1e300), struct.pack("<ff", 1e30, -1e30), struct.pack("<q", -1))
_PICKLE = b"cos\nsystem\n(S'true'\ntR."


def mutated(data: bytes, rng: random.Random, dictionary: tuple[str, ...] = ()) -> bytes:
    """One to four changes to one of an input's files, or to the input where it is one.

    Args:
        data: the input.
        rng: decides.
        dictionary: words that mean something to the target.
    """
    for _ in range(rng.choice((1, 1, 2, 4))):
        files = parted(data)
        if not files:
            data = _changed("", data, rng, dictionary)
            continue
        name = rng.choice(list(files))
        chance = rng.random()
        if chance < 0.03:
            del files[name]
        elif chance < 0.06:
            files[name] = files[rng.choice(list(files))]
        else:
            files[name] = _changed(name, files[name], rng, dictionary)
        data = joined(files)
    return data[:LARGEST]


def _changed(name: str, data: bytes, rng: random.Random, words: tuple[str, ...]) -> bytes:
    if rng.random() < 0.1:
        return _bytes(data, rng)
    if name.endswith(".safetensors"):
        return _safetensors(data, rng, words)
    if name.endswith((".toml", ".txt", ".onnx", ".onnx_adapter")):
        return _text(data, rng, words) if name.endswith((".toml", ".txt")) else _bytes(data, rng)
    try:
        if name.endswith(".jsonl"):
            lines = data.split(b"\n")
            at = rng.randrange(len(lines))
            lines[at] = _dumped(_json(json.loads(lines[at]), rng, words))
            return b"\n".join(lines)
        return _dumped(_json(json.loads(data), rng, words))
    except (ValueError, RecursionError):
        return _text(data, rng, words)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _json(value: Any, rng: random.Random, words: tuple[str, ...]) -> Any:
    """The value with one place changed; deep places as likely as those above."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any, depth: int) -> None:
        found = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in found:
            places.append((node, key))
            if depth < 40:
                walk(child, depth + 1)

    walk(value, 0)
    if not places or rng.random() < 0.02:
        return _value(value, rng, words)
    node, key = rng.choice(places)
    chance = rng.random()
    if chance < 0.15:
        del node[key]
    elif chance < 0.25 and isinstance(node, dict):
        node[_word(rng, words)] = node.pop(key)
    elif chance < 0.35 and isinstance(node, dict):
        node[_word(rng, words)] = _value(node[key], rng, words)
    elif chance < 0.4 and isinstance(node, list):
        node.append(node[key])
    elif chance < 0.5:
        node[key] = rng.choice(places)[0]
        node[key] = json.loads(json.dumps(node[key])) if not _inside(node, node[key]) else [node[key] is node]
    else:
        node[key] = _value(node[key], rng, words)
    return value


def _inside(node: Any, other: Any) -> bool:
    found = other.values() if isinstance(other, dict) else other if isinstance(other, list) else ()
    return other is node or any(_inside(node, child) for child in found)


def _value(old: Any, rng: random.Random, words: tuple[str, ...]) -> Any:
    chance = rng.random()
    if chance < 0.25 and words:
        return rng.choice(words)
    if chance < 0.35 and isinstance(old, (int, float)) and not isinstance(old, bool):
        return rng.choice((old + 1, old - 1, -old, old * 2, old * 0.5, str(old), [old], old * 1000))
    if chance < 0.45 and isinstance(old, str):
        return rng.choice((old + "x", old[1:], old.upper(), old * 2, [old], old + "\n", "." + old, old.encode().hex()))
    if chance < 0.5:
        return rng.choice(([old], {"a": old}, [old, old], str(old)))
    return rng.choice(_VALUES)


def _word(rng: random.Random, words: tuple[str, ...]) -> str:
    return rng.choice(words) if words and rng.random() < 0.7 else str(rng.choice(_VALUES))[:200]


def _text(data: bytes, rng: random.Random, words: tuple[str, ...]) -> bytes:
    """One token is exchanged, one line goes or comes twice, or bytes change."""
    text = data.decode("utf-8", "surrogateescape")
    tokens = list(re.finditer(r"[\w.+-]+|\"[^\"]*\"|'[^']*'|\S", text))
    chance = rng.random()
    if not tokens or chance < 0.1:
        return _bytes(data, rng)
    if chance < 0.25:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [rng.choice(lines)]))
        return "\n".join(lines).encode("utf-8", "surrogateescape")
    token = rng.choice(tokens)
    made = rng.choice(words) if words and rng.random() < 0.3 else rng.choice(_VALUES)
    said = made if isinstance(made, str) and rng.random() < 0.3 else json.dumps(made)
    if chance < 0.3:
        said = rng.choice(("[" * 5000, "{" * 2000, "a." * 3000 + "a", "9" * 5000, "1e999", "nan", "inf", "1979-05-27"))
    return (text[: token.start()] + said + text[token.end() :]).encode("utf-8", "replace")


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.choice((b"", b"\x00", b"{}", _PICKLE, b"\x80\x04K\x01."))
    chance, at = rng.random(), rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 64)))
    if chance < 0.35:
        return data[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + data[end:]
    if chance < 0.5:
        return data[:at] + bytes((data[at] ^ (1 << rng.randrange(8)),)) + data[at + 1 :]
    if chance < 0.6:
        return data[:at]
    if chance < 0.75:
        return data[:at] + rng.choice(_NUMBERS) + data[at + 8 :]
    if chance < 0.85:
        return data[:at] + data[end:]
    if chance < 0.95:
        return data[:at] + data[at:end] * rng.choice((2, 50)) + data[end:]
    return rng.choice((b"", _PICKLE, data * 2, b"\xff\xfe" + data, b"[" * 60_000, b"\x80\x04K\x01."))


def _safetensors(data: bytes, rng: random.Random, words: tuple[str, ...]) -> bytes:
    """The header as JSON with a length that is right or not, or tensors that stay consistent with their header."""
    try:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        if rng.random() < 0.6:
            return _repacked(header, body, rng, words)
        header = _json(header, rng, words)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return _bytes(data, rng)
    text = _dumped(header)
    claimed = rng.choice((len(text),) * 8 + (0, 1, len(text) - 1, len(text) + 5, 2**31, 2**40, 2**63, 2**64 - 1))
    return claimed.to_bytes(8, "little") + text + body


def _repacked(header: dict[str, Any], body: bytes, rng: random.Random, words: tuple[str, ...]) -> bytes:
    notes = header.pop("__metadata__", None)
    tensors = {n: (e["dtype"], list(e["shape"]), body[slice(*e["data_offsets"])]) for n, e in header.items()}
    chance, name = rng.random(), rng.choice(list(tensors)) if tensors else "x"
    dtype, shape, numbers = tensors.get(name, ("F32", [2, 2], b"\x00" * 16))
    if chance < 0.15:
        notes = _json({"": notes} | (notes or {}), rng, words)
        notes = {k: v if rng.random() < 0.05 else str(v) for k, v in notes.items()}
        if rng.random() < 0.5 and notes:
            key = rng.choice(list(notes))
            try:
                notes[key] = json.dumps(_json(json.loads(notes[key]), rng, words))
            except (ValueError, TypeError):
                notes[key] = str(_value(notes[key], rng, words))
    elif chance < 0.25:
        tensors.pop(name, None)
    elif chance < 0.4:
        moved = tensors.pop(name, (dtype, shape, numbers))
        ends = [w for w in words if w.startswith(".")]
        stem = name[: name.rindex(".")] if "." in name else name
        tensors[rng.choice((_word(rng, words), stem + rng.choice(ends or ["x"]), name + "x", "." + name, ""))] = moved
    elif chance < 0.55:
        tensors[name] = (dtype, shape, (rng.choice(_NUMBERS) * (len(numbers) // 8 + 1))[: len(numbers)])
    elif chance < 0.7:
        dtype = rng.choice(_DTYPES)
        tensors[name] = _sized(dtype, shape, numbers)
    else:
        at = rng.randrange(len(shape) + 1)
        made = rng.choice(
            (
                shape[::-1],
                [*shape[:at], 1, *shape[at:]],
                [*shape[:at], *shape[at + 1 :]],
                [],
                [0],
                [*shape, 0],
                *([*shape[:at], n, *shape[at + 1 :]] for n in (0, 1, 2, 3, 4, 8, 9, 33)),
            )
        )
        tensors[name] = _sized(dtype, made, numbers)
    return packed(tensors, notes)


def _sized(dtype: str, shape: list[int], numbers: bytes) -> tuple[str, list[int], bytes]:
    count = 1
    for n in shape:
        count *= n
    size = min(count * _BITS.get(dtype, 8) // 8, LARGEST)
    return dtype, shape, (numbers * (size // max(len(numbers), 1) + 1))[:size].ljust(size, b"\x00")


def packed(tensors: dict[str, tuple[str, list[int], bytes]], notes: Any) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {} if notes is None else {"__metadata__": notes}
    place = 0
    for name, (dtype, shape, numbers) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(numbers)]}
        place += len(numbers)
    text = _dumped(header)
    return len(text).to_bytes(8, "little") + text + b"".join(numbers for _, _, numbers in tensors.values())
