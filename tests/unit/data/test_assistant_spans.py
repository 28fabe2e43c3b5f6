"""Assistant spans: exactly the answers and their turn ends under every template."""

from __future__ import annotations

import pytest

from dtrain.core.errors import UserError
from dtrain.data.assistant_spans import render_answers
from dtrain.data.chat_templates import resolve_template, template_text
from dtrain.data.conversations import Conversation

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Qwen 3 does it: the last answer gets an empty thought, earlier ones do not.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral does it: no header for answers, and users and assistants must alternate.
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Six."},
]


@pytest.fixture
def answers(make_tokenizer):
    """answers(template, messages) → the texts of the spans."""

    def run(template, messages, **special):
        tokenizer = make_tokenizer(template, bos_token="<|begin_of_text|>", **special)
        text, spans = render_answers(
            resolve_template("auto", tokenizer), Conversation(messages), "f:1"
        )
        return [text[start:stop] for start, stop in spans]

    return run


def test_chatml_answers_are_targets(answers, tokenizer) -> None:
    assert answers(tokenizer.chat_template, TWO_TURNS) == ["Four.<|im_end|>", "Six.<|im_end|>"]


def test_llama3_stripped_answers_are_targets(answers) -> None:
    blank = [*TWO_TURNS[:-1], {"role": "assistant", "content": "\n Six. \n"}]
    assert answers(LLAMA3, blank) == ["Four.<|eot_id|>", "Six.<|eot_id|>"]


def test_template_that_renders_earlier_answers_differently(answers) -> None:
    spans = answers(THINKING, TWO_TURNS)
    assert spans[0] == "Four.<|im_end|>"
    assert spans[1].endswith("Six.<|im_end|>")


def test_template_without_headers(answers) -> None:
    assert answers(BRACKETS, TWO_TURNS[1:]) == [" Four.<|endoftext|>", " Six.<|endoftext|>"]


def test_generation_tags_are_used_if_present(answers) -> None:
    assert answers(MARKED, TWO_TURNS) == ["Four.<|im_end|>", "Six.<|im_end|>"]


def test_an_answer_that_opens_the_conversation(answers, tokenizer) -> None:
    messages = [{"role": "assistant", "content": "Hello!"}, *TWO_TURNS[1:3]]
    spans = answers(tokenizer.chat_template, messages)
    assert spans == ["Hello!<|im_end|>", "Four.<|im_end|>"]


def test_an_answer_that_repeats_the_question(answers, tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    assert answers(tokenizer.chat_template, messages) == ["a<|im_end|>"]


def test_an_empty_answer_still_ends_its_turn(answers, tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    assert answers(tokenizer.chat_template, messages) == ["<|im_end|>"]


def test_trailing_spaces_of_an_answer_stay_in_its_turn(answers, tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}]
    assert answers(tokenizer.chat_template, messages) == ["b\n<|im_end|>"]


def test_conversation_without_answers_has_no_spans(answers, tokenizer) -> None:
    assert answers(tokenizer.chat_template, TWO_TURNS[:2]) == []


def test_current_date_is_not_rendered(make_tokenizer) -> None:
    dated = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = resolve_template("auto", make_tokenizer(dated))
    assert template.render(Conversation([{"role": "user", "content": "x"}])) == "26 Jul 2024x"
    assert template.text == dated


def test_instruction_template_trains_responses_and_their_ends(make_tokenizer) -> None:
    template = resolve_template("instruction", make_tokenizer(None))
    row = [
        {"role": "user", "content": "Add.\n\n1 1", "instruction": "Add.", "input": "1 1"},
        {"role": "assistant", "content": "2"},
    ]
    text, spans = render_answers(template, Conversation(row), "f:1")
    assert text == ("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2<|endoftext|>")
    assert [text[a:b] for a, b in spans] == ["2<|endoftext|>"]
    assert template.render(Conversation(row[:1]), prompt=True) == text[: spans[0][0]]
    turns, spans = render_answers(template, Conversation(TWO_TURNS), "f:1")
    assert turns.startswith("Be brief.\n\n### Instruction:\nTwo and two?\n\n### Response:\nFour.")
    assert [turns[a:b] for a, b in spans] == ["Four.<|endoftext|>", "Six.<|endoftext|>"]


def test_a_tokenizer_without_template_names_the_fix(make_tokenizer) -> None:
    with pytest.raises(UserError, match="no chat template") as error:
        template_text("auto", make_tokenizer(None))
    assert "`template: instruction`" in error.value.fix


def test_template_file_is_read(make_tokenizer, tmp_path) -> None:
    (tmp_path / "own.jinja").write_text(LLAMA3)
    assert template_text(str(tmp_path / "own.jinja"), make_tokenizer(None)) == LLAMA3
    with pytest.raises(UserError, match="cannot be read"):
        template_text(str(tmp_path / "none.jinja"), make_tokenizer(None))
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError, match=r"bad\.jinja:2: not a jinja template"):
        resolve_template(str(tmp_path / "bad.jinja"), make_tokenizer(None))


def test_a_refused_conversation_names_its_row(answers) -> None:
    with pytest.raises(UserError, match=r"f:1: the chat template refuses .* must alternate"):
        answers(BRACKETS, TWO_TURNS)


def test_template_error_that_repeats_the_conversation_is_truncated(answers) -> None:
    with pytest.raises(UserError, match="refuses this conversation: xxx") as error:
        answers("{{ raise_exception('x' * 99999) }}", TWO_TURNS)
    assert len(str(error.value)) < 1000


def test_a_template_that_alters_answers_is_refused_with_the_row(answers) -> None:
    shouting = THINKING.replace("message.content +", "message.content | upper +")
    with pytest.raises(UserError, match="f:1: the chat template changes the answer in message 3"):
        answers(shouting, TWO_TURNS)
