"""Check that the base has enough positions for the documents and questions of a run."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.log import warn
from dtrain.data.conversations import Conversation
from dtrain.data.packed_dataset import PackedDataset
from dtrain.models.positions import position_limit
from dtrain.pipeline.evaluator import read_questions
from dtrain.planning.known_models import trained_positions
from dtrain.serving.generator import answering_template
from dtrain.serving.run_models import template_of

# Recipe key, description, tokens, and the fix if there are too many.
Length = tuple[str, str, int, str]


def check_positions(
    recipe: Recipe,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    datasets: dict[str, PackedDataset],
) -> None:
    """Check that the base has a position for every token that is trained, evaluated or asked.

    In a packed sequence, each document counts by itself.

    Args:
        datasets: prepared data, by the key of the recipe.

    Raises:
        UserError: the number of positions is fixed and too small.
    """
    lengths = [*_documents(datasets), *_questions(recipe, tokenizer)]
    longest = max(tokens for _, _, tokens, _ in lengths)
    limit = position_limit(config, longest, recipe.model.trust_remote_code)
    known = trained_positions(config.get_text_config(decoder=True).to_dict())
    for where, description, tokens, fix in lengths:
        if limit is not None and tokens > limit:
            message = f"{description}, but the model has {limit:,} positions"
            raise UserError(message, where=where, fix=fix.format(limit))
        if limit is None and known is not None and tokens > known:
            warn(
                f"{where}: {description}, but the model was trained for {known:,} positions "
                f"(max_position_embeddings), and its config scales no rope beyond them"
            )


def _documents(datasets: dict[str, PackedDataset]) -> Iterator[Length]:
    for key, dataset in datasets.items():
        longest = dataset.longest_segment
        description = (
            f"a document of {longest:,} tokens (sequence_length {dataset.sequence_length})"
        )
        yield key, description, longest, "sequence_length: {} or less"


def _questions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[Length]:
    """The longest question, with its answer."""
    questions = recipe.evaluation.questions
    if questions is None:
        return
    template = answering_template(template_of(recipe), tokenizer)
    rows = read_questions(local_path(questions.path), questions.count)
    texts = [
        template.render(Conversation([{"role": "user", "content": row["question"]}]), prompt=True)
        for row in rows
    ]
    prompt = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    answer = f"an answer of max_new_tokens {questions.max_new_tokens}"
    description = f"a question of {prompt:,} tokens and {answer}"
    tokens = prompt + questions.max_new_tokens
    yield "evaluation.questions", description, tokens, "shorter questions, or fewer max_new_tokens"
