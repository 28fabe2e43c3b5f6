"""A conversation at the terminal, or from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from transformers import TextStreamer

from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError
from dtrain.core.output import wrapped
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.data.conversations import Messages
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel, served_adapter

HELP = "/adapter NAME switches, /adapter lists, /reset forgets the conversation, /quit ends"


class Chat:
    """One conversation with a speaker that can be exchanged in the middle of it.

    Args:
        choices: what can answer, by name.
        name: what answers first.
    """

    def __init__(
        self,
        speaker: TextGenerator,
        choices: Mapping[str, ServedModel],
        name: str,
        max_new_tokens: int,
    ) -> None:
        self.speaker, self.choices, self.name = speaker, choices, name
        self.max_new_tokens = max_new_tokens
        self.messages: Messages = []

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line, until /quit or the end."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self.command(text[1:])
                else:
                    self.ask(text)
            except UserError as error:
                print(f"error: {error}", flush=True)
            except KeyboardInterrupt:
                print("\n(stopped)", flush=True)

    def command(self, text: str) -> None:
        """Do what a line that begins with a stroke says."""
        verb, _, name = text.partition(" ")
        if verb == "reset":
            self.messages = []
            print("(the conversation is forgotten)", flush=True)
        elif verb == "adapter" and name.strip():
            self.switch(name.strip())
        elif verb == "adapter":
            print(" ".join(f"[{n}]" if n == self.name else n for n in self.choices), flush=True)
        else:
            print(wrapped(HELP, sys.stdout), flush=True)

    def switch(self, name: str) -> None:
        """Let another one answer; the conversation stays."""
        self.speaker.switch(chosen(self.choices, name))
        self.name = name
        print(f"({name} answers now)", flush=True)

    def ask(self, text: str) -> None:
        """Print the answer while it is made; a conversation that was stopped stays as it was."""
        if not text:
            return
        turn = {"role": "user", "content": text}
        prompt = self.speaker.prompt([*self.messages, turn])
        streamer = TextStreamer(self.speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = self.speaker.answers([prompt], self.max_new_tokens, streamer)
        self.messages += [turn, {"role": "assistant", "content": answer}]


def chosen(choices: Mapping[str, ServedModel], name: str) -> ServedModel:
    """What a name stands for; the path of an adapter's folder is a name too.

    Raises:
        UserError: nothing is called so.
    """
    if name in choices:
        return choices[name]
    folder = user_path(name)
    if (folder / ADAPTER_CONFIG).is_file():
        first = next(iter(choices.values()))
        return served_adapter(folder, first.base, first.template)
    fix = f"one of {', '.join(choices)}, or an adapter's folder"
    raise UserError("there is no such adapter", where=name, fix=fix)


def typed() -> Iterator[str]:
    """Lines of the standard input, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(wrapped(HELP, sys.stdout))
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n" + wrapped(HELP, sys.stdout))
