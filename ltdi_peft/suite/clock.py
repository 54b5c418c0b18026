"""Domains of time: times of day and dates."""

from random import Random

from ltdi_peft.suite.design import Domain, Item, alone, drawn, question, words

_PARTS = (
    (6, "night"),
    (12, "morning"),
    (18, "afternoon"),
    (22, "evening"),
    (24, "night"),
)  # each until that hour


def _time(rng: Random) -> Item:
    hour, minute = rng.randrange(24), rng.randrange(60)
    part = next(name for until, name in _PARTS if hour < until)
    half = "am" if hour < 12 else "pm"
    return {
        "input": f"{hour:02d}:{minute:02d}",
        "hour": str(hour),
        "minute": f"{minute:02d}",
        "part": part,
        "half": half,
        "next": f"{(hour + 1) % 24:02d}:{minute:02d}",
        "twelve": f"{(hour - 1) % 12 + 1}:{minute:02d} {half}",
    }


TIMES = Domain(
    "times",
    drawn("times", 240, _time),
    (
        question(
            "part",
            "part",
            """Say which part of the day this is: morning, afternoon, evening or night.
               What part of the day is it at this time?
               Is it morning, afternoon, evening or night?
               Name the time of day in one word, such as morning.
               Which greeting fits the time: morning, afternoon, evening or night?
               Time -> night, morning, afternoon or evening.
               Could you tell me the part of day, for example "evening"?
               Here is a clock time; I need its part of day, such as night.
               What would people call this hour: evening, night, morning or afternoon?
               Classify the time as afternoon, evening, night or morning.""",
            """Tell the portion of the day that the clock shows.
               Into which stretch of the day does the moment fall?""",
        ),
        question(
            "half",
            "half",
            """Say whether this is am or pm.
               Is the time before noon, am, or after noon, pm?
               Which is it, am or pm?
               Choose am or pm for this time.
               Does the time get am or pm?
               Time -> am or pm.
               Could you tell me whether this time is pm or am?
               Here is a 24-hour time; I only need to know if it is am or pm.
               Hours from 12 on are pm, earlier ones am: which is this?
               How would a 12-hour watch mark this time, as pm or as am?""",
            """Tell the half of the day, pm or am.
               Add to the clock what fits: am, pm?""",
        ),
        question(
            "minute",
            "minute",
            """Give the minutes of this time.
               How many minutes past the full hour is it?
               Pick out the minutes.
               What number stands after the colon?
               Name only the minutes of the time.
               Time -> minutes, two digits.
               Could you tell me the minutes, leaving out the hour?
               I will give you a clock time; I need the two digits after the colon.
               What are the last two digits of this time?
               Drop the hour and keep the minutes.""",
            """Extract the right half of the clock's display.
               Where is the long hand, in minutes?""",
        ),
        question(
            "next",
            "next",
            """Give the time one hour later.
               What time is it in one hour?
               Add an hour to the time.
               Move the time on by one hour.
               Which time does the clock show an hour from now?
               Time -> the time plus one hour.
               Could you tell me what time it will be when another hour has passed?
               My train leaves an hour after this time; when is that?
               What is the result if the hour goes up by one, minutes unchanged?
               Set the time an hour ahead, still in 24-hour form.""",
            """Advance the clock by sixty minutes.
               State the moment a full hour after.""",
        ),
    ),
    (
        alone(
            "twelve",
            lambda i: i["twelve"],
            """Write the time with am or pm.
               Turn it into the 12-hour clock.
               Give the time in 12-hour form.
               How would an American write this time?
               Change it from the 24-hour to the 12-hour clock.
               Use am and pm for this time.
               Write it as on a 12-hour watch.
               Convert the time to am or pm notation.
               Time -> 12-hour time, such as "3:05 pm".
               Could you rewrite this time with am or pm behind it?
               I cannot read 24-hour times; I need this one as am or pm time.
               What does this time look like in the style "7:20 am"?""",
            """Restate the moment in the American way.
               Use a dial of twelve hours for the moment.
               Make the display a twelve-hour one.""",
        ),
    ),
)

_MONTHS = words("January February March April May June July August September October November December")
_SEASONS = words("winter winter spring spring spring summer summer summer autumn autumn autumn winter")
_LENGTHS = words("31 28 31 30 31 30 31 31 30 31 30 31")


