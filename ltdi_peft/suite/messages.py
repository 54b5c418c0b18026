"""Domains of register and subject: messages (formal or not, what is wanted) and news (topic, place, day)."""

from random import Random

from ltdi_peft.suite.design import Domain, Item, alone, drawn, phrases, question, words
from ltdi_peft.suite.sentences import CITIES, DAYS

_ACTIONS = words("send bring lend show sell give fetch mail")
_OBJECTS = words("report book photo key ticket letter map form laptop contract")
_STYLES = {
    "formal": (
        "Dear {who}, would you kindly {action} me the {object}?",
        "Dear {who}, I kindly ask you to {action} me the {object}.",
        "Dear {who}, I would be grateful if you could {action} me the {object}.",
    ),
    "informal": (
        "Hey {who}, can u {action} me the {object}?",
        "Yo {who}, just {action} me the {object}, ok.",
        "Hi {who}, gonna {action} me the {object}?",
    ),
}
_PEOPLE = {
    "formal": {
        "man": phrases("Mr Brown, Mr Clark, Mr Young, Sir, Mr Wood"),
        "woman": phrases("Mrs Green, Ms White, Madam, Mrs King, Ms Bell"),
    },
    "informal": {
        "man": phrases("bro, Tom, dad, Ben, Jack"),
        "woman": phrases("sis, Kate, mum, Anna, Lucy"),
    },
}


def _message(rng: Random) -> Item:
    style, gender = rng.choice(("formal", "informal")), rng.choice(("man", "woman"))
    who = rng.choice(_PEOPLE[style][gender])
    slots = {"who": who, "action": rng.choice(_ACTIONS), "object": rng.choice(_OBJECTS)}
    text = rng.choice(_STYLES[style]).format(**slots)
    kind = "question" if text.endswith("?") else "statement"
    return {"input": text, "style": style, "kind": kind, "gender": gender, **slots}


MESSAGES = Domain(
    "messages",
    drawn("messages", 240, _message),
    (
        question(
            "style",
            "style",
            """Say whether this message is formal or informal.
               Is the style of the message formal or informal?
               Judge the tone of the message: formal, informal.
               Which register does the writer use, formal or informal?
               Does it sound formal or informal?
               Formal or informal message?
               Message -> formal / informal.
               Could you tell me if the wording is formal or informal?
               Polite business style is formal, casual chat is informal; which do you see?
               Label the message by its register, either informal or formal.""",
            """Tell a formal letter from an informal one here.
               How stiff is the text: formal, or informal?""",
        ),
        question(
            "object",
            "object",
            """Name the thing that the writer wants.
               What does the message ask for?
               Pick out the thing that is wanted.
               Which thing should the reader hand over?
               Find the object of the request.
               Message -> the object requested, as one noun.
               Please tell me which thing is being asked for.
               I need the noun for the item wanted in the message.
               Requested object only.
               What does the writer hope to get?""",
            """Extract what the sender is after.
               Which item does the text request?""",
        ),
        question(
            "action",
            "action",
            """Name the verb for what the reader should do.
               What is the reader asked to do? One verb.
               Pick out the verb of the request.
               Which action does the message ask for?
               Find the verb before "me".
               Message -> the verb of what is to be done.
               Could you tell me what the reader should do, using just the verb?
               Requested action as a single verb.
               I need the one verb that says how the reader should help.
               Send, bring, lend or some other verb: what does the writer request?""",
            """Extract the deed that the sender asks for.
               By which verb is the request made?""",
        ),
        question(
            "reader",
            "who",
            """Name the person the message is written to.
               Who is addressed in the message?
               Pick out the reader's name or title.
               To whom is this message?
               Find the words after the greeting.
               Message -> the person greeted at the start.
               Could you tell me who the writer is talking to?
               Name or title of the reader, as used in the greeting.
               I want to know who should receive this message.
               Whom does the writer greet?""",
            """Extract the addressee.
               Who will open the text?""",
        ),
        question(
            "gender",
            "gender",
            """Say whether the reader is a man or a woman.
               Is the message to a man or to a woman?
               Does the greeting name a man or a woman?
               Which is the person addressed, man or woman?
               Judge by the greeting: man or woman.
               Message -> man / woman, going by the person greeted.
               Is the recipient male or female, that is, man or woman?
               Man or woman: to which is the message addressed?
               Please work out the gender of the reader and answer with man or woman.
               If the reader is male, write man; if female, write woman.""",
            """Tell if the addressee is a man or a woman.
               A man or a woman, who gets the text?""",
        ),
    ),
    (
        alone(
            "order",
            lambda i: f"{i['action']} the {i['object']}",
            """Turn the message into a bare order.
               Say it in three words, verb first.
               Cut the message down to verb, "the", thing.
               Make a short command of the request.
               Drop all politeness and keep verb and thing.
               Write the request as a note of three words.
               What is to be done? Verb, "the", thing.
               Reduce the request to its core.
               Message -> verb + "the" + object.
               Could you rewrite the message as a blunt command of three words?
               Strip out greeting and courtesy, leaving the verb, "the" and the object.
               Just the task, please: an imperative verb, "the" and the noun.""",
            """Boil the text down to a to-do entry.
               Command it without any greeting.
               Verb and item joined by "the".""",
        ),
    ),
)

