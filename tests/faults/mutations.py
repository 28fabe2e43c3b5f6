"""Random changes of small files: of their bytes, and of the structure of JSON, YAML and tensors."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

DEEP = 200_000
DEEP_MARK = "<deep>"  # becomes brackets, nested far deeper than a parser of Python can follow

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5,
    -1e300, 1e-320, 1e307, 1e308,
    float("inf"), float("nan"), "", " ", "x" * 300, "x" * 5000, "a\u2028b\x85c\x1b[2J", "\0",
    "\ud800", "~nosuchuser/x", "/etc/shadow", "../../x", "1e400", "nan", "0", "-1", "(", "(a+)+$",
    "a{1,1000}{1,1000}", "[" * 2000, ".*", "dtrain:", "dtrain:tiny-llama", "file:///etc/passwd",
    "http://", "/dev/zero", ".", "/", "{{ 1/0 }}", "!!binary aGVsbG8=", "2026-13-45", "0o9",
    [], {}, [[]], [{}], {"": ""}, [0] * 2000, {"a": {"b": {"c": []}}}, DEEP_MARK,
]  # fmt: skip

BYTES = [
    b"\0", b"\xff", b"\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\r", b"\n", b"\t",
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"&a ", b"*a ", b"<<: *a", b"!!binary ",
    b"!!set ", b"!!omap ", b"!!python/object:os.system ", b"? ", b"- ", b"---\n", b"...\n",
    b"%YAML 9.9\n", b"%TAG ! x\n", b"| ", b">-\n", b"#", b"{{", b"{%", b"9" * 5000, b"1e999",
    b"\\ud800", b"NaN", b"-Infinity",
]  # fmt: skip


def mutate(path: Path, rng: random.Random) -> bytes:
    """The changed content of a file."""
    data = path.read_bytes()
    change = _structural(path, data)
    if change is not None and rng.random() < 0.75:
        try:
            return change(data, rng)
        except (ValueError, KeyError, IndexError, TypeError):
            pass
    return _bytes(data, rng)


def _structural(path: Path, data: bytes) -> Callable[[bytes, random.Random], bytes] | None:
    if path.suffix in (".yaml", ".yml"):
        return _yaml
    if path.suffix in (".jsonl",):
        return _lines
    if path.suffix == ".json":
        return _json
    if path.suffix == ".safetensors":
        return _safetensors
    return None


def _bytes(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(result) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(200))  # headers break more readers than what follows
        kind = rng.randrange(7)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at:]
        elif kind == 2:
            result[at:at] = rng.choice(BYTES) * rng.choice((1, 1, 3, 100))
        elif kind == 3:
            del result[at : at + rng.randrange(1, 50)]
        elif kind == 4:
            chunk = result[at : at + rng.randrange(1, 200)]
            result[at:at] = chunk * rng.choice((1, 2, 20))
        elif kind == 5:
            result[at : at + 8] = rng.randbytes(8)
        else:
            result[at : at + 8] = rng.choice((0, 1, 2**31, 2**62, 2**64 - 1)).to_bytes(8, "little")
    return bytes(result)


def _json(data: bytes, rng: random.Random) -> bytes:
    return _dump(_change(json.loads(data), rng))


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    kind = rng.randrange(6)
    if kind == 0:
        lines[at:at] = [lines[at]] * rng.choice((1, 5))
    elif kind == 1:
        lines[at] = rng.choice((b"", b"[1]", b"null", b"{", b"x" * 70_000, b"{}", b"\xff"))
    else:
        lines[at] = _dump(_change(json.loads(lines[at]), rng))
    return b"\n".join(lines)


def _yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return data + rng.choice(YAML_TAILS)
    value = _change(YAML(typ="safe").load(data.decode()), rng)
    if rng.random() < 0.5:
        return _dump(value)  # JSON is YAML
    stream = io.BytesIO()
    YAML(typ="safe").dump(value, stream)
    return stream.getvalue().replace(DEEP_MARK.encode(), b"[" * 5000)


YAML_TAILS = [
    b"\nx: &a {<<: *a}\n",
    b"\nx: &a [*a]\n",
    b"\nx: &a {b: *a}\n",
    b"\nname: !!binary aGVsbG8=\n",
    b"\nx: !!set {a, b}\n",
    b"\nx: !!omap [a: 1]\n",
    b"\nx: !!timestamp 2026-99-99\n",
    b"\nx: 2026-11-30\n",
    b"\nx: !!float nan\n",
    b"\nx: !!int abc\n",
    b"\nx: !!null abc\n",
    b"\nx: !!map [1]\n",
    b"\nx: !!seq {a: 1}\n",
    b"\n? [a, b]\n: c\n",
    b"\n? {a: b}\n: c\n",
    b"\n1: 2\nnull: 3\ntrue: 4\n",
    b"\nx: " + b"9" * 5000 + b"\n",
    b"\nx: " + b"[" * 3000 + b"\n",
    b"\nx: " + b"{a: " * 3000 + b"\n",
    b"\na: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghi"),
    b"\n" + b"".join(b"k%d: v\n" % i for i in range(30_000)),
    b"\nx: " + b"'" + b"y" * 100_000 + b"'\n",
    b"\nx:\n" + b"".join(b" " * i + b"- \n" for i in range(1, 300)),
]


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in entries if key != "__metadata__"])
    entry, others = entries[name], list(entries)
    kind = rng.randrange(9)
    if kind == 0:
        entry.pop(rng.choice(list(entry)))
    elif kind == 1:
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(ODD)
    elif kind == 2:
        entry["dtype"] = rng.choice(("F64", "F32", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "Z"))
    elif kind == 3:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(
            (0, -1, 1, 2**31, 2**63, 2**70, 1.5, "3", None, [2])
        )
    elif kind == 4:
        at, by = rng.randrange(2), rng.choice((-(2**40), -4, -1, 1, 4, 2**40, 0.5))
        entry["data_offsets"][at] += by
    elif kind == 5:
        entries[name], other = entries[rng.choice(others)], entry
        entries[rng.choice(others)] = other
    elif kind == 6:
        entries[rng.choice(ODD) if rng.random() < 0.2 else name + ".x"] = entry
        entries.pop(name, None) if rng.random() < 0.5 else None
    elif kind == 7:
        entry["shape"] = rng.choice(([], [1] * 3, [*entry["shape"], 1], entry["shape"][::-1]))
    else:
        entries = _change(entries, rng)
    head = _dump(entries)
    if rng.random() < 0.9:
        return len(head).to_bytes(8, "little") + head + data[8 + length :]
    return rng.choice((0, 7, 2**31, 2**63)).to_bytes(8, "little") + head + data[8 + length :]


def _dump(value: Any) -> bytes:
    text = json.dumps(value).replace("1e+308", "1e400")
    return text.replace(f'"{DEEP_MARK}"', "[" * DEEP).encode()


def _change(value: Any, rng: random.Random) -> Any:
    """A value with something in it replaced, removed, doubled or nested."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holders = list(_holders(value))
        if not holders or rng.random() < 0.02:
            return rng.choice(ODD)
        # A few long lists must not take all the changes.
        holder = rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        kind = rng.randrange(8)
        if kind <= 3:
            holder[key] = rng.choice(ODD)
        elif kind == 4:
            del holder[key]
        elif kind == 5:
            holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3))
        elif kind == 6:
            holder[key] = _retyped(holder[key])
        elif isinstance(holder, dict):
            holder[str(rng.choice(ODD))] = holder[key]
        else:
            holder.insert(key, rng.choice(ODD))
    return value


def _retyped(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return dict(enumerate(value)) if not value else {str(i): v for i, v in enumerate(value)}
    return list(value) if isinstance(value, dict) else 0


def _holders(value: Any) -> Any:
    """All dicts and lists in a value that are not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holders(item)
