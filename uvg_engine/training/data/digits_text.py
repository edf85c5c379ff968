"""Words of the digits data set: prompts, detailed captions, and the parsers that read them back.

A prompt is a short sentence with varied wording, at most 16 tokens with punctuation and eos. A caption follows one
grammar, at most 28 tokens:

    a red seven starts at the top left, moves up and right fast, bouncing once, and ends at the top.

The parsers never raise: what is missing or contradicts itself comes back as None.
"""

from __future__ import annotations

import re

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "orange")
DIRECTIONS = ("still", "right", "left", "up", "down", "up-right", "up-left", "down-right", "down-left")
SPEEDS = ("slow", "fast")
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
MAX_PROMPT_TOKENS = 16
MAX_CAPTION_TOKENS = 28

_VERBS = (("moving", "moves"), ("sliding", "slides"), ("drifting", "drifts"), ("going", "goes"))
_ADVERBS = {"slow": ("slowly", "slow"), "fast": ("quickly", "fast")}
_ADJECTIVES = {"slow": ("slow",), "fast": ("fast", "quick")}
_BOUNCES = ("without bouncing", "bouncing once", "bouncing twice")

# {a}, {b}: a or an before the colour {c}, the digit word {n}. {ing}, {s}: verb. {d}: direction phrase.
# {sp}: "fast" or "quickly". {adj}: "fast" or "quick".
_MOVING_WITH_SPEED = (
    "{a} {c} {n} {ing} {d}, {sp}",
    "{a} {c} {n} {ing} {d} {sp}",
    "the {c} {n} {s} {d}, {sp}",
    "{a} {c} {n} {s} {d} {sp}",
    "{b} {n} in {c} {ing} {d}, {sp}",
    "the number {n} in {c}, {ing} {d} {sp}",
    "{a} {c} digit {n} {ing} {d}, {sp}",
    "a {adj} {c} {n} {ing} {d}",
    "show {a} {c} {n} that {s} {d} {sp}",
    "{c} {n}, {ing} {d}, {sp}",
    "a video of {a} {c} {n} {ing} {d} {sp}",
    "a handwritten {n} in {c}, {ing} {d} {sp}",
    "{a} {c} {n} {ing} {d} at {adj} speed",
)
_MOVING = (
    "{a} {c} {n} {ing} {d}",
    "the {c} {n} {s} {d}",
    "{b} {n} in {c} {ing} {d}",
    "the number {n} in {c}, {ing} {d}",
    "show {a} {c} {n} that {s} {d}",
    "{c} {n}, {ing} {d}",
    "a video of {a} {c} {n} {ing} {d}",
)
_STILL = (
    "{a} {c} {n}, {r}",
    "{a} {c} {n} {r}",
    "the {c} {n} is {r}",
    "{b} {n} in {c}, {r}",
    "the number {n} in {c}, {r}",
    "{a} {c} digit {n} {r}",
    "show {a} {c} {n} that is {r}",
    "{c} {n}, {r}",
    "a video of {a} {c} {n} {r}",
    "a handwritten {n} in {c}, {r}",
)
_REST = ("not moving", "standing still", "at rest", "still")
_CAPTION = "{a} {c} {n} {begins} at the {start}, {how}, {bounce}, and {ends} at the {end}."
_CAPTION_HOW = {"moving": ("moves {d} {sp}", "goes {d} {sp}"), "still": ("stands still", "does not move")}
_BEGINS = ("starts", "begins")
_ENDS = ("ends", "stops")
_SPEED_OMITTED = 0.15  # share of the prompts about a moving digit that leave the speed open


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _direction_phrases(direction: str) -> tuple[str, ...]:
    if "-" in direction:
        vertical, side = direction.split("-")
        return (f"{vertical} and {side}", f"{vertical} and to the {side}", f"diagonally {vertical} and {side}")
    if direction in ("left", "right"):
        return (direction, f"to the {direction}")
    return (direction, f"{direction}wards")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def make_prompt(attrs, rng) -> str:
    """A short sentence about `attrs` (digit, color, direction, speed); `rng.random()` chooses the wording.

    rng: anything with `random()` in [0, 1), as numpy's Generator. The speed is left out in 15 % of the moving ones.
    """
    number = DIGIT_WORDS[attrs.digit]
    words = {"a": _article(attrs.color), "b": _article(number), "c": attrs.color, "n": number}
    if attrs.direction == "still":
        return _pick(rng, _STILL).format(r=_pick(rng, _REST), **words)
    templates = _MOVING if rng.random() < _SPEED_OMITTED else _MOVING_WITH_SPEED
    template = _pick(rng, templates)
    words["ing"], words["s"] = _pick(rng, _VERBS)
    words["d"] = _pick(rng, _direction_phrases(attrs.direction))
    words["sp"] = _pick(rng, _ADVERBS[attrs.speed])
    words["adj"] = _pick(rng, _ADJECTIVES[attrs.speed])
    return template.format(**words)


