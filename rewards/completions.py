"""A completion as TRL hands it over (a string or a list of chat messages) -> its text."""

from typing import Any

from rewards.errors import RewardError


def completion_text(completion: Any) -> str:
    """The text of a completion: a string as it is, of chat messages the last one of the assistant.

    A message's content may be a string, None (a bare tool call), or a list of typed parts, of which
    the text parts are joined. Without an assistant message the text is empty.
    Raises RewardError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple):
        raise RewardError(
            f"a completion must be text or a list of chat messages, got {type(completion).__name__}"
        )
    for message in reversed(completion):
        if not isinstance(message, dict) or "content" not in message:
            raise RewardError(
                f"a chat message must be a dict with `role` and `content`, got {message!r:.80}"
            )
        if message.get("role", "assistant") == "assistant":
            return _content_text(message["content"])
    return ""


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(
            str(part.get("text") or "")
            for part in content
            if isinstance(part, dict) and part.get("type", "text") == "text"
        )
    raise RewardError(
        f"a message's content must be text or a list of parts, got {type(content).__name__}"
    )
