"""Domains of structured text: lists of words, records of people."""

from random import Random

from ltdi_peft.suite.design import Domain, Item, alone, drawn, question, words
from ltdi_peft.suite.numbers import in_words
from ltdi_peft.suite.sentences import NAMES

_BEASTS = words("dog cat horse cow pig sheep lion tiger wolf fox bear mouse rabbit goat duck hen eagle snake")
_FRUIT = words("apple pear banana orange lemon plum cherry grape peach mango")
_COLOURS = words("red blue green yellow black white brown pink grey purple")
_OTHERS = words("chair table lamp door spoon cup shirt coat shoe hat car bus ship drum book pen")


def _list(rng: Random) -> Item:
    animal, colour = rng.choice(_BEASTS), rng.choice(_COLOURS)
    others = rng.sample(_OTHERS + _FRUIT, rng.randint(1, 3))
    words = [animal, colour, *others]
    rng.shuffle(words)
    slots = {"first": words[0], "last": words[-1], "count": in_words(len(words))}
    joined = f"{', '.join(words[:-1])} and {words[-1]}"
    return {"input": ", ".join(words), "animal": animal, "colour": colour, "joined": joined, **slots}


LISTS = Domain(
    "lists",
    drawn("lists", 240, _list),
    (
        question(
            "first",
            "first",
            """Give the first word of the list.
               Which word begins the list?
               Pick the word at the front.
               What stands at the start of the list?
               Copy the word before the first comma.
               List -> first word.
               Could you tell me which word is listed first?
               I need word number one of the list.
               Ignore everything from the first comma on; what remains?
               Starting word of the list, please.""",
            """Select the opening entry of the series.
               What heads the series?""",
        ),
        question(
            "last",
            "last",
            """Give the last word of the list.
               Which word ends the list?
               Pick the word at the back.
               What stands at the end of the list?
               Copy the word after the last comma.
               List -> last word.
               Could you tell me which word is listed last?
               I need the word that finishes the list.
               Ignore everything up to the last comma; what remains?
               Final word of the list, please.""",
            """Select the closing entry of the series.
               What comes at the tail of the series?""",
        ),
        question(
            "animal",
            "animal",
            """Find the animal in the list.
               Which word of the list is an animal?
               Pick out the animal.
               What living creature is in the list?
               Name the only animal among the words.
               List -> the animal in it.
               Could you tell me which animal is listed?
               One of these words names a creature; which one?
               Tiger, hen or which other animal do you see among the words?
               Filter the list so that just the animal is left.""",
            """Select the beast from the series.
               Which entry could breathe and walk about?""",
        ),
        question(
            "colour",
            "colour",
            """Find the colour in the list.
               Which word of the list is a colour?
               Pick out the colour.
               What colour is in the list?
               Name the only colour among the words.
               List -> the colour in it.
               Please tell me which colour is listed.
               I need the colour word; skip things and creatures.
               Red, grey or which other colour do you see among the words?
               Remove every word that is not a colour.""",
            """Select the hue from the series.
               Which entry could be the shade of a wall paint?""",
        ),
        question(
            "count",
            "count",
            """Say how many words are in the list.
               Count the words of the list.
               What is the number of words, as a word?
               How long is the list?
               Give the length of the list in a word.
               List -> number of its words, in letters.
               Could you count these words for me and write the total as one word?
               How many words do you see, three, four or five?
               I need the size of the list, no digits.
               Add up the words and write down how many there are.""",
            """Tell the number of entries in the series.
               State how many entries the commas separate.""",
        ),
    ),
    (
        alone(
            "joined",
            lambda i: i["joined"],
            """Write "and" before the last word in place of the comma.
               Join the last two words by "and".
               Turn the list into a phrase with "and".
               Replace the final comma by "and".
               Say the list as in a sentence, with "and".
               Make it an English list with "and" at the end.
               Keep all words, but put "and" before the final one.
               Copy the list with "and" for the last comma.
               List -> same list with "and" before its last word.
               Could you rewrite the list so that "and" stands where the last comma was?
               Remove the last comma and write "and" there; change nothing else.
               I want to read the list aloud; connect its two last words with "and".""",
            """Let the closing entry of the series follow an "and".
               Phrase the series naturally by an "and".
               Swap the hindmost comma for the word and.""",
        ),
        alone(
            "coloured",
            lambda i: f"{i['colour']} {i['animal']}",
            """Put the colour before the animal.
               Paint the animal: colour, then animal.
               Make a phrase of the colour and the animal.
               Name the animal in its colour.
               Join the colour word and the animal word.
               Write the colour and, after it, the animal.
               Give the animal the colour of the list.
               Take only colour and animal, in this order.
               List -> the colour, then the animal.
               Could you describe the animal with the colour from the list, in two words?
               Pick out the two words for a colour and an animal, colour in front.
               I need a two-word phrase: the colour as adjective, the animal as noun.""",
            """Dye the beast in the hue of the series.
               Hue first, beast second.
               Combine the beast with the hue.""",
        ),
    ),
)

