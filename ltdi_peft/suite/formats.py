"""Answer formats: how the answer to a question is to be written, with ways to say so.

A format with a {} slot in its wording puts the question there; otherwise the wording follows the question."""

from ltdi_peft.suite.design import Format, lines


def _lower_word(answer: str) -> bool:
    return answer.isalpha() and answer.islower()


def _short_word(answer: str) -> bool:
    return answer.isalpha() and 2 <= len(answer) <= 7


PLAIN = Format(
    "plain",
    "plain",
    lambda a: a,
    lines("""Give only the answer.
             Reply with the answer alone.
             Write the answer and nothing else.
             {} Just the answer, please.
             No explanation, only the answer.
             I want nothing but the answer.
             Could you leave out everything except the answer?
             Task: {} Return the answer without extra words."""),
    lines("""Say no more than the answer itself.
             Keep to the bare answer."""),
)
UPPER = Format(
    "upper",
    "upper",
    str.upper,
    lines("""Write it in capital letters.
             Use only capitals.
             The answer must be in upper case.
             {} Put every letter of the answer in upper case.
             ALL CAPS for the answer, please.
             Could you type the answer in uppercase?
             Lower-case letters are not allowed in your answer.
             Task: {} Write the answer as if caps lock were on."""),
    lines("""Answer in block capitals.
             Make all the letters capital letters."""),
    lambda a: a.upper() != a,
)
TITLE = Format(
    "title",
    "title",
    str.capitalize,
    lines("""Begin the answer with a capital letter.
             Start it with a capital.
             Only the first letter of the answer is a capital.
             {} Capitalise the first letter of what you write.
             Capital first letter, small letters after it.
             Could you give the answer an initial capital?
             Type it the way a name is typed, with its first letter in uppercase.
             Question: {} Your answer should be capitalised, like "This"."""),
    lines("""Let the answer start with a big letter.
             The opening letter must be upper case."""),
    _lower_word,
)
BRACKETS = Format(
    "brackets",
    "wrap",
    lambda a: f"[{a}]",
    lines("""Put the answer in square brackets.
             Write it between square brackets.
             Square brackets go around the answer.
             {} Surround your answer with square brackets.
             Wrap the answer in [ and ].
             The required form is [answer], brackets included.
             Could you add a square bracket on each side of the answer?
             Task: {} Your output should be bracketed, like [this]."""),
    lines("""Enclose what you say in square brackets.
             The reply stands inside square brackets."""),
)
QUOTES = Format(
    "quotes",
    "wrap",
    lambda a: f'"{a}"',
    lines("""Put the answer in double quotes.
             Write it between quotation marks.
             Quotation marks go around the answer.
             {} Surround your answer with double quotes.
             Wrap the answer in double quotation marks.
             The required form is "answer", quotes included.
             Could you add a double quote mark on each side of the answer?
             Task: {} Your output should be quoted, like "this"."""),
    lines("""Enclose what you say in quotation marks.
             The reply stands inside double quotes."""),
)
STARS = Format(
    "stars",
    "wrap",
    lambda a: f"*{a}*",
    lines("""Put a star before and after the answer.
             Write it between stars.
             Stars go on both sides of the answer.
             {} Surround your answer with stars.
             Wrap the answer in asterisks, one on each side.
             The required form is *answer*, stars included.
             Could you add an asterisk at the beginning and at the end?
             Task: {} Your output should be starred, like *this*."""),
    lines("""Enclose what you say in two stars.
             The reply stands between two star signs."""),
)
TWICE = Format(
    "twice",
    "twice",
    lambda a: f"{a} {a}",
    lines("""Write the answer twice.
             Say it two times.
             Give the answer and then repeat it.
             {} Repeat your answer once.
             Double the answer, with a space in between.
             I want to read your answer two times in a row.
             Two copies of the answer, side by side, please.
             Task: {} Duplicate your answer on the same line."""),
    lines("""The answer should stand there two times over.
             State it, then state it again."""),
    suits=lambda a: len(a) < 20,
)
SHOUT = Format(
    "shout",
    "end",
    lambda a: f"{a}!",
    lines("""End with an exclamation mark.
             Put an exclamation mark after the answer.
             The answer ends in an exclamation mark.
             {} Add an exclamation mark to the answer.
             The last character you write is "!".
             Could you attach a "!" to the end of the answer?
             Finish the answer off by an exclamation point.
             Task: {} Type the answer, then an exclamation mark."""),
    lines("""Let an exclamation mark follow what you say.
             Close the reply with an exclamation mark."""),
)
ASKED = Format(
    "asked",
    "end",
    lambda a: f"{a}?",
    lines("""End with a question mark.
             Put a question mark after the answer.
             The answer ends in a question mark.
             {} Add a question mark to the answer.
             The last character you write is "?".
             Could you attach a "?" to the end of the answer?
             Make the answer look like a question by adding "?".
             Task: {} Type the answer, then a question mark."""),
    lines("""Let a question mark follow what you say.
             Close the reply with a question mark."""),
)
LABEL = Format(
    "label",
    "lead",
    lambda a: f"Answer: {a}",
    lines("""Begin with "Answer:".
             Write "Answer:" in front of it.
             Put the label "Answer:" before the answer.
             {} Start your reply with the label "Answer:".
             Prefix the answer by "Answer:".
             First comes "Answer:", then what you found.
             Could you use the form "Answer: ...", replacing the dots?
             My question: {} Mark your result by putting "Answer:" first."""),
    lines("""The reply opens with "Answer:".
             Place "Answer:" ahead of what you say."""),
)
NOT = Format(
    "not",
    "lead",
    lambda a: f"not {a}",
    lines("""Write "not" in front of it.
             Begin with the word "not".
             Put the word "not" before the answer.
             {} Start your reply with "not".
             Prefix the answer by "not".
             First comes "not", then what you found.
             Could you add a "not" at the very beginning?
             Task: {} Negate your result by a leading "not"."""),
    lines("""The reply opens with the word "not".
             Place "not" ahead of what you say."""),
)
SENTENCE = Format(
    "sentence",
    "sentence",
    lambda a: f"It is {a}.",
    lines("""Answer with a sentence that begins "It is".
             Write a whole sentence starting with "It is".
             Reply as a short sentence: It is, then the answer.
             {} Use a full sentence with "It is".
             Fill in this sentence and write all of it: It is ___.
             Could you reply in the form "It is ...", ending in a full stop?
             Put "It is" before the answer and a period after it.
             Question: {} Respond in a complete sentence whose first words are "It is"."""),
    lines("""Say it as one sentence, opening with "It is".
             Form a short "It is" sentence."""),
)
SPELLED = Format(
    "spelled",
    "spelled",
    lambda a: "-".join(a),
    lines("""Spell it with a hyphen between the letters.
             Write the letters of the answer with hyphens between them.
             Put hyphens between all letters of the answer.
             {} Spell your answer letter by letter, joined by hyphens.
             Letter by letter, please, l-i-k-e t-h-i-s.
             Could you put a hyphen after every letter except the last?
             Hyphenate between all the characters of the answer.
             Task: {} Type the letters one by one, a hyphen in between."""),
    lines("""Separate its letters by hyphens.
             Spell the reply out with hyphens."""),
    _short_word,
)
INITIAL = Format(
    "initial",
    "initial",
    lambda a: a[0],
    lines("""Give only the first letter of the answer.
             Write just its first letter.
             Shorten the answer to its first letter.
             {} Reply with the first letter alone.
             I just need the initial of the answer.
             One letter will do: the first of the answer.
             Could you drop everything after the first letter of your answer?
             Task: {} Abbreviate your result to a single letter, its first."""),
    lines("""Only the letter that the answer begins with.
             Cut the answer down to its opening letter."""),
    lambda a: a[0].isalpha(),
)

FORMATS = (
    PLAIN,
    UPPER,
    BRACKETS,
    TWICE,
    LABEL,
    SHOUT,
    QUOTES,
    SENTENCE,
    TITLE,
    STARS,
    NOT,
    INITIAL,
    ASKED,
    SPELLED,
)
