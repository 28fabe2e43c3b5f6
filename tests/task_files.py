"""Small tasks of lm-evaluation-harness, one for each kind of request, with rows of our own."""

from __future__ import annotations

import json
from pathlib import Path

COLORS, ANIMALS = ["red", "blue", "green", "white", "black"], ["fox", "owl", "cat", "dog"]
PLACES = ["in the garden", "by the river", "under the tree"]

HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
fewshot_split: train
metadata: {{version: 1.0}}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{sentence}} The {{animal}} is"
doc_to_choice: [red, blue, green, white, black]
doc_to_target: color
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{sentence}} {{sentence}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
ANSWER = """\
output_type: generate_until
doc_to_text: "{{sentence}} Which colour is the {{animal}}?"
doc_to_target: "The {{animal}} is {{color}}."
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""


def write_task(folder: Path, name: str, rest: str = CHOICE) -> Path:
    """Write the file of a task with thirteen rows; return the folder."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(13):
        color, animal = COLORS[3 * number % 5], ANIMALS[number % 4]
        sentence = f"The {color} {animal} sleeps {PLACES[number % 3]}."
        rows.append({"color": color, "animal": animal, "sentence": sentence})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = HEAD.format(name=name, rows=folder / "rows.jsonl")
    (folder / f"{name}.yaml").write_text(head + rest)
    return folder
