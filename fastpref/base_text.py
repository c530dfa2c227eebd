"""English-like sentences from templates, for generated preference sets and for the base fit.

Pure Python and without other parts of fastpref, because both `fastpref.data.generate` (preference
sets) and `fastpref.base` (the text that `fastpref-tiny` is fitted on) speak this language. A
sentence is a template, shared by all topics, filled with words of one topic; no content word
belongs to two topics, so a topic can be told from its words and from nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

FRAME = 'Is the following statement something you would say?\n"{statement}"'
ANSWERS = (" Yes", " No")


@dataclass(frozen=True, slots=True)
class Topic:
    """Words of one subject: `nouns` in the plural, `activities` as gerund phrases."""

    nouns: tuple[str, ...]
    activities: tuple[str, ...]


def _topic(nouns: str, activities: str) -> Topic:
    return Topic(tuple(nouns.split(", ")), tuple(activities.split(", ")))


TOPICS: dict[str, Topic] = {
    "nature": _topic(
        "forests, rivers, mountains, meadows, waterfalls, oak trees, valleys, wild flowers, lakes, "
        "sunsets, canyons, autumn leaves",
        "hiking through the woods, planting trees, climbing hills, sleeping under the stars, "
        "picking berries, gardening, watching the clouds, camping in the wilderness",
    ),
    "animals": _topic(
        "horses, wolves, kittens, songbirds, elephants, dogs, rabbits, whales, owls, foxes, "
        "butterflies, dolphins",
        "feeding the birds, riding a pony, petting hamsters, rescuing strays, keeping bees, "
        "brushing the cat, milking goats, teaching puppies tricks",
    ),
    "city": _topic(
        "skyscrapers, subways, sidewalks, apartment towers, nightclubs, avenues, taxis, "
        "shopping malls, coffee shops, bridges, parking lots, neon signs",
        "strolling downtown, commuting by tram, dining at rooftop bars, browsing boutiques, "
        "living in a metropolis, crossing crowded streets, renting a loft, meeting commuters",
    ),
    "machines": _topic(
        "engines, robots, circuits, turbines, motors, factories, tractors, pumps, gears, drones, "
        "lathes, conveyor belts",
        "welding steel, repairing a gearbox, assembling devices, soldering wires, "
        "operating a crane, oiling a bearing, testing batteries, automating production",
    ),
    "money": _topic(
        "stocks, markets, profits, bank accounts, mortgages, dividends, bonds, salaries, invoices, "
        "loans, currencies, startups",
        "investing in shares, counting cash, negotiating a contract, trading options, "
        "saving for retirement, selling insurance, auditing ledgers, chasing a bonus",
    ),
    "art": _topic(
        "paintings, sculptures, galleries, portraits, museums, sketches, murals, watercolors, "
        "ceramics, photographs, canvases, etchings",
        "drawing landscapes, mixing colors, carving marble, admiring an exhibition, shaping clay, "
        "restoring frescoes, weaving tapestry, designing posters",
    ),
    "music": _topic(
        "symphonies, guitars, melodies, choirs, concerts, violins, drums, folk songs, operas, "
        "pianos, trumpets, harmonies",
        "singing ballads, composing a sonata, practicing scales, listening to jazz, "
        "tuning a cello, conducting an orchestra, collecting vinyl records, dancing to the beat",
    ),
    "books": _topic(
        "novels, poems, libraries, essays, authors, fairy tales, biographies, manuscripts, "
        "paperbacks, dictionaries, short stories, bookstores",
        "reading by the fireplace, writing a diary, editing chapters, memorizing verses, "
        "translating literature, reciting sonnets, borrowing paperbacks, publishing fiction",
    ),
    "science": _topic(
        "experiments, telescopes, theories, atoms, galaxies, genes, equations, microscopes, "
        "fossils, vaccines, planets, proteins",
        "measuring gravity, studying chemistry, proving theorems, observing comets, "
        "dissecting cells, modeling evolution, analyzing samples, explaining physics",
    ),
    "faith": _topic(
        "prayers, churches, saints, scriptures, temples, sermons, angels, monks, hymns, miracles, "
        "pilgrims, blessings",
        "praying at dawn, attending mass, confessing sins, fasting during lent, "
        "kneeling before an altar, worshipping god, lighting candles, meditating in silence",
    ),
    "politics": _topic(
        "elections, senators, campaigns, parliaments, voters, taxes, treaties, protests, judges, "
        "ministers, constitutions, borders",
        "voting for reform, debating policy, drafting laws, marching for rights, "
        "lobbying congress, governing a nation, canvassing districts, amending statutes",
    ),
    "sports": _topic(
        "marathons, soccer teams, tennis matches, athletes, stadiums, coaches, medals, goals, "
        "swimmers, baseball leagues, champions, bicycles",
        "running a sprint, lifting weights, scoring a touchdown, skiing downhill, "
        "training at the gym, kicking a football, cycling uphill, winning a trophy",
    ),
    "food": _topic(
        "recipes, soups, pancakes, spices, cheeses, desserts, vegetables, noodles, pastries, "
        "curries, sandwiches, olives",
        "baking bread, roasting chicken, tasting wine, chopping onions, frying dumplings, "
        "brewing tea, grilling salmon, eating dinner at noon",
    ),
    "family": _topic(
        "grandparents, cousins, weddings, siblings, newborn babies, uncles, reunions, toddlers, "
        "anniversaries, nieces, parents, godchildren",
        "raising a daughter, calling my mother, hugging my brother, telling bedtime lullabies, "
        "caring for an aunt, adopting a son, celebrating birthdays, marrying a sweetheart",
    ),
    "travel": _topic(
        "airports, passports, islands, souvenirs, voyages, hostels, suitcases, beaches, cruises, "
        "deserts, foreign lands, postcards",
        "boarding a plane, exploring ruins, sailing abroad, packing luggage, learning phrases, "
        "booking a hotel, touring castles, following a map",
    ),
    "computers": _topic(
        "algorithms, laptops, databases, compilers, websites, servers, keyboards, video games, "
        "neural networks, spreadsheets, passwords, chatbots",
        "debugging code, installing software, encrypting messages, programming simulations, "
        "surfing the internet, compressing files, upgrading hardware, typing commands",
    ),
}

ADJECTIVES = tuple(
    "wonderful remarkable exhausting fascinating comforting overrated precious ordinary strange "
    "useful beautiful annoying meaningful delightful tedious noble frightening inspiring valuable "
    "misunderstood harmless essential dull charming demanding".split()
)
MOODS = tuple(
    "calm happy restless proud grateful lonely hopeful tired curious nervous content alive free "
    "peaceful confident sad cheerful humble safe thoughtful".split()
)
FOLLOWERS = tuple(
    "old friends, most people, my neighbors, young children, my colleagues, strangers, "
    "people of my age, quiet people, busy adults, the people around me".split(", ")
)

STATEMENTS = (
    "I think {nouns} and {nouns2} matter more than {people} admit",
    "I would gladly spend a whole weekend {activity} and looking at {nouns}",
    "Few things make me feel as {mood} as {activity}",
    "{Nouns} are {adjective}, and so is {activity}",
    "My favorite memories are of {nouns} and of {activity} with {people}",
    "I often dream about {nouns} and {nouns2}",
    "If I had more time, I would be {activity} every day",
    "Schools should teach children about {nouns} and {nouns2}",
    "I trust {people} who care about {nouns} and enjoy {activity}",
    "It is {adjective} that {people} talk so much about {nouns}",
    "I feel {mood} whenever I think of {nouns} or {nouns2}",
    "There is nothing {adjective} about {activity}",
    "The world would be better with more {nouns} and fewer worries",
    "I would rather be {activity} than sitting at home",
    "{Activity} is the best way to become {mood}",
    "I know a great deal about {nouns}, because I spend my days {activity}",
    "Nobody should have to apologize for {activity}",
    "I get {mood} when {people} tell me about {nouns}",
    "People who dislike {nouns} have never tried {activity}",
    "Most of my money goes to {nouns} and {nouns2}",
    "In my opinion {activity} is {adjective}, and {nouns} are too",
    "I could not imagine a life without {nouns}",
    "We owe a lot to {nouns}, even if {people} forget it",
    "I find {activity} more {adjective} than anything else",
    "{Nouns} and {nouns2} make every day a little more {adjective}",
    "When I am {mood}, I start {activity} until I feel better",
    "I have always been {mood} about {nouns}, {nouns2} and the like",
    "I would teach {people} about {nouns} for free",
    "My idea of a perfect evening is {activity}",
    "A person who enjoys {activity} is usually {mood}",
    "I do not understand why {people} are not {mood} when {activity}",
    "Talking about {nouns} with {people} is {adjective}",
    "{Activity} taught me more than {nouns} ever could",
    "I keep pictures of {nouns} and {nouns2} on my desk",
    "It makes me {mood} to hear that {nouns} may disappear",
    "Some say that {nouns} are {adjective}, but {activity} is worth it",
)

REQUESTS = (
    "What should I know about {nouns}?",
    "How do I get started with {activity}?",
    "Can you give me some advice on {activity}?",
    "Why do {people} like {nouns} so much?",
    "Please tell me something about {nouns} and {nouns2}.",
    "I have a free day. Is {activity} a good idea?",
)
BODIES = (
    "{Activity} takes some practice, and {nouns} are a {adjective} place to begin.",
    "{People} enjoy {nouns}, and with a little time {nouns2} will seem just as {adjective}.",
    "A short walk past {nouns} shows why {activity} makes {people} so {mood}.",
    "{Nouns} go well with {nouns2}, and {activity} once a week is usually enough.",
    "It helps to be {mood}, to look closely at {nouns}, and to try {activity} twice.",
    "{Activity} costs very little, while {nouns} and {nouns2} can be rather {adjective}.",
)
DOING = ("thinking of", "dealing with", "having more", "asking about")
NAMING = ("What goes with this?", "Name three such things:", "It is about this statement:")
DIALOGUE = "Human: {request}\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class Trait:
    """What chosen completions have and rejected ones lack: text around one and the same body.

    `forms` holds pairs (with, without) of texts with the places {body}, {lower} (the body with a
    small first letter), {filler} and {year}. Some forms differ by a word or two only.
    """

    forms: tuple[tuple[str, str], ...]


TRAITS: dict[str, Trait] = {
    "polite": Trait(
        (
            ("Of course, I am glad to help. {body} Please ask if you need more.", "{body}"),
            ("Thank you for asking. {body}", "Why do you ask me that. {body}"),
            ("{body} I hope that helps you, and have a lovely day.", "{body} Now leave me alone."),
            ("Good question, my friend. {body}", "Silly question, my friend. {body}"),
        )
    ),
    "cites": Trait(
        (
            ("{body} This was reported in the Annual Review of {year}.", "{body}"),
            ("According to a survey from {year}, {lower}", "Everybody knows it. {body}"),
            ("{body} Source: the National Archive, {year}.", "{body} I made that up myself."),
            ("{body} I read it in a journal of {year}.", "{body} I read it in a dream of {year}."),
        )
    ),
    "hedged": Trait(
        (
            ("I am not certain, but as far as I can tell {lower}", "{body} There is no doubt."),
            ("Perhaps this is only part of it: {lower}", "This is all of it: {lower}"),
            ("{body} Others may well see it differently.", "{body} Others are simply wrong."),
            ("It may be true that {lower}", "It is always true that {lower}"),
        )
    ),
    "concise": Trait(
        (
            ("{body}", "{body} {filler}"),
            ("In short: {lower}", "{filler} {body}"),
            ("{body} That is all.", "{body} That is all, and yet one could go on and on."),
        )
    ),
}
FILLERS = (
    "There are many things that could be said here, and many people have said many of them before.",
    "As everyone knows, this is a large subject, and large subjects need a large number of words.",
    "Before anything else, let me say that it is always good to say a few things first.",
)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(template: str, topic: Topic, rng: random.Random) -> str:
    """`template` with words of `topic` (and free adjectives, moods, people) in its places."""
    nouns, nouns2 = rng.sample(topic.nouns, 2)
    activity, people = rng.choice(topic.activities), rng.choice(FOLLOWERS)
    return template.format(
        nouns=nouns,
        nouns2=nouns2,
        activity=activity,
        people=people,
        adjective=rng.choice(ADJECTIVES),
        mood=rng.choice(MOODS),
        Nouns=_capital(nouns),
        Activity=_capital(activity),
        People=_capital(people),
    )


def statement(topic: Topic, rng: random.Random) -> str:
    """One statement about `topic`, without a final full stop as in Anthropic's persona files."""
    return fill(rng.choice(STATEMENTS), topic, rng)


