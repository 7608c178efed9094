"""The shipped tokenizer: lossless, digit by digit, prefix-preserving, and what its script makes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.data_utils import is_conversational

FOLDER = Path(__file__).parents[2] / "data" / "arithmetic"
SHIPPED = FOLDER / "tokenizer"
TOKENIZER = AutoTokenizer.from_pretrained(SHIPPED)

USER = {"role": "user", "content": "What is 7 + 12 - 3 * 5?"}
ASSISTANT = {"role": "assistant", "content": "7 + 12 = 19\n3 * 5 = 15\n19 - 15 = 4\n#### 4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def render(messages: list[dict[str, str]], **options: bool) -> list[int]:
    return TOKENIZER.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(text: str) -> None:
    """Surrogates alone are left out: they are no text."""
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=True)["input_ids"]) == text


@settings(deadline=None)
@given(st.text("0123456789 +-*=\n#", max_size=40))
def test_every_digit_is_one_token(text: str) -> None:
    tokens = [TOKENIZER.decode([token]) for token in TOKENIZER(text)["input_ids"]]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


def test_a_line_of_working_is_short() -> None:
    """Signs with their spaces are one token: sequence length is what training time hangs on."""
    tokens = [TOKENIZER.decode([t]) for t in TOKENIZER("7 + 12 = 19\n#### 19")["input_ids"]]
    assert tokens == ["7", " + ", "1", "2", " = ", "1", "9", "\n#### ", "1", "9"]


def test_template_spells_roles_and_ends_the_assistant() -> None:
    text = TOKENIZER.decode(render([SYSTEM, USER, ASSISTANT, USER], add_generation_prompt=True))
    assert text == (
        f"<|bos|><|system|>{SYSTEM['content']}<|user|>{USER['content']}"
        f"<|assistant|>{ASSISTANT['content']}<|eos|><|user|>{USER['content']}<|assistant|>"
    )


message = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@settings(deadline=None)
@given(st.lists(message, min_size=1, max_size=4), message)
def test_a_conversation_is_a_prefix_of_its_continuation(
    messages: list[dict[str, str]], another: dict[str, str]
) -> None:
    ids = render(messages)
    assert render([*messages, another])[: len(ids)] == ids
    prompt = render(messages, add_generation_prompt=True)
    answered = render([*messages, ASSISTANT])
    assert answered[: len(prompt)] == prompt
    assert TOKENIZER.decode(answered[len(prompt) :]) == ASSISTANT["content"] + "<|eos|>"


def test_assistant_mask_covers_content_and_end() -> None:
    out = TOKENIZER.apply_chat_template(
        [USER, ASSISTANT, USER], return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
    marked = [token for token, mask in pairs if mask]
    assert TOKENIZER.decode(marked) == ASSISTANT["content"] + "<|eos|>"


def test_unknown_role_is_refused() -> None:
    with pytest.raises(Exception, match="role must be system, user or assistant, got tool"):
        render([{"role": "tool", "content": "4"}])


def test_special_tokens_are_distinct_and_no_token_is_added_to_raw_text() -> None:
    ids = {TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}
    assert len(ids) == 3
    assert not ids & set(TOKENIZER("7 + 12")["input_ids"])


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", None])
def test_loads_the_same_beside_a_config(tmp_path: Path, model_type: str | None) -> None:
    """AutoTokenizer picks a class by config.json's model_type; ours must survive any."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED, folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": model_type} if model_type else {})
    )
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "What is 7 + 12?\n  ¿数? #### 19 "
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.chat_template == TOKENIZER.chat_template


def test_saving_and_loading_again_changes_nothing(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_vllm_loads_it() -> None:
    from vllm.tokenizers import get_tokenizer

    loaded = get_tokenizer(str(SHIPPED))
    ids = loaded.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == render([USER], add_generation_prompt=True)


def test_rows_become_what_trl_calls_conversational() -> None:
    assert is_conversational({"prompt": [USER], "completion": [ASSISTANT]})


def test_script_makes_the_shipped_bytes(tmp_path: Path) -> None:
    script = FOLDER / "tokenizer.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "made")], check=True, timeout=120)
    for file in sorted(SHIPPED.iterdir()):
        assert (tmp_path / "made" / file.name).read_bytes() == file.read_bytes(), file.name