def _date(rng: Random) -> Item:
    month, year = rng.randrange(12), rng.randint(1950, 2029)
    day = rng.randint(1, int(_LENGTHS[month]))
    return {
        "input": f"{day} {_MONTHS[month]} {year}",
        "day": str(day),
        "month": _MONTHS[month],
        "year": str(year),
        "number": str(month + 1),
        "season": _SEASONS[month],
        "next": _MONTHS[(month + 1) % 12],
        "before": _MONTHS[month - 1],
        "iso": f"{year}-{month + 1:02d}-{day:02d}",
        "slashes": f"{month + 1}/{day}/{year}",
    }


DATES = Domain(
    "dates",
    drawn("dates", 240, _date),
    (
        question(
            "season",
            "season",
            """Say which season this date is in: spring, summer, autumn or winter.
               In what season does the date lie?
               Name the season of the date.
               Is it spring, summer, autumn or winter on this day?
               Which of the four seasons is it?
               Date -> season.
               Could you tell me what season this day falls in, for example autumn?
               I will give you a date; I need its season, winter including December.
               What time of year is it then: summer, winter, autumn or spring?
               Match the date to winter, summer, spring or autumn.""",
            """Tell the quarter of nature's year: spring, summer, autumn, winter.
               What season has somebody with this entry in the calendar?""",
        ),
        question(
            "year",
            "year",
            """Give the year of this date.
               In which year does the date lie?
               Pick out the year.
               What year is it?
               Name only the year of the date.
               Date -> year.
               Could you tell me the year, without day and month?
               I will give you a date; I need the four digits of its year.
               Which year is written in this date?
               Drop the day and the month and keep the year.""",
            """Extract the calendar year.
               State the annual part of the entry.""",
        ),
        question(
            "month",
            "month",
            """Give the month of this date.
               In which month does the date lie?
               Pick out the month.
               What month is it?
               Name only the month of the date.
               Date -> month name.
               Could you tell me the month, without day and year?
               Here is a date; I am only interested in its month, by name.
               Which month is written in this date?
               Drop the day and the year and keep the month.""",
            """Extract the name of the month.
               State the page of the calendar.""",
        ),
        question(
            "next",
            "next",
            """Give the month after the one in this date.
               Which month comes next?
               Name the following month.
               What month is it one month later?
               Which month begins when this one is over?
               Date -> name of the next month.
               Could you tell me which month follows the one given?
               I will give you a date; I need the month that comes right after.
               What will the month be called once this one has ended?
               Skip ahead by one month and say which month that is.""",
            """State the succeeding page of the calendar.
               Go on by a month and name it.""",
        ),
        question(
            "number",
            "number",
            """Give the month of this date as a number.
               Which number does the month have?
               Write the month as a figure from 1 to 12.
               Count from January: what number is the month?
               Turn the month's name into its number.
               Date -> month number.
               Could you tell me the month in figures, such as 4 for April?
               I will give you a date; I need its month as a number without leading zero.
               Which month of the twelve is it, as a figure?
               Replace the name of this month by its numeral, 1 to 12.""",
            """State the month numerically.
               What is the position of the month in the calendar?""",
        ),
    ),
    (
        alone(
            "iso",
            lambda i: i["iso"],
            """Write the date as year-month-day.
               Give the date in ISO form.
               Turn it into the form YYYY-MM-DD.
               Use numbers and hyphens: year, month, day.
               Write it like 2001-02-03.
               Change the date to numbers, the year first.
               Put the date as computers sort it.
               Convert the date to the international standard.
               Date -> YYYY-MM-DD.
               Could you write this date in the style 1999-12-31?
               I have a date and need year, month, day, with hyphens and leading zeros.
               How would a database store this date, with the year first?""",
            """Restate the entry in the ISO 8601 way.
               Numeric, hyphens, year in front.
               Make the entry sortable.""",
        ),
        alone(
            "slashes",
            lambda i: i["slashes"],
            """Write the date with slashes, the month first.
               Give the date in the American way with slashes.
               Turn it into the form month/day/year.
               Use numbers and slashes: month, day, year.
               Write it like 2/3/2001 for February.
               Change the date to numbers split by slashes.
               Put slashes between month, day and year.
               Convert the date to US style.
               Date -> month/day/year.
               Could you write this date in the style 12/31/1999?
               I will give you a date; I need M/D/YYYY, without leading zeros.
               How would an American type this date in figures, with slashes?""",
            """Restate the entry as in the United States.
               Numeric, slashes, month in front.
               Make a slashed American entry of it.""",
        ),
    ),
)