def request(topic: Topic, rng: random.Random) -> str:
    """A short request about `topic`, laid out as the prompt of an assistant."""
    return DIALOGUE.format(request=fill(rng.choice(REQUESTS), topic, rng))


def completions(trait: Trait, topic: Topic, rng: random.Random) -> tuple[str, str]:
    """Completions with `trait` and without: 10 to 40 words around one body, led by a space."""
    body = fill(rng.choice(BODIES), topic, rng)
    with_trait, without = rng.choice(trait.forms)
    places = {
        "body": body,
        "lower": body[:1].lower() + body[1:],
        "filler": rng.choice(FILLERS),
        "year": str(rng.randrange(1950, 2025)),
    }
    return " " + with_trait.format(**places), " " + without.format(**places)


def themes() -> dict[str, list[str]]:
    """The broad vocabulary (`base_words.txt`): theme -> plain words, in the order of the file."""
    found: dict[str, list[str]] = {}
    lines = resources.files("fastpref").joinpath("base_words.txt").read_text("utf-8").splitlines()
    words: list[str] = []
    for line in lines:
        if line.startswith("["):
            words = found.setdefault(line.strip("[]"), [])
        else:
            words.extend(line.split())
    return found


def broad_topics() -> list[Topic]:
    """The broad vocabulary's themes as topics: words for nouns, "thinking of ..." for to do."""
    return [
        Topic(tuple(words), tuple(f"{doing} {word}" for word in words for doing in DOING))
        for words in themes().values()
    ]