_TOPICS = {
    "sport": phrases(
        "The team won the cup, A runner broke the record, The goalkeeper was hurt, Two boxers met"
    ),
    "weather": phrases(
        "Heavy rain fell, A storm blew down trees, Thick fog lay on the roads, It snowed all night"
    ),
    "money": phrases("The bank raised its rates, Share prices fell, Rents went up, A company cut its costs"),
    "health": phrases(
        "A new clinic opened, Many people caught flu, Doctors tested a vaccine, Nurses asked for rest"
    ),
    "music": phrases(
        "A choir gave a concert, The band played new songs, A pianist won a prize, The opera was full"
    ),
    "crime": phrases(
        "Thieves robbed a shop, A man was arrested, Police caught a burglar, Two cars were stolen"
    ),
}


def _news(rng: Random) -> Item:
    topic, city, day = rng.choice(sorted(_TOPICS)), rng.choice(CITIES), rng.choice(DAYS)
    text = rng.choice(("{event} in {city} on {day}.", "{event} on {day} in {city}.")).format(
        event=rng.choice(_TOPICS[topic]), city=city, day=day
    )
    last = words(text.rstrip("."))[-1]
    return {"input": text, "topic": topic, "city": city, "day": day, "last": last}


NEWS = Domain(
    "news",
    drawn("news", 240, _news),
    (
        question(
            "topic",
            "topic",
            """Say what this news is about: sport, weather, money, health, music or crime.
               What is the topic of the news?
               Which page of the newspaper does it belong on?
               Sort the news by topic.
               Name the section for this piece of news.
               News -> sport, weather, money, health, music or crime.
               Could you tell me which category fits: sport, weather, money, health, music, crime?
               Choose one subject for the story: crime, health, money, music, sport, weather.
               What kind of event is reported, music, crime, sport, money, weather or health?
               Classify the news in one word, for instance health or crime.""",
            """Under which heading would an editor file the item?
               Tell the subject of the headline.""",
        ),
        question(
            "city",
            "city",
            """Name the city of this news.
               Where did the news happen?
               Pick out the city from the news.
               From which city is this piece of news?
               Find the place in the news.
               News -> city.
               Could you tell me in which city this took place?
               City mentioned in the story, please.
               I want to know where the event was; give the city.
               Which city does the reporter speak of?""",
            """Extract the town of the headline.
               What town is the item from?""",
        ),
        question(
            "day",
            "day",
            """Name the day of this news.
               When did the news happen?
               Pick out the day from the news.
               From which day is this piece of news?
               Find the weekday in the news.
               News -> day of the week.
               Please tell me on which day this took place.
               Weekday mentioned in the story.
               I want to know when the event was; give the day.
               Monday, Tuesday or which other day does the reporter mention?""",
            """Extract the weekday of the headline.
               What weekday is the item from?""",
        ),
        question(
            "last",
            "last",
            """Copy the last word of this news.
               Which word does the news end with?
               Pick out the final word, without the full stop.
               What is the last word of the sentence?
               Find the word right before the full stop.
               News -> its final word.
               Could you write down the word the news finishes on?
               Last word only, without punctuation.
               Look at the end of the news and return the word you find there.
               I just need whichever word comes last, minus the full stop.""",
            """Extract the closing word of the headline.
               At which word does the item stop?""",
        ),
    ),
)
