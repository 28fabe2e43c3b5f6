"""Examples that `--help` prints under each command."""

from __future__ import annotations

import inspect

import typer

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "dtrain run my.yaml stages.task.train.epochs=2",
        "dtrain run my.yaml --fresh",
        "dtrain run my.yaml stages.task.train.epochs=3 --allow-change train.epochs",
    ),
    "check": ("dtrain check my.yaml", "dtrain check 7b-lora model.base=/models/Qwen2.5-7B"),
    "plan": (
        "dtrain plan my.yaml --gpu a100-80g --nodes 2 --price 2.5",
        "dtrain plan 70b-qlora --gpus-per-node 4 --json",
        "dtrain plan my.yaml --exact",
    ),
    "init": (
        "dtrain init my.yaml --base Qwen/Qwen2.5-7B --data docs --data qa.jsonl --gpu a100-80g",
        "dtrain init",
    ),
    "import": ("dtrain import axolotl.yml my.yaml", "dtrain import trl.yaml --processes 8"),
    "schema": ("dtrain schema > recipe.schema.json",),
    "report": ("dtrain report runs/mine --price 2.5",),
    "compare": ("dtrain compare runs/a runs/b --html compare.html",),
    "sweep": (
        "dtrain sweep my.yaml --sample 'stages.task.train.learning_rate=log(1e-5,1e-3)'",
        "dtrain sweep my.yaml --grid stages.task.method.r=8,16 --trials 12 --prune median",
        "dtrain sweep sweep.yaml --dry-run --price 2.5",
    ),
    "watch": ("dtrain watch runs/a runs/b", "dtrain watch runs/a --once"),
    "checkpoints": ("dtrain checkpoints runs/mine --verify",),
    "merge": (
        "dtrain merge /models/Llama-3.1-8B runs/mine/task/adapter merged",
        "dtrain merge runs/mine/task/checkpoints/step-000200 merged",
    ),
    "verify": ("dtrain verify merged",),
    "diff": ("dtrain diff /models/Llama-3.1-8B merged --top 5",),
    "adapters": ("dtrain adapters runs/mine", "dtrain adapters runs --json"),
    "combine": ("dtrain combine runs/mine/domain/adapter runs/mine/task/adapter both --rank 32",),
    "push": (
        "dtrain push runs/mine alice/python-docs --private",
        "dtrain push runs/mine alice/python-docs-lora --stage task --adapter --dry-run",
    ),
    "export": ("dtrain export runs/mine python-docs.gguf",),
    "serve": ("dtrain serve runs/mine",),
    "chat": ("dtrain chat runs/mine --adapter domain",),
    "generate": ("dtrain generate runs/mine --in prompts.jsonl --out answers.jsonl",),
    "submit": (
        "dtrain submit my.yaml --nodes 2 --gpus 8 --time 24:00:00",
        "dtrain submit my.yaml --prepare --dry-run",
    ),
    "jobs": ("dtrain jobs",),
    "status": ("dtrain status runs/mine",),
    "logs": ("dtrain logs runs/mine -f",),
    "cancel": ("dtrain cancel runs/mine",),
    "preflight": ("dtrain preflight my.yaml",),
    "data extract": (
        "dtrain data extract docs/ rows/docs --from markdown",
        "dtrain data extract src/ rows/code --from code --held-out 0.2",
        "dtrain data extract tickets.json rows/chats --from chats --keep 'rating>=4' "
        "--role bot=skip",
    ),
    "data show": ("dtrain data show my.yaml --stage task -n 2", "dtrain data show rows.jsonl"),
    "data prepare": ("dtrain data prepare my.yaml", "dtrain data prepare my.yaml --shard 1/8"),
    "data scan": (
        "dtrain data scan my.yaml --html scan.html",
        "dtrain data scan rows.jsonl --against heldout.jsonl",
    ),
    "data clean": ("dtrain data clean my.yaml --stage task --out cleaned",),
    "data augment": (
        "dtrain data augment rows.jsonl --how rewrite --model qwen --out more "
        "--endpoint http://localhost:8000/v1 --max-requests 500",
    ),
    "recipes": ("dtrain recipes",),
    "recipes copy": ("dtrain recipes copy 7b-lora my.yaml",),
    "model fetch": (
        "dtrain model fetch meta-llama/Llama-3.1-70B",
        "dtrain model fetch my.yaml",
        "dtrain model fetch smollm2-135m",
    ),
}
"""Command lines, by the words of their command."""


def add_examples(app: typer.Typer, words: str = "") -> None:
    """Give every command that has examples an epilog with them."""
    for command in app.registered_commands:
        assert command.callback
        name = command.name or command.callback.__name__
        command.help = command.help or reflowed(inspect.getdoc(command.callback) or "")
        command.epilog = epilog(f"{words} {name}".strip())
    for group in app.registered_groups:
        assert group.typer_instance
        name = f"{words} {group.name}".strip()
        group.epilog = epilog(name)
        add_examples(group.typer_instance, name)


def reflowed(text: str) -> str:
    """Paragraphs without line breaks: typer would break at those and at the terminal's width."""
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))


def epilog(command: str) -> str | None:
    """The examples of a command, each in a paragraph of its own; None without any."""
    examples = EXAMPLES.get(command, ())
    title = "Examples:" if len(examples) > 1 else "Example:"
    return "\n\n".join([title, *examples]) if examples else None
