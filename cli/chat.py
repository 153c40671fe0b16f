"""How a conversation becomes text: the tokenizer's own chat template, or a documented one where it has none.

The documented one is Alpaca's layout (github.com/tatsu-lab/stanford_alpaca, without its preamble, whose place a system
message takes), for any number of turns:

    {system}

    ### Instruction:
    {user}

    ### Response:
    {assistant}<eos>

White space around a message's text is dropped: a prompt then ends where a token ends, so that its tokens are the first
tokens of prompt and response. It adds no token to the vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .sources import DataError

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
    {%- if message.role == 'system' -%}
        {{ message.content | trim }}
    {%- elif message.role == 'user' -%}
        {{ '### Instruction:\\n' ~ (message.content | trim) }}
    {%- elif message.role == 'assistant' -%}
        {{ '### Response:\\n' }}
        {%- generation -%}{{ (message.content | trim) ~ eos_token }}{%- endgeneration -%}
    {%- else -%}
        {{ raise_exception('this template has the roles system, user and assistant, not ' ~ message.role) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n\\n### Response:\\n' }}{%- endif -%}
"""
# GPT-NeoX's tokenizer, which the published Mamba checkpoints share, has this token and does not name it as padding.
SPARE_PAD_TOKEN = "<|padding|>"


@dataclass(frozen=True)
class Preparation:
    """What `prepare_tokenizer` set, None where the tokenizer had its own; kept as `tokenizer.preparation`.

    pad_token: the token. chat_template: its name, "alpaca" (`CHAT_TEMPLATE`).
    """

    pad_token: str | None
    chat_template: str | None


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, form: str, loss_on: str = "response"
) -> PreTrainedTokenizerBase:
    """Gives `tokenizer` a pad token and a chat template where it has none, and returns it.

    The pad token is one that the vocabulary already has: "<|padding|>" if it is there, else the end of text, which
    stays in the loss (TRL masks padding by position). `form` is that of the `TrainingData`: plain text gets no chat
    template. Both are saved with the tokenizer.

    Raises DataError for a tokenizer that has no end-of-text token, and for one whose own chat template does not mark
    the responses where the loss is to be on those of whole conversations.
    """
    if tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end-of-text token, and a response "
            "without one never ends: set its `eos_token`"
        )
    pad_token = chat_template = None
    if tokenizer.pad_token is None:
        pad_token = SPARE_PAD_TOKEN if SPARE_PAD_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.pad_token = pad_token
        logger.info("the tokenizer has no pad token: padding with %s", pad_token)
    if tokenizer.chat_template is None and form != "text":
        chat_template = "alpaca"
        tokenizer.chat_template = CHAT_TEMPLATE
        logger.info("the tokenizer has no chat template: '### Instruction:' and '### Response:' are set as its own")
    if form in ("messages", "sharegpt") and loss_on == "response":
        _require_response_marks(tokenizer)
    tokenizer.preparation = Preparation(pad_token, chat_template)
    return tokenizer


def _require_response_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """SFTTrainer swaps in a marked version of the templates it knows; here only: does it know this one?"""
    if has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError as error:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path or 'the model'} does not mark the responses "
            "({% generation %}), so the loss cannot be on them alone, and TRL has no marked version of it. Use "
            "loss_on='all', add the marks to the template, or remove it to get the Alpaca layout."
        ) from error
