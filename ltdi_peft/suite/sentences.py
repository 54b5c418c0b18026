"""Domains of whole sentences: reviews (sentiment), purchases (extraction)."""

from random import Random

from ltdi_peft.suite.design import Domain, Item, alone, drawn, question, words

NAMES = {
    "he": """Adam Ben Carl David Eric Frank George Henry Ivan Jack Kevin Leo Mark Noah Oscar Paul Robert Sam
             Tom Victor""",
    "she": """Anna Bella Clara Diana Emma Fiona Grace Helen Iris Julia Kate Laura Maria Nina Olivia Paula Rosa
              Sarah Tina Vera""",
}
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
CITIES = words(
    "Paris London Berlin Rome Madrid Vienna Oslo Dublin Prague Athens Lisbon Moscow Cairo Tokyo Boston"
)

_REVIEWED = {
    "food": words("soup pizza steak salad cake curry sandwich"),
    "travel": words("hotel flight cruise beach airport tour hostel"),
    "art": words("film novel concert painting play opera album"),
    "technology": words("phone laptop camera printer tablet headset app"),
}
_OPINIONS = {
    "positive": words(
        "wonderful great excellent lovely superb amazing brilliant perfect delightful fantastic pleasant"
    ),
    "negative": words(
        "awful terrible bad dreadful horrible boring poor disappointing annoying disgusting useless"
    ),
}
_REVIEW_FRAMES = (
    "The {thing} was {opinion}.",
    "What a {opinion} {thing} it was.",
    "I found the {thing} {opinion}.",
    "We thought the {thing} was really {opinion}.",
    "My sister called the {thing} {opinion}.",
)


def _review(rng: Random) -> Item:
    topic = rng.choice(sorted(_REVIEWED))
    sentiment = rng.choice(sorted(_OPINIONS))
    thing, opinion = rng.choice(_REVIEWED[topic]), rng.choice(_OPINIONS[sentiment])
    text = rng.choice(_REVIEW_FRAMES).format(thing=thing, opinion=opinion)
    text = text.replace("What a a", "What an a").replace("What a e", "What an e")
    return {"input": text, "topic": topic, "sentiment": sentiment, "thing": thing, "opinion": opinion}


REVIEWS = Domain(
    "reviews",
    drawn("reviews", 240, _review),
    (
        question(
            "sentiment",
            "sentiment",
            """Say whether this review is positive or negative.
               Is the review positive or negative?
               Judge the mood of the review: positive, negative.
               Did the writer like it? Positive if so, else negative.
               What is the sentiment of this review?""",
            """Tell if the opinion is a positive or a negative one.
               Which feeling does the comment show, positive or negative?""",
        ),
        question(
            "thing",
            "thing",
            """Name the thing this review is about.
               What does the review talk about?
               Pick out the thing that was judged.
               Which thing did the writer review?
               Find the noun that the opinion is about.""",
            """On what object does the comment give an opinion?
               Extract whatever was rated.""",
        ),
        question(
            "opinion",
            "opinion",
            """Copy the adjective of this review.
               Which adjective does the review use?
               Pick out the word that judges the thing.
               What word shows the writer's opinion?
               Find the describing word in the review.""",
            """Extract the word that carries the verdict.
               By which adjective is it rated?""",
        ),
        question(
            "topic",
            "topic",
            """Say what field this review belongs to: food, travel, art or technology.
               What is the topic of the review?
               Is the review about food, travel, art or technology?
               Choose the section of the paper for this review.
               Sort the review by topic.""",
            """Under which heading does the comment go: food, travel, art, technology?
               Tell the subject area of the comment.""",
        ),
    ),
    (
        alone(
            "summary",
            lambda i: f"{i['thing']}: {i['opinion']}",
            """Sum the review up as thing, colon, adjective.
               Write a two-word summary with a colon.
               Shorten the review to thing: opinion.
               Give the thing, a colon and the judgement.
               Make a headline of noun, colon, adjective.
               Reduce the review to its noun and adjective, with a colon.
               Note the thing and, after a colon, how it was.
               Compress the review into noun: adjective.""",
            """Boil the comment down to object, colon, verdict.
               Object and verdict, split by a colon.
               Make a telegram of the comment: noun, colon, adjective.""",
        ),
    ),
)

_GOODS = words(
    "bread milk apples cheese flowers shoes tickets books paper soap rice tea coffee pens gloves stamps"
)
_VERBS = words("bought sold found lost ordered carried stole wanted")
_PURCHASE_FRAMES = (
    "{name} {verb} {goods} in {city} on {day}.",
    "On {day}, {name} {verb} {goods} in {city}.",
    "In {city}, {name} {verb} {goods} on {day}.",
)


def _purchase(rng: Random) -> Item:
    pronoun = rng.choice(sorted(NAMES))
    slots = {
        "name": rng.choice(words(NAMES[pronoun])),
        "verb": rng.choice(_VERBS),
        "goods": rng.choice(_GOODS),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    return {"input": rng.choice(_PURCHASE_FRAMES).format(**slots), "pronoun": pronoun, **slots}


PURCHASES = Domain(
    "purchases",
    drawn("purchases", 240, _purchase),
    (
        question(
            "name",
            "name",
            """Name the person in this sentence.
               Who is the sentence about?
               Pick out the person's name.
               Which person did something here?
               Find the name of the one who acts.""",
            """Extract the one individual that is mentioned.
               Whom does this report tell of?""",
        ),
        question(
            "place",
            "city",
            """Name the city in this sentence.
               Where does the sentence take place?
               Pick out the name of the place.
               In which city did it happen?
               Find the place that is mentioned.""",
            """Extract the location.
               At what spot on the map is this report set?""",
        ),
        question(
            "day",
            "day",
            """Name the day of the week in this sentence.
               When did it happen?
               Pick out the day.
               On which day did the person do it?
               Find the weekday that is mentioned.""",
            """Extract the time of the event.
               What weekday does this report give?""",
        ),
        question(
            "goods",
            "goods",
            """Name the goods in this sentence.
               What things does the sentence mention?
               Pick out the goods.
               Which object does the verb of the sentence have?
               Find the things that the person dealt with.""",
            """Extract the wares.
               Which items does this report speak of?""",
        ),
        question(
            "pronoun",
            "pronoun",
            """Say which pronoun fits the person, he or she.
               Is the person a "he" or a "she"?
               Choose the pronoun for the person's name.
               Which pronoun could replace the name?
               Would you say he or she of this person?""",
            """Pick he or she for the individual mentioned.
               How does one refer back to the individual, he or she?""",
        ),
    ),
    (
        alone(
            "telegram",
            lambda i: f"{i['name']} {i['verb']} {i['goods']}",
            """Leave out the place and the day.
               Shorten the sentence to who did what.
               Keep only the person, the verb and the goods.
               Drop place and day from the sentence.
               Reduce the sentence to three words.
               Tell in three words who did what.
               Write subject, verb and object only.
               Cut away where and when.""",
            """Condense the report: actor, action, wares.
               Strip the report of its location and time.
               A telegram of three words, please.""",
        ),
        alone(
            "logbook",
            lambda i: f"{i['day']}: {i['name']}, {i['city']}",
            """Write a log entry: day, colon, name, comma, city.
               Give the day, a colon, the person, a comma and the place.
               Make an entry with day first, then name and city.
               Note day: name, city.
               Enter it in a diary as day, person and place.
               List the day, then who and where.
               Record when, who and where, in this order.
               Put it into the form day: person, city.""",
            """Produce a register line: weekday, individual, location.
               Log the report with the weekday in front.
               When, colon, who, comma, where.""",
        ),
    ),
)
