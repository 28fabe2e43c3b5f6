"""Precision and recall of a scan on rows with planted problems, in English and Chinese.

`python tests/bench/data_planted.py [ROWS]` prints precision and recall for each kind.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from stdnum import luhn
from stdnum.cn import ric

from dtrain.config.data import Source
from dtrain.data.records import SourceRows
from dtrain.data.sources import find_source_files
from dtrain.data.text_checks import RowText
from dtrain.data_quality.decontamination import index_held_out
from dtrain.data_quality.scan import scan

EACH = 40  # rows per kind of problem, half of them Chinese
ENGLISH = sorted(set(re.findall(r"\b[a-z]{3,9}\b", " ".join(topics.values()))))
_WORDS = """
我们 今天 学习 怎样 使用 电脑 程序 数据 语言 模型 医生 病人 医院 治疗
药物 法律 合同 公司 市场 价格 银行 投资 风险 管理 学校 老师 学生 考试
问题 答案 历史 文化 音乐 电影 城市 交通 汽车 火车 飞机 天气 春天 夏天
秋天 冬天 山水 森林 河流 海洋 动物 植物 粮食 水果 蔬菜 厨房 健康 运动
比赛 冠军 朋友 家庭 父母 孩子 社会 经济 政策 科学 技术 研究 发现 实验
结果 分析 方法 重要 简单 复杂 快速 安全 环境 保护 能源 太阳 月亮 星空
时间 空间 理论 实践 经验 知识 智慧 创造 设计 建筑 桥梁 道路 农村 发展
改革 开放
"""
CHINESE = _WORDS.split()


class Writer:
    """Random sentences of real words."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def sentence(self, chinese: bool, words: int) -> str:
        chosen = self.random.choices(CHINESE if chinese else ENGLISH, k=words)
        return "".join(chosen) + "。" if chinese else " ".join(chosen).capitalize() + "."

    def row(self, chinese: bool) -> dict[str, str]:
        blank = "" if chinese else " "
        answer = blank.join(self.sentence(chinese, self.random.randint(9, 15)) for _ in range(4))
        ask = "请解释：" if chinese else self.random.choice(("Explain ", "Describe ", "Compare "))
        return {"instruction": ask + self.sentence(chinese, 8), "output": answer}


