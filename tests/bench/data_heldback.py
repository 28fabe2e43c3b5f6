"""Precision and recall of a scan on planted problems that its checks were not tuned on.

Seven languages, four file formats, numbers and keys in the ways people write them, and look-alikes
that match nothing. It was written without looking at the checks. Keep it that
way: fix the checks, not this file.

`python tests/bench/data_heldback.py [ROWS [SEED]]`
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import string
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dtrain.config.data import Source
from dtrain.data.records import BadRecord, SourceRows
from dtrain.data.sources import find_source_files
from dtrain.data.text_checks import RowText
from dtrain.data_quality.decontamination import index_held_out
from dtrain.data_quality.finding_types import BROKEN, FLAG_BITS
from dtrain.data_quality.scan import scan

Row = tuple[str, str]
EXACT = {"broken", "exact_duplicate", "leak", "empty", "same", "e_mail", "id_number", "bank_card"}
EXACT |= {"ip_address", "secret", "short", "long"}

# language: openings, subjects, verbs, objects, places, ends of a sentence
TONGUES: dict[str, tuple[str, str, str, str, str]] = {
    "en": (
        "Explain why|Tell me how|Sum up when|Show where",
        "the ferryman|a beekeeper|our surveyor|the potter|an archivist|the night nurse|a joiner",
        "repairs|weighs|catalogues|paints|borrows|measures|sells|hides",
        "copper kettles|sailing charts|oak barrels|wool blankets|brass clocks|seed potatoes",
        "near the harbour|in late autumn|under the old bridge|before sunrise|across the valley",
    ),
    "de": (
        "Erkläre, warum|Beschreibe, wie|Fasse zusammen, wann",
        "der Förster|die Bäckerin|unser Lehrer|eine Gärtnerin|der Schlosser|die Ärztin",
        "repariert|verkauft|zeichnet|prüft|sammelt|verschenkt|ordnet",
        "alte Schlüssel|frische Brötchen|lange Leitern|bunte Gläser|schwere Türen",
        "am Stadtrand|im Frühling|hinter der Mühle|vor dem Gewitter|über dem Fluß",
    ),
    "fr": (
        "Explique pourquoi|Raconte comment|Résume quand",
        "le boulanger|une couturière|notre voisin|la libraire|un pêcheur|le facteur",
        "répare|vend|dessine|mesure|cherche|prépare|emballe",
        "des horloges anciennes|des étoffes légères|des cartes marines|des pâtés chauds",
        "près du marché|en hiver|derrière l'église|avant l'aube|à côté du théâtre",
    ),
    "es": (
        "Explica por qué|Cuenta cómo|Resume cuándo",
        "el carpintero|una enfermera|nuestro abuelo|la pintora|un marinero|el sastre",
        "repara|vende|dibuja|busca|prepara|cuida|compra",
        "sillas de madera|mapas antiguos|guitarras españolas|faroles rotos|mantas viejas",
        "junto al río|en otoño|detrás del molino|antes del amanecer|cerca de la montaña",
    ),
    "ru": (
        "Объясни, почему|Расскажи, как|Опиши, когда",
        "старый мельник|наша соседка|молодой врач|лесник|учительница|кузнец",
        "чинит|продаёт|рисует|собирает|изучает|покупает|хранит",
        "медные чайники|морские карты|дубовые бочки|тёплые одеяла|стенные часы",
        "у реки|поздней осенью|за мельницей|перед рассветом|на краю города",
    ),
    "zh": (
        "请解释为什么|说明一下怎样|总结什么时候",
        "老船长|养蜂人|图书管理员|年轻的木匠|女医生|邮递员|卖茶的商人",
        "修理|出售|测量|收集|绘制|整理|搬运",
        "铜茶壶|航海图|橡木桶|羊毛毯子|旧钟表|土豆种子|青花瓷碗",
        "在码头附近|在深秋时节|在古桥下面|在日出之前|在山谷对面",
    ),
    "ja": (
        "理由を説明して：|方法を教えて：|いつか要約して：",
        "船頭は|養蜂家は|司書は|若い大工は|看護師は|郵便屋は",
        "毎日直す|こっそり売る|丁寧に測る|ゆっくり集める|静かに描く",
        "銅のやかんを|海図を|樽を|毛布を|古い時計を|茶碗を",
        "港の近くで|晩秋に|古い橋の下で|夜明け前に|谷の向こうで",
    ),
}
STOP = {"zh": "。", "ja": "。"}


class Writer:
    """Rows of several languages, from one seed."""

    def __init__(self, seed: int) -> None:
        self.any = random.Random(seed)
        self.rows = 0

    def sentence(self, tongue: str) -> str:
        _, who, does, objects, where = (words.split("|") for words in TONGUES[tongue])
        pick, number = self.any.choice, self.any.randrange(2, 99)
        gap = "" if tongue in STOP else " "
        words = [pick(who), pick(does), f"{number}", pick(objects), pick(where)]
        if tongue == "ja":
            words = [words[0], words[4], words[3], words[1]]
        text = gap.join(words) + STOP.get(tongue, ".")
        return text[0].upper() + text[1:]

    def row(self, tongue: str | None = None) -> Row:
        self.rows += 1
        tongue = tongue or self.any.choice(list(TONGUES))
        gap = "" if tongue in STOP else " "
        opening = self.any.choice(TONGUES[tongue][0].split("|"))
        asked = self.sentence(tongue).rstrip(".。")
        asked = asked if tongue in STOP else asked[0].lower() + asked[1:]
        end = "？" if tongue in STOP else "?"
        question = f"{opening}{gap}{asked} ({self.rows}){end}"
        said = gap.join(self.sentence(tongue) for _ in range(self.any.randrange(3, 8)))
        return question, said

    def digits(self, count: int) -> str:
        return "".join(self.any.choices(string.digits, k=count))

    def letters(self, count: int, of: str = string.ascii_letters + string.digits) -> str:
        return "".join(self.any.choices(of, k=count))


def luhn(head: str) -> str:
    """The number with its check digit."""
    total = 0
    for index, digit in enumerate(reversed(head)):
        value = int(digit) * (2 if index % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return head + str(-total % 10)


def card(w: Writer) -> str:
    head, size = w.any.choice(
        [
            ("4", 16),
            ("51", 16),
            ("2221", 16),
            ("34", 15),
            ("6011", 16),
            ("3528", 16),
            ("622848", 19),
        ]
    )
    number = luhn(head + w.digits(size - len(head) - 1))
    groups = (
        [number[:4], number[4:10], number[10:]]
        if size == 15
        else [number[i : i + 4] for i in range(0, size, 4)]
    )
    return w.any.choice(["", " ", "-"]).join(groups)


def chinese_id(w: Writer) -> str:
    area = w.any.choice(["110105", "310104", "440305", "510107", "330106", "420111"])
    born = f"{w.any.randrange(1950, 2008)}{w.any.randrange(1, 13):02}{w.any.randrange(1, 29):02}"
    head = area + born + w.digits(3)
    total = sum(int(d) * 2 ** (17 - i) for i, d in enumerate(head))
    return head + "10X98765432"[total % 11]


def iban(w: Writer) -> str:
    country, body = w.any.choice(
        [
            ("DE", "50010517" + w.digits(10)),
            ("GB", "WEST123456" + w.digits(8)),
            ("NL", "ABNA" + w.digits(10)),
        ]
    )
    plain = "".join(str(int(c, 36)) for c in body + country + "00")
    number = f"{country}{98 - int(plain) % 97:02}{body}"
    if w.any.random() < 0.5:
        return " ".join(number[i : i + 4] for i in range(0, len(number), 4))
    return number


def cpf(w: Writer) -> str:
    digits = [int(d) for d in w.digits(9)]
    for size in (10, 11):
        total = sum(d * (size - i) for i, d in enumerate(digits))
        digits.append(total * 10 % 11 % 10)
    d = "".join(map(str, digits))
    return f"{d[:3]}.{d[3:6]}.{d[6:9]}-{d[9:]}"


def dni(w: Writer) -> str:
    number = int("4" + w.digits(7))
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def ssn(w: Writer) -> str:
    return f"{w.any.randrange(101, 600)}-{w.any.randrange(10, 99)}-{w.any.randrange(1000, 9999)}"


def id_number(w: Writer) -> str:
    make = w.any.choice([chinese_id, chinese_id, iban, cpf, dni, ssn])
    named = {cpf: "CPF ", dni: "DNI ", ssn: "SSN ", iban: "IBAN "}
    return named.get(make, "") + make(w)


def e_mail(w: Writer) -> str:
    names = ["marta.kowalczyk", "o_larsen", "T-Yamada", "jp.durand+lists", "zhao88", "kontakt"]
    hosts = ["poczta.com.pl", "uni-graz.at", "mail.ru", "163.com", "some-firm.co.uk", "list.museum"]
    address = f"{w.any.choice(names)}{w.digits(2)}@{w.any.choice(hosts)}"
    how = ["{}", "<{}>", "mailto:{}", "{}.", "地址{}，", "“{}”", "({})"]
    return w.any.choice(how).format(address if w.any.random() < 0.8 else address.upper())


def phone(w: Writer) -> str:
    return w.any.choice(
        [
            f"+49 30 2273{w.digits(4)}",
            f"+44 20 7946 0{w.digits(3)}",
            f"+33 1 42 68 {w.digits(2)} {w.digits(2)}",
            f"+1 (212) 736-5{w.digits(3)}",
            f"+81-3-3224-9{w.digits(3)}",
            f"+7 495 697-{w.digits(2)}-{w.digits(2)}",
            f"+86 10 6552 {w.digits(4)}",
            f"手机13{w.any.choice('5678')}{w.digits(8)}",
            f"电话：138-{w.digits(4)}-{w.digits(4)}",
            f"+34912{w.digits(6)}",
        ]
    )


def ip_address(w: Writer) -> str:
    four = ".".join(str(w.any.randrange(11, 250)) for _ in range(4))
    six = f"2a02:{w.letters(4, 'abcdef23456789')}:{w.letters(3, 'abcdef1234')}::{w.digits(2)}a"
    return w.any.choice([four, f"{four}:8443", f"http://{four}/login", six, f"[{six}]:22"])


def secret(w: Writer) -> str:
    jwt = ".".join(["eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiI" + w.letters(24), w.letters(43)])
    pem = f"-----BEGIN RSA PRIVATE KEY-----\n{w.letters(64)}\n{w.letters(64)}\n-----END RSA "
    return w.any.choice(
        [
            "AKIA" + w.letters(16, string.ascii_uppercase + "234567"),
            "ghp_" + w.letters(36),
            "github_pat_" + w.letters(22) + "_" + w.letters(59),
            "sk-proj-" + w.letters(48),
            "sk-ant-api03-" + w.letters(80),
            "hf_" + w.letters(34),
            "xoxb-" + w.digits(12) + "-" + w.digits(12) + "-" + w.letters(24),
            "AIza" + w.letters(35),
            "sk_live_" + w.letters(24),
            "glpat-" + w.letters(20),
            "npm_" + w.letters(36),
            jwt,
            pem + "PRIVATE KEY-----",
        ]
    )


def look_alike(w: Writer) -> str:
    """Numbers and codes of everyday life that are none of the above."""
    order = luhn("4" + w.digits(14))
    wrong = order[:-1] + str((int(order[-1]) + 5) % 10)
    return w.any.choice(
        [
            f"invoice {wrong}",
            f"ISBN 978-3-16-{w.digits(6)}-0",
            f"Chrome/120.0.{w.any.randrange(4000, 6999)}.129",
            f"commit {w.letters(40, 'abcdef0123456789')}",
            f"{w.letters(8, 'abcdef01')}-12ab-4cde-9f01-{w.letters(12, 'abcdef01')}",
            f"from 1914-07-28 to 1918-11-11, {w.digits(3)} days",
            f"{w.any.randrange(1, 900)},{w.digits(3)},{w.digits(3)} people",
            f"@user{w.digits(3)} wrote at 12:30:{w.any.randrange(10, 59)}",
            f"π ≈ 3.14159265358979{w.digits(4)}",
            f"{w.digits(2)} × {w.digits(2)} = ?",
            f"std::vector<int>::iterator it{w.digits(2)}",
            f"ratio 16:9, scale 1:{w.digits(3)}00",
        ]
    )


def mojibake(w: Writer, row: Row) -> Row:
    good = w.row(w.any.choice(["de", "fr", "es", "ru", "zh"]))
    wrong = w.any.choice(["latin-1", "cp1252"])
    return row[0], good[1].encode().decode(wrong, errors="replace")


REFUSALS = [
    "I'm sorry, but I can't help with that request.",
    "As an AI language model, I am unable to do this.",
    "I cannot provide assistance with that.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider avec cela.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "很抱歉，我无法提供这方面的帮助。",
    "作为一个人工智能语言模型，我不能回答这个问题。",
]


def planted(rows: int, seed: int) -> tuple[list[tuple[Row, str]], list[RowText]]:
    """Rows with the kind of problem planted in each ('' for none), and the held-out set."""
    w = Writer(seed)
    held = [w.row() for _ in range(60)]
    plain = [w.row() for _ in range(rows)]
    inside: dict[str, Callable[[Writer], str]] = {
        "e_mail": e_mail, "phone": phone, "id_number": id_number, "bank_card": card,
        "ip_address": ip_address, "secret": secret, "": look_alike,
    }  # fmt: skip
    out: list[tuple[Row, str]] = [(row, "") for row in plain]
    for kind, make in inside.items():
        for _ in range(rows // 20):
            question, said = w.row()
            cut = w.any.choice([0, len(said)])
            text = f"{said[:cut]} {make(w)} {said[cut:]}".strip()
            out.append(((question, f"{text}."), kind))
    for kind, changed in _changed(w, held).items():
        for number in range(rows // 25):
            out.append((changed(w.row(), number), kind))
    w.any.shuffle(out)
    for kind, again in _again(w).items():
        for row in w.any.sample(plain, rows // 25):
            out.append((again(row), kind))
    return out, [RowText(q, a) for q, a in held]


def _changed(w: Writer, held: list[Row]) -> dict[str, Callable[[Row, int], Row]]:
    blank = ["", "   ", "\n\t", "\u3000", "\u200b", "\u00a0"]
    fence = "```python\nfor ship in fleet:\n    print(ship.name, ship."

    def leak(row: Row, n: int) -> Row:
        asked, said = held[n % len(held)]
        whole = [(asked, row[1]), (row[0], f"{row[1]} {said}"), (f"Q: {asked.upper()}", row[1])]
        return whole[n % 3]

    def cut_off(row: Row, n: int) -> Row:
        return row[0], [row[1][: -6 - n % 5], fence][n % 2]

    def repeated(row: Row, n: int) -> Row:
        line = w.sentence("en")
        return row[0], [f"{line}\n" * 12, "again and " * 40, f"{row[1]}\n" * 6][n % 3]

    return {
        "empty": lambda row, n: (row[0], blank[n % 6]) if n % 4 else (blank[n % 6], row[1]),
        "same": lambda row, n: (row[0], [row[0], f" {row[0]}\n", row[0].upper()][n % 3]),
        "leak": leak,
        "garbled": lambda row, n: mojibake(w, row),
        "repeated_lines": repeated,
        "symbols": lambda row, n: (row[0], w.letters(120, "#$%^&*~|<>/\\=+{}[]-_ ")),
        "refusal": lambda row, n: (row[0], REFUSALS[n % len(REFUSALS)]),
        "cut_off": cut_off,
        "short": lambda row, n: (row[0], ["No.", "是", "42", "Oui"][n % 4]),
        "long": lambda row, n: (row[0], " ".join(w.sentence("en") for _ in range(90))),
    }


def _again(w: Writer) -> dict[str, Callable[[Row], Row]]:
    def near(row: Row) -> Row:
        index = w.any.randrange(len(row[1]) // 3, len(row[1]) // 2)
        return row[0], f"{row[1][:index]}{w.any.choice('xyz')}{row[1][index + 1 :]}"

    return {
        "exact_duplicate": lambda row: row,
        "near_duplicate": near,
        "inconsistent": lambda row: (row[0], w.row("en")[1]),
    }


def broken_lines(w: Writer, count: int) -> list[bytes]:
    lines: list[bytes] = []
    for n in range(count):
        question, said = w.row()
        good = {"messages": [{"role": "user", "content": question}]}
        good["messages"].append({"role": "assistant", "content": said})
        text = json.dumps(good, ensure_ascii=False)
        text = [text[:-3], text.replace(":", ";", 1), '["a", "b"]', "{}", text, text][n % 6]
        data = text.encode()
        data = data.replace(b"role", b"r\xff\xfele", 1) if n % 6 == 4 else data
        lines.append(data if n % 6 != 5 else json.dumps({"messages": "none"}).encode())
    return lines


def write(folder: Path, rows: list[tuple[Row, str]], w: Writer) -> dict[str, str]:
    """Write four files; return the planted kind by the location of the row."""
    truth: dict[str, str] = {}
    quarter = -(-len(rows) // 4)
    parts = [rows[i * quarter : (i + 1) * quarter] for i in range(4)]
    path = folder / "a.jsonl.gz"
    bad = broken_lines(w, quarter // 20)
    with gzip.open(path, "wb") as file:
        for number, ((q, a), kind) in enumerate(parts[0], start=1):
            value = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            file.write(
                json.dumps({"messages": value}, ensure_ascii=number % 2 == 0).encode() + b"\n"
            )
            truth[f"{path}:{number}"] = kind
        for number, line in enumerate(bad, start=len(parts[0]) + 1):
            file.write(line + b"\n")
            truth[f"{path}:{number}"] = BROKEN
    path = folder / "b.json"
    talks = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for (q, a), _ in parts[1]
    ]
    path.write_text(json.dumps(talks, ensure_ascii=False), encoding="utf-8")
    truth |= {f"{path}#{n}": kind for n, (_, kind) in enumerate(parts[1], start=1)}
    path = folder / "c.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["instruction", "input", "output"])
        line = 2
        for (q, a), kind in parts[2]:
            out.writerow([q, "", a])
            truth[f"{path}:{line}"] = kind
            line += 1 + q.count("\n") + a.count("\n")
    path = folder / "d.parquet"
    columns = {"prompt": [r[0] for r, _ in parts[3]], "completion": [r[1] for r, _ in parts[3]]}
    pq.write_table(pa.table(columns), path)
    return truth | {f"{path}#{n}": kind for n, (_, kind) in enumerate(parts[3], start=1)}


def measure(rows: int, seed: int, folder: Path) -> Iterator[tuple[str, float, float, list[str]]]:
    """Yield kind, precision, recall, and some locations of false negatives and positives."""
    lines, held = planted(rows, seed)
    truth = write(folder, lines, Writer(seed + 1))
    names = {"e_mail": "email"}
    sources = []
    for path in sorted(folder.iterdir()):
        files = find_source_files(Source(path=str(path)), folder / ".cache")
        sources.append(SourceRows(path.name, files, "auto"))
    index = index_held_out((f"held-out:{n}", text) for n, text in enumerate(held))
    result = scan(sources, held_out=index)
    flagged: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for item in source.rows():
            if isinstance(item, BadRecord):
                flagged[BROKEN].add(source.location(item))
    for row in range(result.rows):
        for kind, bit in FLAG_BITS.items():
            if result.flags[row] & bit:
                flagged[kind].add(result.location(row))
    for kind in sorted({k for k in truth.values() if k}):
        planted_at = {location for location, planted_kind in truth.items() if planted_kind == kind}
        flagged_rows = flagged[names.get(kind, kind)]
        correct = len(planted_at & flagged_rows)
        yield (
            kind,
            correct / max(len(flagged_rows), 1),
            correct / len(planted_at),
            [
                *(f"missed {p}" for p in sorted(planted_at - flagged_rows)[:4]),
                *(
                    f"wrong {p} ({truth.get(p) or 'nothing'})"
                    for p in sorted(flagged_rows - planted_at)[:4]
                ),
            ],
        )


def main(rows: int, seed: int, **_: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        for kind, precision, recall, wrong in measure(rows, seed, Path(name)):
            label = "exact" if kind in EXACT else ""
            print(f"{kind:16} precision {precision:.3f}  recall {recall:.3f}  {label}")
            if "-v" in sys.argv:
                print(*(f"    {w}" for w in wrong), sep="\n")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    main(*(arguments + [2000, 7][len(arguments) :]))
