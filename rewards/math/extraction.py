r"""The final answer that a completion states, as text.

`\boxed{x}`, `#### x`, `<answer>x</answer>`, "the answer is x". Every search is linear in the length of
the text, whatever the text is.
"""

import re

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# \boxed without braces holds what follows up to a space or the end of the formula: \boxed 5.
_UNBRACED = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$\\]+)(?=[\s$\\]|$)")
# What may stand between two boxes of one answer: "$\boxed{2}$ and $y = \boxed{3}$".
_BETWEEN = re.compile(
    r"(?:\\[()\[\] ,;]|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)?\s*\}|[\s$,;&]|\band\b|\bor\b"
    r"|[A-Za-z](?:_[0-9])?\s*=)*"
)
_HASHES = re.compile(r"####([^\n]*)")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"\banswer\b\*{0,3}(?:[ \t]to[ \t][^.:\n]{1,80}?)?[ \t]{0,3}(?:\bis\b|[:=])"
    r"|^[ \t#*]{0,8}(?:final[ \t])?answer[ \t:*]{0,8}$"
    r"|答案(?:是|为|：|:)"
    r"|^[ \t]{0,8}\*{0,3}A:",
    re.IGNORECASE | re.MULTILINE,
)
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_LAST_NUMBER = re.compile(rf"(?:(?<![\w.)])-\s?)?[$€£]?(?<![\w.]){NUMBER}(?:\s?\\?%)?(?![\w])")
# A number that the sentence goes on after: "18 dollars a day." but not "18 and 20" or "18 x 20".
_LEADING_NUMBER = re.compile(
    rf"([-+]?\s?[$€£]?{NUMBER}(?:\s?\\?%)?)"
    r"(?=\**(?:[.!?;)*]*$|[.!?;,]\s*$|[.!?;,]?\s+\(?(?!(?:and|or|to|by)\b)(?:a\b|[A-Za-z]{2,})))"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_DELIMITERS = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
_CURRENCY = re.compile(rf"\${NUMBER}(?:\s+[A-Za-z]|[.,;]?\s*$|[.,;]\s)")


def final_answer(text: str, *, last_number: bool = False) -> str | None:
    r"""The answer that `text` ends on, or None.

    The first of these kinds that occurs decides, and of one kind the last occurrence:
    1. `\boxed{x}` (or `\fbox{x}`), with nested braces; one that is never closed does not count;
       different boxes with nothing but "and", "or", commas and spaces between them are one list;
    2. `#### x` to the end of the line; where x begins with a word it is a heading, and counts only
       on the last line;
    3. `<answer>x</answer>`;
    4. "the answer is x", "answer: x", or a line "A: x"; x ends with the sentence;
    5. with `last_number`: the last number of the text.
    What stands before the last `</think>` is reasoning and is not searched.

    >>> final_answer(r"so \boxed{\frac{1}{2}} or rather \boxed{3}.")
    '3'
    >>> final_answer("5 + 5 = 10\n#### 10")
    '10'
    """
    text = text.rpartition("</think>")[2]
    boxed = _in_last_boxes(text)
    if boxed is not None:
        return boxed
    for find in (_after_hashes, _in_answer_tag, _after_answer_is):
        found = find(text)
        if found is not None:
            return found
    return _last_number(text) if last_number else None


def boxed_contents(text: str) -> list[str]:
    r"""The contents of every closed `\boxed{}`, in the order in which they open.

    >>> boxed_contents(r"\boxed{\frac{1}{2}} \boxed{\{1, 2\}} \boxed{")
    ['\\frac{1}{2}', '\\{1, 2\\}']
    """
    return [text[start:end] for start, end in _box_spans(text)]


def _box_spans(text: str) -> list[tuple[int, int]]:
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    # A negative start marks an ordinary brace.
    open_braces: list[int] = []
    spans: list[tuple[int, int]] = []
    for token in _BRACES.finditer(text):
        word = token.group()
        if word == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                spans.append((start, token.start()))
        elif word == "{":
            open_braces.append(-1)
        elif word.endswith("{") and len(word) > 2:
            open_braces.append(token.end())
    return _innermost(spans)


def _in_last_boxes(text: str) -> str | None:
    """The last box; with those before it when nothing but separators stands between."""
    spans = _box_spans(text)
    if not spans:
        unbraced = _UNBRACED.findall(text)
        return unbraced[-1].rstrip(".,;") if unbraced else None
    contents = [text[spans[-1][0] : spans[-1][1]].strip()]
    for (_, end), (start, _) in zip(spans[-2::-1], spans[:0:-1], strict=True):
        opening = max(text.rfind("\\boxed", end, start), text.rfind("\\fbox", end, start))
        if _BETWEEN.fullmatch(text, end + 1, opening) is None:
            break
        contents.append(text[slice(*spans[len(spans) - len(contents) - 1])].strip())
    different = list(dict.fromkeys(reversed(contents)))
    return ", ".join(different)


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without another inside, so that the total length stays below that of the text."""
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        while kept and kept[-1][1] > start:
            kept.pop()
        kept.append((start, end))
    return kept


def _after_hashes(text: str) -> str | None:
    last_line = len(text.rstrip()) - len(text.rstrip().rpartition("\n")[2])
    found = None
    for match in _HASHES.finditer(text):
        rest = match[1].strip(" \t\r#*")
        is_heading = re.match(r"[A-Za-z]{2,}", rest) is not None
        if rest and (not is_heading or match.start() >= last_line):
            found = rest
    if found is None:
        return None
    return _stated(found) if _ANSWER_IS.match(found) is None else _after_answer_is(found)


def _in_answer_tag(text: str) -> str | None:
    found, start = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = text[start : tag.start()].strip(), None
    if found is None:
        return None
    inside = _after_answer_is(found)
    return found if inside is None else inside


def _after_answer_is(text: str) -> str | None:
    end = None
    for match in _ANSWER_IS.finditer(text):
        # re.IGNORECASE is for the word: a line "a:" is a list item.
        if not match.group().strip(" \t*").startswith("a:"):
            end = match.end()
    return None if end is None else _stated(text[end:].lstrip(" \t\r\n:*"))


def _stated(rest: str) -> str:
    """The formula, number or phrase at the beginning of `rest`."""
    for opening, closing in _DELIMITERS:
        if rest.startswith(opening) and not (opening == "$" and _CURRENCY.match(rest)):
            end = rest.find(closing, len(opening))
            if end >= 0:
                return rest[len(opening) : end].strip()
    line = rest.partition("\n")[0].strip()
    number = _LEADING_NUMBER.match(line)
    if number is not None:
        return number[1].strip()
    sentence_end = _SENTENCE_END.search(line)
    return (line[: sentence_end.start()] if sentence_end else line).strip(" \t*_")


def _last_number(text: str) -> str | None:
    found = None
    for match in _LAST_NUMBER.finditer(text):
        found = match.group()
    return found
