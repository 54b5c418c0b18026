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
               What is the sentiment of this review?
               Review -> positive / negative.
               Could you tell me whether the writer was happy, positive for yes, negative for no?
               Thumbs up is positive and thumbs down is negative; which one is given here?
               Classify the review by its attitude, negative or positive.
               Praise counts as positive, criticism as negative; which is this?""",
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
               Find the noun that the opinion is about.
               Review -> the thing reviewed.
               Could you tell me what the writer is judging, in one noun?
               What exactly got praised or criticised here?
               I need to know which thing the writer has tried out.
               Item under review, as a single noun.""",
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
               Find the describing word in the review.
               Review -> its adjective.
               Could you copy the word that praises or criticises?
               How does the writer find the thing, in one adjective?
               I need the adjective, exactly as written in the review.
               Judging word only, such as awful or lovely.""",
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
               Sort the review by topic.
               Review -> food, travel, art or technology.
               Could you put the review in a category: art, food, technology or travel?
               Technology, art, travel, food: which area does the reviewed thing belong to?
               Choose one field for what is reviewed, travel or technology, food or art.
               What sort of thing is judged, something from art, food, travel or technology?""",
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
               Compress the review into noun: adjective.
               Review -> thing: adjective.
               Could you condense the review to its noun, a colon and its adjective?
               I need two words: what was reviewed, then after a colon the adjective.
               Only noun and adjective, the noun first and a colon behind it.""",
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
               Find the name of the one who acts.
               Sentence -> the person's name.
               Could you tell me who did this?
               Just the name of the man or woman mentioned.
               I would like to know whose action is described; write the name.
               Name of the doer, please.""",
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
               Find the place that is mentioned.
               Sentence -> city.
               Could you tell me where this happened?
               Which city was the person in?
               I need the city name that comes up in the sentence.
               Place of the action, please.""",
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
               Find the weekday that is mentioned.
               Sentence -> day of the week.
               Could you tell me which day this was?
               Monday, Tuesday or another day: when was it?
               I need the weekday that comes up in the sentence.
               Day of the action, please.""",
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
               Find the things that the person dealt with.
               Sentence -> the goods.
               Could you tell me what was bought, sold, lost or the like?
               Object of the sentence, as one noun.
               I need the word for the things involved.
               Which goods is the sentence about?""",
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
               Would you say he or she of this person?
               Sentence -> he / she.
               Could you tell me whether to write he or she about this person?
               For a male name write he, for a female name write she.
               She or he, which one suits the name in the sentence?
               If I did not want to use the name again, which pronoun would I take?""",
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
               Cut away where and when.
               Sentence -> name verb goods.
               Could you give me the sentence without city and weekday?
               Who, what action, which goods: three words in a row, nothing more.
               I do not care where or when; write the rest of the sentence.""",
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
               Put it into the form day: person, city.
               Sentence -> day: name, city.
               Could you turn this into a log line with day, colon, name, comma, city?
               Start with the weekday and a colon, then add person and city with a comma.
               I keep a diary in the style day: name, place; write the entry.""",
            """Produce a register line: weekday, individual, location.
               Log the report with the weekday in front.
               When, colon, who, comma, where.""",
        ),
    ),
)
