"""Train the byte-level BPE tokenizer of the arithmetic policy and write it, with its chat template, to `tokenizer/`.

    python data/arithmetic/tokenizer.py [FOLDER]

Every digit is a token of its own, so that `38` is always `3`, `8`; whatever lies between two digits may become one
token (` + `, `What is `), so that sequences are short. All 256 bytes are in the vocabulary: any text survives the
round trip. The same problems give the same bytes each time.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from problems import rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCABULARY = 384
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
TRAINING_ROWS = 5000

# A conversation is <|bos|>, then <|role|>content for each message; an assistant's content ends in <|eos|>. Each
# message is rendered from itself alone, so that a conversation's tokens are a prefix of its continuation's, and a
# prompt that ends in <|assistant|> is a prefix of the prompt with its completion.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("role must be system, user or assistant, got " ~ message.role) -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
        {{- message.content ~ eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


def train() -> PreTrainedTokenizerFast:
    """Train on prompts and completions of the `sft` split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [
        str(row[column])
        for row in rows("sft", TRAINING_ROWS, seed=0)
        for column in ("prompt", "completion")
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def write(folder: Path) -> None:
    """Train, and put each file whole into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        train().save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, folder / file.name)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tokenizer")
