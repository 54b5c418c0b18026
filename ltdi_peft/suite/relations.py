"""Domain of logic in a sentence: who is taller, older, richer than whom, and what follows from it."""

from random import Random

from ltdi_peft.suite.design import Domain, Item, alone, drawn, phrases, question, words
from ltdi_peft.suite.sentences import NAMES

# Each relation with its opposite; "more" says who has more of it: the first or the second person.
_RELATIONS = (
    "taller shorter first, shorter taller second, older younger first, younger older second, "
    "faster slower first, slower faster second, richer poorer first, poorer richer second, "
    "stronger weaker first, weaker stronger second, heavier lighter first, lighter heavier second"
)


def _comparison(rng: Random) -> Item:
    first, second = rng.sample([name for names in NAMES.values() for name in words(names)], 2)
    relation, opposite, more = words(rng.choice(phrases(_RELATIONS)))
    winner, loser = (first, second) if more == "first" else (second, first)
    text = rng.choice(("{} is {} than {}.", "{} was {} than {}.", "I think {} is {} than {}."))
    slots = {"first": first, "second": second, "relation": relation, "opposite": opposite}
    return {"input": text.format(first, relation, second), "winner": winner, "loser": loser, **slots}


COMPARISONS = Domain(
    "comparisons",
    drawn("comparisons", 240, _comparison),
    (
        question(
            "first",
            "first",
            """Name the person who is mentioned first.
               Whose name comes first?
               Pick out the first of the two names.
               Which person stands before the adjective?
               Who is the subject of the comparison?
               Sentence -> the name that comes first.
               Could you tell me which name I read first?
               Of the two people, give the one named at the start.
               I need the person written before the comparing word.
               Who is named before the other?""",
            """Extract the earlier of both names.
               With whom does the statement begin?""",
        ),
        question(
            "second",
            "second",
            """Name the person who is mentioned last.
               Whose name comes second?
               Pick out the second of the two names.
               Which person stands after "than"?
               With whom is the first person compared?
               Sentence -> the name at the end.
               Could you tell me which name I read last?
               Of the two people, give the one named after the other.
               I need the person written behind the word "than".
               Skip the first person and write down the other one.""",
            """Extract the later of both names.
               With whom does the statement end?""",
        ),
        question(
            "winner",
            "winner",
            """Say who has more: is taller, older, faster, richer, stronger or heavier.
               Which of the two has the greater height, age, speed, wealth, strength or weight?
               Name the person with the larger measure.
               Who is ahead in this comparison?
               Whose measure is the greater one?
               Sentence -> the taller, older, faster, richer, stronger or heavier person.
               Could you work out who is superior in height, age, speed, wealth, strength or weight?
               Find the person who is not the shorter, younger, slower, poorer, weaker or lighter.
               Name the one with more height, age, speed, money, strength or weight.
               Who comes out higher when their height, age, speed or the like is compared?""",
            """Which individual is on top according to the statement?
               Tell who exceeds the other.""",
        ),
        question(
            "opposite",
            "opposite",
            """Give the opposite of the comparing word.
               Which word would be right with the two names swapped?
               What is the contrary of the adjective here?
               Turn the comparison word into its opposite.
               Name the word that means the reverse of the comparison.
               Sentence -> contrary of its comparing word.
               Could you give me the word that says the reverse, also ending in -er?
               Take the adjective of the comparison and write its antonym in the same form.
               I need one word for how the second person compares to the first.
               If the second person were named first, which word would make the sentence true?""",
            """State the antonym of the comparative.
               Seen from the other person, which comparative holds?""",
        ),
        question(
            "relation",
            "relation",
            """Copy the comparing word.
               Which comparative does the sentence use?
               Pick out the adjective that compares.
               What word stands before "than"?
               Find the comparison word of the sentence.
               Sentence -> its comparing word.
               Could you copy the word that compares the two people?
               I need the adjective ending in -er, just as it stands.
               Taller, older, poorer or what else is written in the sentence?
               Which -er word is used about the first person?""",
            """Extract the comparative from the statement.
               By what adjective are the two compared?""",
        ),
    ),
    (
        alone(
            "swapped",
            lambda i: f"{i['second']} is {i['opposite']}",
            """Say what this means for the second person.
               Tell how the other person is, with "is".
               Turn the comparison round and stop before "than".
               State the same fact about the person after "than".
               Begin with the second name and say how that person is.
               Reverse the comparison in three words.
               Describe the second person by the opposite word.
               What follows for the person named last?
               Sentence -> second name, "is", opposite word.
               Could you say the reverse, starting with the second person and using three words?
               Swap the roles: second person, "is", contrary adjective.
               So how does the second person compare, written as name, "is" and one word?""",
            """Infer how the later of both names compares.
               Draw the converse in three words.
               Express the statement from the other side.""",
        ),
    ),
)