def planted(rows: int, seed: int = 0) -> tuple[list[str], dict[str, set[int]], list[RowText]]:
    """Lines of JSON, the line numbers (from 1) of each kind of problem, and held-out rows."""
    write = Writer(seed)
    lines = [write.row(chinese=n % 2 == 1) for n in range(rows)]
    held = [write.row(chinese=n % 2 == 1) for n in range(EACH)]
    positions = write.random.sample(range(rows // 2, rows), rows - rows // 2)
    free = [iter([at for at in positions if at % 2 == parity]) for parity in (0, 1)]
    truth: dict[str, set[int]] = {}
    for kind, corrupt in PROBLEMS.items():
        for n in range(EACH):
            at = next(free[n % 2])
            lines[at] = corrupt(lines[at], n, write, lines, held)
            truth.setdefault(kind, set()).add(at + 1)
    for n in range(EACH):  # look-alikes of identity numbers, cards and addresses
        at = next(free[n % 2])
        lines[at] = _insert(lines[at], HARMLESS[n % len(HARMLESS)])
    texts = [json.dumps(line, ensure_ascii=False) for line in lines]
    for n in range(EACH):
        at = next(free[n % 2])
        texts[at] = (texts[at][:-9], texts[at].replace('"output"', '"out"'))[n // 2 % 2]
        truth.setdefault("broken", set()).add(at + 1)
    return texts, truth, [RowText(row["instruction"], row["output"]) for row in held]


Row = dict[str, str]
Corrupt = Callable[[Row, int, Writer, list[Row], list[Row]], Row]
HARMLESS = ("41111111111111112", "110105194912310021", "10.0.0.17", "1.2.3", "192.168.0.1:8080")
HARMLESS += ("user@localhost", "2024-01-02 03:04:05", "ISBN 978-3-16-148410-0", "3.14159265358979")


def _insert(row: Row, text: str) -> Row:
    """Insert a text in the middle of the answer."""
    answer = row["output"]
    stop = "。" if "。" in answer else ". "
    head, tail = answer.split(stop, 1)
    return {**row, "output": f"{head}{stop}{text} {tail}"}


def _near(row: Row, n: int, write: Writer, lines: list[Row], held: list[Row]) -> Row:
    copy = dict(_early(n, write, lines))
    chinese = n % 2 == 1
    words = re.findall(r"..", copy["output"]) if chinese else copy["output"].split(" ")
    words[len(words) // 2] = write.sentence(chinese, 1)[:-1].lower()
    return {**copy, "output": ("" if chinese else " ").join(words) + ("好。" if chinese else "!")}


def _early(n: int, write: Writer, lines: list[Row]) -> Row:
    """An unmodified row before the corrupted ones, in the same language."""
    return lines[write.random.randrange(len(lines) // 4) * 2 + n % 2]


def _id_number(n: int, write: Writer) -> str:
    if n % 4 == 0:
        return f"{write.random.randint(101, 600)}-{write.random.randint(10, 99)}-4321"
    body = f"110105{write.random.randint(1960, 2005)}1231{write.random.randint(100, 999)}"
    return body + ric.calc_check_digit(body + "0")


def _card(n: int, write: Writer) -> str:
    body = f"4539{write.random.randint(10**10, 10**11 - 1)}"
    number = body + luhn.calc_check_digit(body)
    return number if n % 2 else " ".join(re.findall("....", number))


def _phone(n: int, write: Writer) -> str:
    if n % 2:
        return f"138{write.random.randint(10**7, 10**8 - 1)}"
    return f"(650) 253-{write.random.randint(1000, 9999)}"


def _secret(n: int, write: Writer) -> str:
    body = "".join(write.random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ234567", k=40))
    return (f"AKIA{body[:16]}", f"sk-{body}", f"ghp_{body[:36]}", f"hf_{body[:34]}")[n // 2 % 4]


def _mojibake(row: Row, n: int) -> Row:
    answer = row["output"] if n % 2 else _insert(row, "It’s “naïve”, don’t")["output"]
    return {
        **row,
        "output": answer.encode().decode("cp1252" if n % 2 == 0 else "latin-1", "replace"),
    }


def _cut(row: Row, n: int) -> Row:
    return {**row, "output": row["output"].rstrip("。.")[:-1]}


REFUSED = ("I'm sorry, but I can't help with that.", "很抱歉，我无法回答这个问题。")
REFUSED += (
    "As an AI language model, I do not have opinions.",
    "作为一个人工智能，我不能提供建议。",
)
PROBLEMS: dict[str, Corrupt] = {
    "exact_duplicate": lambda row, n, write, lines, held: dict(_early(n, write, lines)),
    "near_duplicate": _near,
    "inconsistent": lambda row, n, write, lines, held: {
        **row,
        "instruction": _early(n, write, lines)["instruction"],
    },
    "leak": lambda row, n, write, lines, held: {
        "instruction": row["instruction"] + held[n]["instruction"],
        "output": held[n]["output"] + row["output"][:60] + "。.",
    },
    "email": lambda row, n, write, *_: _insert(row, f"mei.lin{n}@mail{n}.com.cn"),
    "phone": lambda row, n, write, *_: _insert(row, _phone(n, write)),
    "id_number": lambda row, n, write, *_: _insert(row, _id_number(n, write)),
    "bank_card": lambda row, n, write, *_: _insert(row, _card(n, write)),
    "ip_address": lambda row, n, write, *_: _insert(row, f"114.114.{n}.{n + 99}"),
    "secret": lambda row, n, write, *_: _insert(row, _secret(n, write)),
    "empty": lambda row, n, *_: {**row, ("output", "instruction")[n % 3 == 0]: " \n"},
    "short": lambda row, n, *_: {**row, "output": ("Yes.", "是的")[n % 2]},
    "long": lambda row, n, write, *_: {
        **row,
        "output": "".join(write.row(n % 2 == 1)["output"] for _ in range(45)),
    },
    "same": lambda row, n, *_: {**row, "output": row["instruction"].upper() + "!"},
    "garbled": lambda row, n, *_: _mojibake(row, n),
    "repeated_lines": lambda row, n, *_: {
        **row,
        "output": "\n".join([row["output"][:30] + "."] * 6),
    },
    "symbols": lambda row, n, write, *_: {
        **row,
        "output": "".join(write.random.choices("{}<>/|~=+$%^&*()[]#@ ", k=200)),
    },
    "refusal": lambda row, n, *_: {**row, "output": REFUSED[n % 4]},
    "cut_off": lambda row, n, *_: _cut(row, n),
}


def measure(rows: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Precision and recall by kind of problem."""
    texts, truth, held = planted(rows)
    path = folder / "planted.jsonl"
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    index = index_held_out((f"held-out:{n}", text) for n, text in enumerate(held))
    files = find_source_files(Source(path=str(path)), folder / "cache")
    result = scan([SourceRows("planted", files, "alpaca")], held_out=index)

    def line_number(row: int) -> int:
        return result.locations[row][2]

    scores = {}
    for kind, lines in truth.items():
        if kind == "broken":
            removed = set(range(1, rows + 1)) - {line_number(row) for row in range(result.rows)}
        else:
            flagged = np.flatnonzero(result.has_finding(kind)).tolist()
            removed = {line_number(row) for row in flagged}
        scores[kind] = (
            len(removed & lines) / max(len(removed), 1),
            len(removed & lines) / len(lines),
        )
        if "-v" in sys.argv:
            for line in sorted(removed - lines)[:3]:
                wrong = next((k for k, v in truth.items() if line in v), "none")
                print("not", kind, "but", wrong, texts[line - 1][:300])
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        scores = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 6000, Path(name))
    for kind, (precision, recall) in scores.items():
        print(f"{kind:16} precision {precision:.3f}  recall {recall:.3f}")
