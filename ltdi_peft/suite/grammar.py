"""Domains of grammar: verbs and nouns. Word lists of our own; regular forms by rule, others listed."""

from ltdi_peft.suite.design import Domain, Item, alone, grouped, question, word_pairs, words

_VOWELS = "aeiou"
_IRREGULAR_PAST = word_pairs("""
    begin/began bend/bent bite/bit blow/blew break/broke bring/brought build/built burn/burned buy/bought
    catch/caught
    choose/chose come/came cut/cut dig/dug draw/drew drink/drank drive/drove eat/ate fall/fell feed/fed
    feel/felt
    fight/fought find/found fly/flew forget/forgot freeze/froze get/got give/gave go/went grow/grew
    hang/hung hear/heard
    hide/hid hit/hit hold/held keep/kept know/knew lead/led leave/left lend/lent let/let lose/lost make/made
    mean/meant
    meet/met pay/paid put/put ride/rode ring/rang rise/rose run/ran say/said see/saw sell/sold send/sent
    shake/shook
    shine/shone shoot/shot shut/shut sing/sang sink/sank sit/sat sleep/slept speak/spoke spend/spent
    stand/stood
    steal/stole swim/swam take/took teach/taught tear/tore tell/told think/thought throw/threw wake/woke
    wear/wore
    win/won write/wrote become/became bet/bet bleed/bled breed/bred burst/burst creep/crept deal/dealt
    forgive/forgave grind/ground kneel/knelt lay/laid lie/lay light/lit quit/quit read/read seek/sought
    shrink/shrank
    slide/slid spin/spun split/split spread/spread spring/sprang stick/stuck sting/stung strike/struck
    swear/swore
    sweep/swept swing/swung understand/understood weep/wept wind/wound
    """)
_REGULAR = words("""
    add answer arrive ask bake believe boil borrow brush call carry change chase clean climb close collect
    compare
    cook copy count cover cross cry dance decide deliver describe destroy dream dress dry earn enjoy enter
    escape
    explain fail fetch fill finish fix float follow fry greet guess happen hate help hope hug hunt hurry
    invite join
    jump kick kiss knock land laugh learn lift like listen live lock look love marry measure mend mix move
    need notice
    offer open order paint park pass pick plan plant play point pour practise pray prepare press promise
    pull push
    raise reach receive refuse remember repair repeat reply rest return roll rub rush sail save scream
    search serve
    share shout skip smell smile sneeze solve stare start stay stop study talk taste test thank tidy touch
    trade train
    trust try turn use visit wait walk want warn wash waste watch wave whisper wipe wish work worry
    """)
# One-syllable verbs and those stressed at the end double their last consonant before -ed and -ing.
_DOUBLING = words(
    "begin bet cut dig forget get hit hug let plan put quit run rub shut sit skip spin split stop swim win"
)


def past(verb: str) -> str:
    """The simple past."""
    if verb in _IRREGULAR_PAST:
        return _IRREGULAR_PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in _DOUBLING else "") + "ed"


