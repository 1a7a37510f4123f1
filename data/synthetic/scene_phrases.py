"""Instructions for object edits in templated English: operation, object and amount are always said.

`instruction(...)` words an edit; numbers come in digits or words. NOVEL holds wordings that training never uses.
"""

from random import Random

NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()  # noqa: SIM905 - a list of words reads as one
TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WAYS = {  # direction: (to), (further), (-ward)
    "left": ("to the left", "further left", "leftward"),
    "right": ("to the right", "further right", "rightward"),
    "up": ("up", "higher", "upward"),
    "down": ("down", "lower", "downward"),
}
TURNS = {45: "an eighth turn", 90: "a quarter turn", 180: "a half turn"}

PHRASES = {
    "translate": (
        "move {it} {n} pixels {to}",
        "shift {it} {to} by {n}",
        "push {it} {way} by {n} pixels",
        "slide {it} {n} px {to}",
        "place {it} {n} pixels {further}",
        "please move {it} {ward}, {n} pixels",
        "{it} should be {n} pixels {further}",
        "take {it} and put it {n} pixels {further}",
        "drag {it} {ward} by {n} pixels",
        "let {it} go {way} {n} pixels",
    ),
    "resize": (
        "make {it} {factor} times as large",
        "{scale} {it} to {percent} percent",
        "scale {it} by {factor}",
        "resize {it} to {percent} percent of its size",
        "{scale} {it} by a factor of {factor}",
        "{it} should be {change} percent {larger}",
        "make {it} {larger}: {factor} times its size",
        "please make {it} {change} percent {larger}",
        "draw {it} {larger}, at {percent} percent",
        "change the size of {it} to {factor} times",
    ),
    "rotate": (
        "rotate {it} {n} degrees {clockwise}",
        "turn {it} {clockwise} by {n} degrees",
        "spin {it} {n} degrees {clockwise}",
        "give {it} {turn} {clockwise}",
        "please rotate {it} {clockwise}, {n} degrees",
        "{it} should be turned {clockwise} by {n} degrees",
        "rotate {it} by {turn} {clockwise}",
        "take {it} and turn it {n} degrees {clockwise}",
        "swing {it} {clockwise} through {n} degrees",
    ),
}
NOVEL = {
    "translate": (
        "nudge {it} {n} pixels {to}",
        "{to}, by {n} pixels, is where {it} belongs",
        "relocate {it} {ward} by {n} pixels",
        "I want {it} {n} pixels {further}",
    ),
    "resize": (
        "rescale {it} with factor {factor}",
        "{it} ought to have {percent} percent of its size",
        "I want {it} {change} percent {larger}",
    ),
    "rotate": (
        "twist {it} {clockwise} by {n} degrees",
        "I want {it} {n} degrees further {clockwise}",
        "{clockwise} by {n} degrees is how {it} should turn",
    ),
}


def words(number: int) -> str:
    """A whole number from 0 to 999 in words: "one hundred and fifty"."""
    if not 0 <= number <= 999:
        raise ValueError(f"number={number} has no words here; give one from 0 to 999")
    if number < 20:
        return NUMBERS[number]
    if number < 100:
        return TENS[number // 10] + (f"-{NUMBERS[number % 10]}" if number % 10 else "")
    return f"{NUMBERS[number // 100]} hundred" + (f" and {words(number % 100)}" if number % 100 else "")


def instruction(operation: str, names: list[str], amounts: dict, random: Random, novel: bool = False) -> str:
    """One wording of an edit. names: what the object may be called; amounts: direction and distance, angle, or factor."""

    def number(value: int) -> str:
        return words(value) if random.random() < 0.5 else str(value)

    fields = {"it": f"the {random.choice(names)}"}
    if operation == "translate":
        to, further, ward = WAYS[amounts["direction"]]
        fields |= {"way": amounts["direction"], "to": to, "further": further, "ward": ward}
        fields["n"] = number(amounts["distance"])
    elif operation == "rotate":
        degrees = abs(amounts["angle"])
        fields["n"] = number(degrees)
        fields["turn"] = TURNS.get(degrees, f"a turn of {degrees} degrees")
        other = random.choice(("counterclockwise", "anticlockwise"))
        fields["clockwise"] = "clockwise" if amounts["angle"] > 0 else other
    else:
        factor = amounts["factor"]
        larger = factor > 1
        percent = round(100 * factor)
        fields |= {"factor": f"{factor:g}", "percent": number(percent), "change": number(abs(percent - 100))}
        fields["larger"] = random.choice(("larger", "bigger")) if larger else "smaller"
        fields["scale"] = random.choice(("enlarge", "grow") if larger else ("shrink", "reduce"))
    return random.choice((NOVEL if novel else PHRASES)[operation]).format(**fields)
