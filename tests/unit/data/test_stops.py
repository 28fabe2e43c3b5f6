"""What closes a turn: a token of its own, or a string of ordinary ones."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dtrain.data.chat_templates import Template, resolve_template
from dtrain.data.end_of_turn import Stop, stop_of
from dtrain.models.tokenizer import load_tokenizer
from dtrain.samples.make import ensure

ROWS = "{%- for m in messages -%}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """With blanks as tokens of their own, as GPT-NeoX's has them."""
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    tokenizer.add_tokens([AddedToken("\n\n", special=False), AddedToken("[/A]", special=False)])
    return tokenizer


def template(closing: str, behind: str = "\\n") -> Template:
    text = f"{ROWS}{{{{ m.role + ': ' + m.content + '{closing}{behind}' }}}}{{% endfor %}}"
    return Template(text, ())


@pytest.mark.parametrize(
    ("closing", "token"),
    [
        ("<|im_end|>", "<|im_end|>"),
        ("[/A]", "[/A]"),  # added, if not special
        ("<|im_end|> over", "<|im_end|>"),  # begins with it
        ("\\n\\nover <|im_end|>", "<|im_end|>"),  # ends with it, and blanks are in answers too
    ],
)
def test_a_token_of_its_own(closing: str, token: str, tokenizer: PreTrainedTokenizerBase) -> None:
    found = stop_of(template(closing), tokenizer)
    assert found == Stop(token=tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize(("closing", "text"), [("###", "###"), ("\\n\\nover", "\n\nover")])
def test_ordinary_tokens(closing: str, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert stop_of(template(closing), tokenizer) == Stop(text=text)


def test_none(tokenizer: PreTrainedTokenizerBase) -> None:
    assert stop_of(template(""), tokenizer) == Stop()
    refusing = Template("{{ raise_exception('no') }}", ())
    assert stop_of(refusing, tokenizer) == Stop()
    endless = f"{ROWS}{{%- for i in range(99999999) -%}}a{{% endfor %}}{{% endfor %}}"
    assert stop_of(Template(endless, ()), tokenizer) == Stop()


def test_the_instruction_form_ends_with_the_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    found = stop_of(resolve_template("instruction", tokenizer), tokenizer)
    assert found == Stop(token=tokenizer.eos_token_id)