def make_caption(attrs, rng) -> str:
    """The detailed caption of `attrs` (also start, bounces, end); `rng.random()` chooses among few synonyms."""
    if attrs.direction == "still":
        how = _pick(rng, _CAPTION_HOW["still"])
    else:
        how = _pick(rng, _CAPTION_HOW["moving"]).format(
            d=_direction_phrases(attrs.direction)[0], sp=_pick(rng, _ADVERBS[attrs.speed])
        )
    return _CAPTION.format(
        a=_article(attrs.color), c=attrs.color, n=DIGIT_WORDS[attrs.digit], how=how, begins=_pick(rng, _BEGINS),
        start=attrs.start, bounce=_BOUNCES[attrs.bounces], ends=_pick(rng, _ENDS), end=attrs.end,
    )  # fmt: skip


_TOKEN = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
_DIGIT_OF = {word: i for i, word in enumerate(DIGIT_WORDS)} | {str(i): i for i in range(10)}
_SPEED_OF = {"slow": "slow", "slowly": "slow", "fast": "fast", "quick": "fast", "quickly": "fast"}
_AXIS_OF = {"up": "up", "upwards": "up", "upward": "up", "down": "down", "downwards": "down", "downward": "down"}
_AXIS_OF |= {"left": "left", "leftwards": "left", "right": "right", "rightwards": "right"}
_STILL_PATTERN = re.compile(r"\bstill\b|\bnot (?:move|moving)\b|\bat rest\b|\bmotionless\b|\bstationary\b")
_PLACE = r"((?:top|bottom)(?: (?:left|right))?|left|right|centre|center|middle)"
_START_PATTERN = re.compile(rf"\b(?:starts|begins|starting|beginning) (?:at|in) (?:the )?{_PLACE}\b")
_END_PATTERN = re.compile(rf"\b(?:ends|stops|ending|stopping) (?:at|in) (?:the )?{_PLACE}\b")
_BOUNCE_PATTERN = re.compile(r"\b(without bouncing|bouncing once|bouncing twice)\b")


def tokens(text: str) -> list[str]:
    """Lower-case words and single punctuation marks of `text`, in order."""
    return _TOKEN.findall(text.lower())


def _only(values):
    """The one value that occurs, or None where there is none or two that differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _place(matches: list[str]) -> str | None:
    return _only("centre" if m in ("center", "middle") else m for m in matches)


def _direction(words: list[str], rest: str) -> str | None:
    axes = {_AXIS_OF[w] for w in words if w in _AXIS_OF}
    still = bool(_STILL_PATTERN.search(rest))
    if still or not axes:
        return "still" if still and not axes else None
    vertical, side = axes & {"up", "down"}, axes & {"left", "right"}
    if len(vertical) > 1 or len(side) > 1:
        return None
    return "-".join([*vertical, *side])


def parse_caption(text: str) -> dict:
    """Reads digit (int), color, direction, speed, start, end, bounces (int) from any text; what is not there is None.

    A still digit has speed None. Two values that contradict each other give None. Never raises on a string.
    """
    line = " ".join(tokens(str(text)))
    starts, ends = _START_PATTERN.findall(line), _END_PATTERN.findall(line)
    rest = _END_PATTERN.sub(" ", _START_PATTERN.sub(" ", line))
    words = rest.split()
    direction = _direction(words, rest)
    return {
        "digit": _only(_DIGIT_OF[w] for w in words if w in _DIGIT_OF),
        "color": _only(w for w in words if w in COLORS),
        "direction": direction,
        "speed": None if direction == "still" else _only(_SPEED_OF[w] for w in words if w in _SPEED_OF),
        "start": _place(starts),
        "end": _place(ends),
        "bounces": _only(_BOUNCES.index(b) for b in _BOUNCE_PATTERN.findall(rest)),
    }


def parse_prompt(text: str) -> dict:
    """Reads digit, color, direction and speed from any sentence; what is not there is None. Never raises."""
    found = parse_caption(text)
    return {key: found[key] for key in ("digit", "color", "direction", "speed")}


def vocabulary() -> list[str]:
    """Every word and punctuation mark that a prompt or a caption can hold, sorted."""
    texts = [*_MOVING_WITH_SPEED, *_MOVING, *_STILL, *_REST, _CAPTION, *_BOUNCES, *_BEGINS, *_ENDS, "a an"]
    texts += [*_CAPTION_HOW["moving"], *_CAPTION_HOW["still"], *DIGIT_WORDS, *COLORS, *PLACES]
    texts += [word for pair in _VERBS for word in pair]
    texts += [word for table in (_ADVERBS, _ADJECTIVES) for options in table.values() for word in options]
    texts += [phrase for direction in DIRECTIONS[1:] for phrase in _direction_phrases(direction)]
    return sorted({word for text in texts for word in tokens(re.sub(r"\{\w+\}", " ", text))})
