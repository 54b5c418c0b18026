"""Domains of numbers: pairs, single numbers, amounts with units."""

from random import Random

from ltdi_peft.suite.design import Domain, Item, alone, drawn, phrases, question, words

_UNITS_BELOW_20 = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(number: int) -> str:
    """A number from 0 to 999 in English words."""
    if number < 20:
        return _UNITS_BELOW_20[number]
    if number < 100:
        rest = f"-{_UNITS_BELOW_20[number % 10]}" if number % 10 else ""
        return _TENS[number // 10] + rest
    rest = f" {in_words(number % 100)}" if number % 100 else ""
    return f"{_UNITS_BELOW_20[number // 100]} hundred{rest}"


def _pair(rng: Random) -> Item:
    a, b = rng.sample(range(10, 100), 2)
    order = "falling" if a > b else "rising"
    slots = {"first": str(a), "second": str(b), "larger": str(max(a, b)), "smaller": str(min(a, b))}
    return {"input": f"{a} and {b}", "order": order, **slots}


PAIRS = Domain(
    "pairs",
    drawn("pairs", 240, _pair),
    (
        question(
            "larger",
            "larger",
            """Give the larger of the two numbers.
               Which number is bigger?
               Pick the greater number.
               What is the maximum of the two numbers?
               Find the number that is more.
               Two numbers -> the bigger one.
               Could you tell me which of the two numbers is larger?
               I will show you two numbers; write down the higher one.
               Largest number, please.
               Compare the numbers and keep only the one that is ahead in size.""",
            """Select the higher value.
               Which of both values is the top one?""",
        ),
        question(
            "smaller",
            "smaller",
            """Give the smaller of the two numbers.
               Which number is less?
               Pick the lesser number.
               What is the minimum of the two numbers?
               Find the number that is not as big as the other.
               Two numbers -> the smaller one.
               Could you work out which number is below the other?
               Throw the bigger number away and tell me the remaining one.
               I need the least of the two numbers.
               Lowest number only, please.""",
            """Select the lower value.
               Which of both values is the bottom one?""",
        ),
        question(
            "second",
            "second",
            """Give the second number.
               Which number comes last?
               Pick the number after "and".
               What is the later one of the two numbers?
               Find the number at the end.
               Two numbers -> the second one.
               Could you copy the number that stands in second place?
               Skip the first number and write down the other.
               Right-hand number, please.
               I need whichever number you read last, regardless of size.""",
            """Select the value on the right.
               Which value closes the pair?""",
        ),
        question(
            "order",
            "order",
            """Say whether the two numbers are rising or falling.
               Does it go up or down from the first to the second number: rising, falling?
               Name the direction of the numbers, rising or falling.
               Are the numbers rising, or are they falling?
               Rising or falling: how do the numbers go on?
               Two numbers -> rising / falling.
               Second number bigger than the first: rising; second number smaller: falling.
               Do the numbers climb or drop, where climbing is rising and dropping is falling?
               Could you look at the two numbers and say falling or rising?
               Read from left to right and decide if this sequence is falling or rising.""",
            """Tell the trend of the values, rising or falling.
               Is it a falling pair, or a rising one?""",
        ),
    ),
    (
        alone(
            "sign",
            lambda i: f"{i['first']} {'>' if i['order'] == 'falling' else '<'} {i['second']}",
            """Put the right sign, < or >, between the numbers.
               Compare the numbers with < or >.
               Write the two numbers with a comparison sign.
               Replace "and" by < or by >.
               Set the correct one of < and > between them.
               Write it as an inequality.
               Use a sign to show which number is larger.
               Join the numbers by less-than or greater-than.
               Two numbers -> first number, < or >, second number.
               Could you rewrite this so that < or > stands between the two numbers?
               Keep both numbers in place and swap the word between them for < or >.
               Which symbol belongs in the middle, < or >, written out with both numbers?""",
            """Make a true inequality from both values.
               Show the relation of the values by a sign.
               Turn the pair into a comparison with a symbol.""",
        ),
        alone(
            "sorted",
            lambda i: f"{i['smaller']}, {i['larger']}",
            """Sort the two numbers from small to large.
               Write the smaller number, a comma, then the larger.
               Put the numbers in rising order.
               Order the numbers upwards, with a comma.
               List the numbers so that they go up.
               Arrange the two numbers by size.
               Give both numbers, the smallest first.
               Bring the numbers into ascending order.
               Two numbers -> smaller, larger.
               Could you rewrite the numbers in increasing order, separated by a comma?
               Begin with the lesser number, then put a comma and the greater one.
               I need these two numbers sorted; lowest goes first, comma in between.""",
            """Rank both values from the bottom up.
               Line the values up by size with a comma.
               Lower value, comma, higher value.""",
        ),
    ),
)


def _number(number: int) -> Item:
    size = "small" if number < 100 else "medium" if number < 200 else "large"
    return {
        "input": str(number),
        "next": str(number + 1),
        "previous": str(number - 1),
        "parity": "odd" if number % 2 else "even",
        "words": in_words(number),
        "last": in_words(number % 10),
        "size": size,
    }


COUNTING = Domain(
    "counting",
    tuple(_number(number) for number in range(21, 261)),
    (
        question(
            "next",
            "next",
            """Give the next number.
               Which number follows this one?
               Add one to the number.
               What comes after it when you count?
               Count one up from this number.
               Number -> number plus one.
               Could you tell me what comes right after this number?
               I am counting upwards and have reached this number; what is next?
               Move one step forward from this number.
               Following whole number, please.""",
            """Increase the value by one.
               State the successor.""",
        ),
        question(
            "previous",
            "previous",
            """Give the number before this one.
               Which number comes just before it?
               Take one away from the number.
               What comes before it when you count?
               Count one down from this number.
               Number -> number minus one.
               Could you tell me what comes right before this number?
               I am counting backwards and have reached this number; what is next?
               Move one step back from this number.
               Please subtract 1 and write down the result.""",
            """Decrease the value by one.
               State the predecessor.""",
        ),
        question(
            "parity",
            "parity",
            """Say whether this number is odd or even.
               Is the number even or odd?
               Can the number be halved? Even if so, else odd.
               Name the parity of the number.
               Sort the number: odd or even.
               Number -> odd / even.
               Could you check whether the number is even or odd?
               Odd, even: which one applies to the number?
               Write even if it is a multiple of two and odd if it is not.
               Look at the ones digit and decide between odd and even.""",
            """Tell if the value is an even or an odd one.
               Does two divide the value: even, else odd?""",
        ),
        question(
            "words",
            "words",
            """Write this number in words.
               How is the number read aloud?
               Give the number as words.
               Turn the figures of the number into words.
               What is this number called?
               Number -> English words.
               Could you write the number the way one says it?
               I need the number in words, as on a cheque.
               No digits, please: put the number in English.
               Convert the numeral to written words.""",
            """Express the value by its name.
               Say the value without figures.""",
        ),
        question(
            "last",
            "last",
            """Name the last digit of this number, as a word.
               Which digit does the number end with? Use a word.
               Give the ones digit in letters.
               What is the final figure of the number, as a word?
               Read out only the last digit of the number.
               Number -> its last digit, in words.
               Could you tell me the final digit, written in letters instead of figures?
               Drop all digits but the last and write that one as a word.
               Word for the digit in the ones place.
               I need the rightmost digit, for example seven and not 7.""",
            """Tell the closing digit of the value as a word.
               What word names the digit on the right?""",
        ),
    ),
    (
        alone(
            "range",
            lambda i: f"{i['previous']}-{i['next']}",
            """Write the range from one below to one above.
               Give the neighbours of the number with a hyphen.
               Write the number before and the number after, with a hyphen.
               Name both neighbours, joined by a hyphen.
               Make a range around the number, one down and one up.
               Give one less, a hyphen and one more.
               Which two numbers stand next to it? Use a hyphen.
               Put a hyphen between the previous and the next number.
               Number -> number minus one, hyphen, number plus one.
               Could you write the numbers on either side of this one, with a hyphen between?
               Subtract one, add one, and put a hyphen between the two results.
               I need the lower neighbour, a hyphen and the upper neighbour, no spaces.""",
            """State predecessor and successor with a hyphen.
               Draw the interval of one around the value.
               One below, hyphen, one above.""",
        ),
    ),
)

_UNITS = """
    kg kilograms weight, g grams weight, lb pounds weight, t tonnes weight, km kilometres length, m metres
    length,
    cm centimetres length, mm millimetres length, ft feet length, mi miles length, l litres volume, ml
    millilitres volume,
    gal gallons volume, s seconds time, min minutes time, h hours time, $ dollars money, € euros money, £
    pounds money,
    W watts power, V volts voltage, Hz hertz frequency
"""


def _amount(rng: Random) -> Item:
    unit, name, quantity = words(rng.choice(phrases(_UNITS)))
    number = rng.randint(2, 99)
    item = {
        "input": f"{number} {unit}",
        "unit": unit,
        "name": name,
        "quantity": quantity,
        "number": str(number),
    }
    return {**item, "words": in_words(number)}


UNITS = Domain(
    "units",
    drawn("units", 240, _amount),
    (
        question(
            "quantity",
            "quantity",
            """Say what is measured: weight, length, volume, time, money or another quantity.
               Which quantity is this an amount of?
               What does the unit measure?
               Name the kind of quantity.
               Is it a length, a weight, a volume, a time or something else?
               Amount -> kind of quantity, such as weight or volume.
               Could you tell me what is being measured here, for example time or money?
               Weight, length, volume, time, money, power, voltage or frequency: which one is it?
               What would one measure in this unit?
               Classify the amount by its quantity, length or money for instance.""",
            """Tell the physical dimension.
               Of which sort is this measurement?""",
        ),
        question(
            "name",
            "name",
            """Write the unit out in full.
               What is the unit called?
               Give the full name of the unit.
               Spell out what the unit's short sign stands for.
               Name the unit without abbreviation.
               Amount -> full name of its unit, in the plural.
               Could you write the whole word for the unit, without the number?
               I do not know this short form; what is the unit's full name?
               Unit only, not shortened, please.
               In which unit is the amount given, with no short forms?""",
            """Expand the abbreviation of the measure.
               For what does the symbol stand?""",
        ),
        question(
            "number",
            "number",
            """Give the number without the unit.
               How many of the unit are there? In figures.
               Drop the unit and keep the number.
               What is the amount in figures?
               Pick out the figures.
               Amount -> number only, in figures.
               Could you remove the unit and give me the digits?
               Digits only, no unit.
               I need the figure that stands before the unit.
               Copy the numeral and ignore the unit.""",
            """Extract the numeric value.
               State the count without its measure.""",
        ),
        question(
            "words",
            "words",
            """Write the number in words and leave the unit out.
               How many of the unit are there? In words.
               Give the amount as a word, without its unit.
               Turn the figures into words and drop the unit.
               Read only the number aloud.
               Amount -> number in words, no unit.
               Could you write the number as one says it and ignore the unit?
               I need the figure in words; the unit does not matter.
               Convert the digits into English and forget the unit.
               How is the number in front of the unit read aloud?""",
            """Express the numeric value by words.
               Say the count in letters, without its measure.""",
        ),
    ),
    (
        alone(
            "full",
            lambda i: f"{i['number']} {i['name']}",
            """Write the amount with the unit in full.
               Keep the number and spell out the unit.
               Replace the short sign by the name of the unit.
               Give the number and the full unit.
               Write it without abbreviation.
               Copy the number, then write the unit's whole name.
               Expand the unit and keep its number.
               Say how many of which unit, in full.
               Amount -> digits, then the unit's full name.
               Could you rewrite this so that the unit is a whole word?
               Leave the digits as they are and lengthen the unit to its full word.
               I need the same amount, only with the unit not shortened.""",
            """Restate the measurement with no symbol.
               Value first, then the measure spelled out.
               Unfold the abbreviation behind the value.""",
        ),
    ),
)