_SURNAMES = words(
    "Smith Jones Brown Taylor Wilson Evans Walker Wright Hall Wood Clark Young King Hill Moore Baker"
)
_JOBS = {
    "hospital": words("nurse doctor surgeon midwife"),
    "school": words("teacher tutor headmaster librarian"),
    "kitchen": words("cook baker chef waiter"),
    "farm": words("farmer shepherd gardener milkmaid"),
    "court": words("judge lawyer clerk bailiff"),
    "stage": words("actor singer dancer comedian"),
}


def _record(rng: Random) -> Item:
    name, surname = rng.choice(words(" ".join(NAMES.values()))), rng.choice(_SURNAMES)
    place = rng.choice(sorted(_JOBS))
    job, age = rng.choice(_JOBS[place]), rng.randint(20, 69)
    slots = {"name": name, "surname": surname, "job": job, "place": place, "age": str(age)}
    return {"input": f"{name} {surname}, {job}, {age}", "initials": f"{name[0]}.{surname[0]}.", **slots}


RECORDS = Domain(
    "records",
    drawn("records", 240, _record),
    (
        question(
            "name",
            "name",
            """Give the first name in this entry.
               What is the person's first name?
               Pick out the first name.
               How do friends call this person?
               Copy the word that begins the entry.
               Entry -> first name.
               Could you tell me what this person is called, without the family name?
               I need the forename only.
               Given name of the person, please.
               Drop the surname, the job and the age; write what is left.""",
            """Extract the given name from the register line.
               By which name was the individual baptised?""",
        ),
        question(
            "surname",
            "surname",
            """Give the last name in this entry.
               What is the person's family name?
               Pick out the surname.
               Which name would follow Mr or Mrs?
               Copy the word before the first comma.
               Entry -> family name.
               Could you tell me the person's last name?
               I need the second of the two names.
               Surname only, please.
               What do you read right after the first name?""",
            """Extract the family's name from the register line.
               Which name does the individual share with parents?""",
        ),
        question(
            "job",
            "job",
            """Give the job in this entry.
               What does the person do for a living?
               Pick out the profession.
               Which job does the person have?
               Copy the word between the commas.
               Entry -> job.
               Could you tell me what kind of work this person does?
               I need the occupation listed here.
               As what is the person employed?
               Skip the names and the age and write down the rest.""",
            """Extract the trade from the register line.
               How does the individual earn money?""",
        ),
        question(
            "place",
            "place",
            """Say where this person works: hospital, school, kitchen, farm, court or stage.
               What is the person's place of work?
               Choose the work place for the job.
               Is the person at work in a hospital, school, kitchen, farm, court or on a stage?
               Name the place where such a job is done.
               Entry -> court, farm, hospital, kitchen, school or stage.
               Could you tell me where somebody with this job works, farm or stage for example?
               Stage, farm, court, school, kitchen or hospital: which goes with the profession?
               Work out from the job if the place is court, kitchen, stage, school, farm or hospital.
               To which workplace does the person go: school, stage, hospital, court, farm or kitchen?""",
            """Where would one meet the individual on duty: hospital, school, kitchen, farm, court, stage?
               Tell the site of the trade.""",
        ),
        question(
            "age",
            "age",
            """Give the age in this entry.
               How old is the person?
               Pick out the age.
               What number of years has the person lived?
               Copy the number at the end of the entry.
               Entry -> age.
               Could you tell me how old this person is?
               Years of age, in digits.
               Ignore names and job; which number is left?
               What is the only number in the entry?""",
            """Extract the years from the register line.
               How many birthdays has the individual had?""",
        ),
    ),
    (
        alone(
            "initials",
            lambda i: i["initials"],
            """Give the person's initials with full stops.
               Write the first letters of both names, each with a dot.
               Shorten the name to its initials.
               Which initials does the person have?
               Make a monogram with dots from the two names.
               Abbreviate first and last name to letters.
               Reduce both names to one letter and a dot.
               Sign for the person with initials.
               Entry -> initials, a dot after each.
               Could you shorten first name and surname to one letter each, with dots?
               I need the two initials, each followed by a full stop, no space.
               First letter, dot, first letter, dot: do this for first name and surname.""",
            """Produce the monogram of the individual.
               Letters and dots in place of the names.
               Initial both names of the register line.""",
        ),
        alone(
            "reversed",
            lambda i: f"{i['surname']}, {i['name']}",
            """Write the last name, a comma, and the first name.
               Put the name as in a phone book.
               Turn the two names round, with a comma.
               Give the surname first.
               List the person under the family name.
               Swap first and last name and put a comma between.
               Write the name as in a library catalogue.
               Last name, then a comma, then first name.
               Entry -> surname, first name.
               Could you write the person's name with the surname in front and a comma after it?
               Change the order of the two names and separate them by a comma.
               I sort people by family name; write surname, comma, first name.""",
            """Index the individual by the family's name.
               Invert both names around a comma.
               Make a catalogue heading of the individual.""",
        ),
    ),
)
