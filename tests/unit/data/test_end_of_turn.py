"""The end of a turn is a special token or a string of ordinary tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dtrain.data.chat_templates import ChatTemplate, resolve_template
from dtrain.data.end_of_turn import StopCriterion, find_stop_criterion
from dtrain.models.tokenizer import load_tokenizer
from dtrain.samples.make import ensure

ROWS = "{%- for m in messages -%}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer with tokens for runs of spaces, like GPT-NeoX's."""
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    tokenizer.add_tokens([AddedToken("\n\n", special=False), AddedToken("[/A]", special=False)])
    return tokenizer


def template(closing: str, behind: str = "\\n") -> ChatTemplate:
    text = f"{ROWS}{{{{ m.role + ': ' + m.content + '{closing}{behind}' }}}}{{% endfor %}}"
    return ChatTemplate(text, ())


@pytest.mark.parametrize(
    ("closing", "token"),
    [
        ("<|im_end|>", "<|im_end|>"),
        ("[/A]", "[/A]"),  # added, if not special
        ("<|im_end|> over", "<|im_end|>"),  # begins with it
        ("\\n\\nover <|im_end|>", "<|im_end|>"),  # ends with it, and blanks are in answers too
    ],
)
def test_end_of_turn_is_a_special_token(
    closing: str, token: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = find_stop_criterion(template(closing), tokenizer)
    assert stop == StopCriterion(token=tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize(("closing", "text"), [("###", "###"), ("\\n\\nover", "\n\nover")])
def test_end_of_turn_is_a_string_of_ordinary_tokens(
    closing: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert find_stop_criterion(template(closing), tokenizer) == StopCriterion(text=text)


def test_template_without_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert find_stop_criterion(template(""), tokenizer) == StopCriterion()
    refusing = ChatTemplate("{{ raise_exception('no') }}", ())
    assert find_stop_criterion(refusing, tokenizer) == StopCriterion()
    endless = f"{ROWS}{{%- for i in range(99999999) -%}}a{{% endfor %}}{{% endfor %}}"
    assert find_stop_criterion(ChatTemplate(endless, ()), tokenizer) == StopCriterion()


def test_instruction_template_ends_with_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stop = find_stop_criterion(resolve_template("instruction", tokenizer), tokenizer)
    assert stop == StopCriterion(token=tokenizer.eos_token_id)
