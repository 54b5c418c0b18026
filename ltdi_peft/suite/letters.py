"""Domain of words as strings of letters."""

from ltdi_peft.suite.design import Domain, Item, alone, question
from ltdi_peft.suite.facts import ANIMALS
from ltdi_peft.suite.numbers import in_words
from ltdi_peft.suite.splits import share
from ltdi_peft.suite.things import THINGS

_WORDS = sorted({i["input"] for d in (ANIMALS, THINGS) for i in d.items})
_SHORT_WORDS = [word for word in _WORDS if word.isalpha() and 3 <= len(word) <= 6]


def _word(word: str) -> Item:
    size = "short" if len(word) <= 4 else "long"
    slots = {"first": word[0], "last": word[-1], "length": in_words(len(word)), "size": size}
    return {"input": word, "head": word[:2], **slots}


LETTERS = Domain(
    "letters",
    tuple(_word(word) for word in sorted(_SHORT_WORDS, key=lambda word: share("letters " + word))[:230]),
    (
        question(
            "first",
            "first",
            """Give the first letter of the word.
               Which letter does the word begin with?
               Copy the letter at the front of the word.
               What is the word's initial?
               With which letter does the word start?
               Word -> its first letter.
               I will give you a word; tell me the letter it opens with.
               Could you look at the word and write down letter number one?
               Starting letter only, please.
               If I spell this word aloud, which letter do you hear before all others?""",
            """Under what letter is the entry in a dictionary?
               Name the leading character.""",
        ),
        question(
            "last",
            "last",
            """Give the last letter of the word.
               Which letter does the word end with?
               Copy the letter at the back of the word.
               What is the word's final letter?
               With which letter does the word stop?
               Ending letter of the word, please.
               Word -> its last letter.
               Could you tell me the letter at the very end of the word?
               I need to know which letter comes last in the word.
               Look at the word and return just the letter that finishes it.""",
            """Upon what letter does the entry close?
               Name the trailing character.""",
        ),
        question(
            "length",
            "length",
            """Say how many letters the word has.
               Count the letters of the word.
               What is the word's number of letters, in a word?
               How long is the word in letters?
               Give the length of the word.
               Word -> letter count, in words rather than figures.
               Could you count the letters for me and write the total as a word?
               How many letters do you need to write the word?
               I want to know how many letters make up the word.
               Number of letters, not in digits.""",
            """Tell the number of characters.
               State how many characters one types for it.""",
        ),
        question(
            "size",
            "size",
            """Say whether the word is short, up to four letters, or long.
               Is it a short word of at most four letters, or a long one?
               Judge the word's size: short (four letters or fewer), long.
               Does the word have more than four letters? Then it is long, else short.
               Which is the word, short or long, if long begins at five letters?
               Word -> short (up to four letters) or long (five and more).
               Could you classify the word as short or long, where long means over four letters?
               Count the letters: four or fewer is short, anything above is long.
               Words of five or more letters are long, others short; which is this?
               Answer long if there are at least five letters, otherwise short.""",
            """Tell short from long: five characters make the entry long.
               Long or short, what is an entry with this many characters?""",
        ),
        question(
            "head",
            "head",
            """Give the first two letters of the word.
               Which two letters does the word begin with?
               Copy the two letters at the front of the word.
               Cut the word after its second letter.
               With which pair of letters does the word start?
               First two letters, please.
               Word -> its opening pair of letters.
               Could you write letters one and two of the word, without a space?
               I only need the first couple of letters from the word.
               Drop everything after letter two and show what is left.""",
            """Name the leading two characters.
               Keep no more than two characters from the left.""",
        ),
    ),
    (
        alone(
            "starred",
            lambda i: i["first"] + "*" * (len(i["input"]) - 1),
            """Hide all letters but the first behind stars.
               Keep the first letter and put stars for the others.
               Mask the word after its first letter with stars.
               Replace each letter except the first by a star.
               Write the first letter and a star for each further letter.
               Censor the word: first letter, then stars.
               Show only the first letter, stars for the rest.
               Put stars in place of all later letters.
               Word -> first letter plus one star per remaining letter.
               Could you star out every letter from the second onwards?
               Leave the initial as it is and swap every following letter for an asterisk.
               I want to see just the opening letter; turn each later letter into a star.""",
            """Veil the entry apart from its leading character.
               Leading character visible, a star for each other one.
               Blank the characters after the leading one by stars.""",
        ),
    ),
)
