"""Domain of adjectives: comparison, adverbs, and whether the word is praise or blame."""

from ltdi_peft.suite.design import Domain, Item, alone, grouped, question, words

_ADJECTIVES = grouped(
    "value",
    """
    good: happy kind clever brave honest gentle calm friendly polite bright clean fresh sweet warm soft
    good: smooth lovely
    good: pretty beautiful wonderful excellent pleasant cheerful careful helpful useful faithful graceful
    good: grateful
    good: peaceful playful hopeful joyful successful skilful truthful healthy wealthy lucky funny witty cosy
    good: tidy
    good: merry handsome generous patient loyal wise strong safe rich fair proud nice fine great grand noble
    good: pure
    good: tender charming delicious fantastic brilliant splendid magnificent perfect reliable sensible
    good: amazing
    good: amusing exciting interesting relaxing caring loving talented gifted elegant glorious marvellous
    good: gracious
    good: courageous ambitious confident creative attractive impressive positive comfortable enjoyable
    good: admirable
    good: sincere modest cheery lively sunny jolly keen neat smart honourable thoughtful delightful tasty
    good: tactful
    good: respectful devoted inspiring refreshing
    bad: sad cruel stupid lazy angry greedy selfish rude ugly dirty filthy nasty bitter sour cold rough
    bad: harsh horrible
    bad: terrible awful dreadful painful harmful careless useless hopeless helpless worthless heartless
    bad: tasteless
    bad: fearful shameful hateful hurtful wasteful dangerous poisonous jealous envious furious anxious
    bad: nervous vicious
    bad: evil wicked mean weak poor sick lonely gloomy messy muddy smelly noisy bloody guilty grumpy moody
    bad: clumsy crazy silly foolish childish boring annoying disgusting frightening depressing shocking
    bad: worrying
    bad: broken rotten wretched miserable unhappy unkind unfair unlucky unsafe impatient impolite dishonest
    bad: violent
    bad: hostile brutal fatal tragic toxic chaotic pathetic corrupt arrogant ignorant aggressive destructive
    bad: negative
    bad: offensive expensive stale dull gruesome grim vile hideous dismal
    bad: spiteful ruthless merciless thoughtless tedious bleak tiresome
    """,
)
# These take -er: words of one syllable, and those of two that commonly do.
_SHORT = words(
    """
    clever gentle friendly lovely pretty happy healthy wealthy lucky funny witty cosy tidy tasty merry noble
    lively
    sunny jolly cheery unhappy unlucky angry greedy ugly dirty filthy nasty lonely gloomy messy muddy smelly
    noisy bloody guilty grumpy moody clumsy crazy silly lazy
    kind brave calm bright clean fresh sweet warm soft smooth wise strong safe rich fair proud nice
    fine great grand pure keen neat smart sad rude sour cold rough harsh mean weak poor sick stale dull grim
    vile
    bleak
    """
)


def comparative(word: str) -> str:
    """The comparative: -er for short adjectives, more … for long ones."""
    if word not in _SHORT:
        return f"more {word}"
    if word.endswith("e"):
        return word + "r"
    if word.endswith("y"):
        return word[:-1] + "ier"
    return word + (word[-1] if word in ("sad", "grim") else "") + "er"


def opposite_value(item: Item) -> str:
    """The advice that fits the word: more of a good quality, less of a bad one."""
    return "keep" if item["value"] == "good" else "avoid"


ADJECTIVES = Domain(
    "adjectives",
    _ADJECTIVES,
    (
        question(
            "value",
            "value",
            """Say whether this word is good or bad.
               Is it good or bad to be called this?
               Does the word praise or blame? Good for praise, bad for blame.
               Judge the quality: good or bad.
               Which is the quality named here, good or bad?
               Adjective -> good or bad.
               Could you tell me whether this quality counts as good or as bad?
               I will give you an adjective; I need its value, good or bad.
               Positive words are good, negative ones bad: which is this?
               How does the word sound to most people, good or bad?""",
            """Would one like to have this trait: good, else bad.
               Tell good words from bad ones.""",
        ),
        question(
            "comparative",
            lambda i: comparative(i["input"]),
            """Give the comparative of this adjective.
               Put the adjective into the form that comes before "than".
               What is the comparative form of this word?
               Change the adjective so that it compares two things.
               Write the word in the comparative degree.
               Adjective -> comparative.
               Could you tell me the comparative of this word, please?
               I have an adjective here and need it with -er or "more".
               What form says that one person has more of it than another?
               Raise the adjective from the positive to the comparative.""",
            """Turn the adjective into its next higher degree.
               How does the adjective read in front of "than"?""",
        ),
        question(
            "very",
            lambda i: f"very {i['input']}",
            """Make this adjective stronger with "very".
               Intensify the word with "very".
               Give the adjective together with "very".
               Add the word that makes the adjective stronger: very.
               Write the adjective in a stronger way, using very.
               Adjective -> "very" plus the adjective.
               Could you put "very" before this word?
               I will give you an adjective; I need it with "very" in front.
               What do you get when "very" is placed ahead of the word?
               Build a phrase of two parts: "very", then the adjective.""",
            """Boost the adjective by means of "very".
               Increase the force of the adjective with very.""",
        ),
        question(
            "advice",
            opposite_value,
            """Say whether to keep or avoid this quality.
               Advise a friend about the trait: keep or avoid.
               Should one keep this trait or avoid it?
               Give the right advice for the word, keep or avoid.
               Choose between keep and avoid for this quality.
               Quality -> avoid or keep.
               Could you tell me if this trait is one to avoid or to keep?
               I have this quality; should I avoid it or keep it?
               Good traits we keep, bad ones we avoid: which verb applies here?
               What would a teacher recommend for this quality, "avoid" or "keep"?""",
            """Counsel somebody on the trait: keep it or avoid it.
               Which is wiser with such a trait, keep or avoid?""",
        ),
    ),
    (
        alone(
            "than",
            lambda i: f"{comparative(i['input'])} than you",
            """Compare with "you": comparative and "than you".
               Say that someone is it to a higher degree than you.
               Write the comparative followed by "than you".
               Make a comparison that ends in "than you".
               Use the adjective to compare with you.
               Put the adjective into a comparison with you.
               Form the higher degree and add "than you".
               Complete a comparison with you from the adjective.
               Adjective -> comparative, then "than you".
               Could you write the comparative and after it the words "than you"?
               I will give you an adjective; I need a phrase such as "taller than you".
               How do you tell someone that a person has more of it "than you"?""",
            """Draw a comparison to you by the adjective.
               Place the higher degree before "than you".
               State that it exceeds you in the quality.""",
        ),
    ),
)