def progressive(verb: str) -> str:
    """The -ing form."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + (verb[-1] if verb in _DOUBLING else "") + "ing"


def with_s(word: str) -> str:
    """The word with a regular -s: third person of a verb, plural of a noun."""
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + (
        "es" if word.endswith(("s", "x", "z", "ch", "sh")) or word in ("go", *_PLURAL_OES) else "s"
    )


_PLURAL_OES = ("hero", "tomato", "potato", "echo")


def _verb(verb: str) -> Item:
    regular = "irregular" if verb in _IRREGULAR_PAST else "regular"
    return {"input": verb, "past": past(verb), "ing": progressive(verb), "s": with_s(verb), "kind": regular}


VERBS = Domain(
    "verbs",
    tuple(_verb(verb) for verb in sorted({*_IRREGULAR_PAST, *_REGULAR})),
    (
        question(
            "past",
            "past",
            """Put this verb into the past tense.
               Give the simple past of the verb.
               What is the past form of this verb?
               Change the verb so that it tells of yesterday.
               Write the past tense of the word.
               Verb -> past tense.
               Could you tell me the simple past of this word, please?
               I will give you a verb; I need the form that follows "yesterday she".
               What do we say instead of this verb when it happened long ago?
               Conjugate the verb in the simple past, the form alone without a pronoun.""",
            """Turn the verb into its preterite.
               How does the verb read in a story about last week?""",
        ),
        question(
            "progressive",
            "ing",
            """Put this verb into the -ing form.
               Give the progressive form of the verb.
               What is the verb with the ending -ing?
               Change the verb so that it fits after "she is".
               Write the present participle of the word.
               Verb -> -ing form.
               Could you add -ing to this verb, spelling it correctly?
               Here is a verb; I would like its present participle.
               What form of this verb follows "they are" right now?
               Continuous form, please, the single word that ends in -ing.""",
            """Turn the verb into its gerund.
               How does the verb read when the action is going on?""",
        ),
        question(
            "third",
            "s",
            """Put this verb into the third person singular.
               Give the form of the verb that follows "he".
               What is the verb with the ending -s?
               Change the verb so that it fits after "she" in the present.
               Write the he-she-it form of the word.
               Verb -> third person singular, present tense.
               Could you give this verb the -s that it takes after "he"?
               I have a verb here and want the form used with "she" today.
               What form of this verb follows "the teacher" in the simple present?
               Conjugate the verb for he, she or it, present tense, without the pronoun.""",
            """Turn the verb into its form for "it".
               How does the verb read behind "my friend" in the present?""",
        ),
        question(
            "regular",
            "kind",
            """Say whether this verb is regular or irregular.
               Is the past of the verb made with -ed: regular or irregular?
               Name the type of verb: regular, irregular.
               Does the verb follow the rule? Then it is regular, else irregular.
               Sort the verb into regular or irregular.
               Verb -> regular or irregular.
               Could you check whether the verb counts as irregular or as regular?
               I will give you a verb; I need its type, irregular or regular.
               Regular verbs add -ed, irregular ones do not: which is this?
               Which label does this verb deserve, "irregular" or "regular"?""",
            """Judge if the conjugation is regular or irregular.
               To which class does the verb belong, regular or irregular?""",
        ),
    ),
    (
        alone(
            "negated",
            lambda i: f"did not {i['input']}",
            """Say in the past that it was not done.
               Negate the verb in the past tense.
               Write the negative past of the verb.
               Put "did not" with the verb.
               Deny the action for yesterday.
               Make the verb negative and past.
               Tell that nobody did it, without a subject.
               Give the verb's past in the negative.
               Verb -> "did not" plus the verb.
               Could you negate this verb for the past, as in "did not arrive"?
               I will give you a verb; I need its negative simple past, uncontracted.
               How do we say, by means of "did not", that it never took place?""",
            """Express that the action failed to happen.
               Produce the denial of the verb in the preterite.
               State the verb as something undone last week.""",
        ),
    ),
)

_IRREGULAR_PLURAL = word_pairs("""
    man/men woman/women child/children foot/feet tooth/teeth goose/geese mouse/mice ox/oxen knife/knives
    wife/wives
    leaf/leaves wolf/wolves thief/thieves shelf/shelves fireman/firemen policeman/policemen sheep/sheep
    """)
_NOUNS = grouped(
    "kind",
    """
    person: man woman child teacher doctor nurse actor artist author uncle aunt engineer officer editor
    person: inspector
    person: baker farmer singer dancer driver waiter lawyer judge soldier sailor king queen prince hero
    person: thief wife
    person: baby boy girl brother sister cousin friend neighbour guest pupil student fireman policeman
    person: architect
    person: actress athlete astronaut expert emperor orphan immigrant assistant accountant electrician
    person: infant owner
    person: inventor usher umpire ally aviator pilot guard hunter miner tailor clown
    animal: goose mouse ox wolf sheep dog cat horse ant eagle owl elephant ape octopus eel otter ostrich fox
    animal: fly
    animal: butterfly bear lion insect antelope alligator donkey monkey pony puppy bird oyster emu ibis hen
    animal: wasp snake
    place: city village school church beach library office airport island inn kitchen hospital university
    place: station
    place: bakery factory park forest valley country desert museum theatre shop farm castle palace attic
    place: alley
    place: arena orchard abbey embassy avenue aisle area institute academy estate hotel harbour bridge
    place: tower cave swamp pub mill
    thing: foot tooth knife leaf shelf box brush watch glass dish bus egg apple orange umbrella onion oven
    thing: arm ear
    thing: eye idea arrow envelope engine iron axe apron anchor album ocean table lamp key toy story
    thing: diary berry cherry potato tomato bag coat pen phone ring window door clock piano photo candle
    thing: bottle
    thing: basket blanket button ladder pillow radio ticket wheel needle match bench acorn ankle elbow
    thing: accident event offer answer oar olive opera option order ointment spoon
    thing: overcoat inkpot earring hammer
    """,
)


def _noun(item: Item) -> Item:
    noun = item["input"]
    plural = _IRREGULAR_PLURAL.get(noun, with_s(noun))
    article = "an" if noun[0] in _VOWELS and not noun.startswith("uni") else "a"
    return {**item, "plural": plural, "article": article}


NOUNS = Domain(
    "nouns",
    tuple(_noun(item) for item in _NOUNS),
    (
        question(
            "plural",
            "plural",
            """Put this noun into the plural.
               Give the word for more than one of them.
               What is the plural of this noun?
               Change the noun so that it fits after "two".
               Write the plural form of the word.
               Noun -> plural.
               Could you tell me the plural of this word, please?
               I will give you a singular noun; I need the form for two or more.
               What does the noun become when there are ten of them?
               Pluralise this noun, spelling it correctly.""",
            """Turn the noun into its form for several.
               How does the noun read behind "many"?""",
        ),
        question(
            "article",
            "article",
            """Say which article fits: a or an.
               Does this noun take "a" or "an"?
               Choose the indefinite article of the noun.
               Which of "a" and "an" stands before the word?
               Write the right one of a and an.
               Noun -> indefinite article, "a" or "an".
               Could you tell me whether "an" or "a" goes with this word?
               I have a noun here and need its indefinite article.
               Which is correct in front of this noun, "an" or "a"?
               Listen to the first sound of the noun, then decide between "a" and "an".""",
            """Pick the word that precedes the noun, a or an.
               Is the indefinite article here a, or is it an?""",
        ),
        question(
            "kind",
            "kind",
            """Say what the noun names: person, animal, place or thing.
               Is it a person, an animal, a place or a thing?
               Sort the noun: person, animal, place, thing.
               Which kind of noun is it, one for a person, animal, place or thing?
               Does the noun stand for a person, an animal, a place or a thing?
               Noun -> thing, place, animal or person.
               Could you classify this noun as animal, person, thing or place?
               I will give you a noun; I need its category: place, thing, person or animal.
               What does this word refer to: a thing, an animal, a place or a person?
               Label the noun as one of these: animal, thing, place, person.""",
            """Tell if the noun denotes a person, animal, place or thing.
               Person, animal, place, thing: where does the noun belong?""",
        ),
    ),
    (
        alone(
            "three",
            lambda i: f"one {i['input']}, two {i['plural']}",
            """Count to two with this noun.
               Write "one" with the noun, then "two" with its plural.
               Say one of it and two of it, with a comma.
               Count the noun: one, two.
               Show singular and plural by counting.
               Use the noun after one and after two.
               Give the noun with the numbers one and two.
               List one and then two of them.
               Noun -> "one ..., two ...".
               Could you write this noun in the pattern "one cat, two cats"?
               I will give you a noun; I need it counted from one to two, in words.
               How would a child count one and then two of these?""",
            """Demonstrate both numbers of the noun by counting.
               Do a count up to two with the noun.
               Singular after one, plural after two: write both.""",
        ),
    ),
)