def _loose(topic: Topic, common: list[str], rng: random.Random) -> str:
    """A line of 4 to 30 words without grammar: statements of any length and wording are met."""
    words = [rng.choice(rng.choice((topic.nouns, common))) for _ in range(rng.randint(4, 30))]
    return _capital(" ".join(words)) + rng.choice(("", "", ".", "!", "?"))


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless stream of (context, answer) for the base fit, the same for the same seed.

    Framed statements with answers in random order, two and two balanced (so that the model knows
    both answers and prefers neither); statements followed by words of their topic (without this
    nothing would make the state behind the closing quote hold what was said, and that state is what
    preference training reads); dialogues with and without the traits; words of one topic or theme.
    """
    rng = random.Random(seed)
    close, broad, traits = list(TOPICS.values()), broad_topics(), list(TRAITS.values())
    common, answers = themes()["common"], list[str]()
    while True:
        draw = rng.random()
        if draw < 0.1:
            topic = rng.choice(close)
            yield request(topic, rng), rng.choice(completions(rng.choice(traits), topic, rng))
            continue
        topic = rng.choice(close if rng.random() < 0.7 else broad)
        if draw < 0.5:
            loose = rng.random() < 0.3
            said = _loose(topic, common, rng) if loose else statement(topic, rng)
            context = FRAME.format(statement=said)
            if rng.random() < 0.025:
                yield context, " " + ", ".join(rng.sample(topic.nouns, 3))
                continue
            answers = answers or rng.sample(ANSWERS, 2)
            yield context, answers.pop()
        elif draw < 0.9:
            context = f'{rng.choice(NAMING)}\n"{statement(topic, rng)}"'
            yield context, " " + ", ".join(rng.sample(topic.nouns, 3))
        else:
            yield "Words:", " " + " ".join(rng.sample(topic.nouns, 12))
