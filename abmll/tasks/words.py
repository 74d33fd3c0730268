"""Words, frames and nonsense for the builtin tasks: data only."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# 16 categories of 24 words; no word is in two of them. The key is the singular, as it appears in questions.
CATEGORIES = {
    name: _words(words)
    for name, words in {
        "mammal": "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey giraffe zebra "
        "camel deer pig donkey panda whale squirrel",
        "fruit": "apple banana pear peach cherry grape lemon lime mango melon plum kiwi apricot strawberry raspberry "
        "blueberry pineapple coconut papaya fig grapefruit watermelon nectarine blackberry",
        "colour": "red blue green yellow purple pink brown black white gray crimson turquoise maroon beige violet "
        "indigo scarlet teal magenta cyan lavender ivory khaki amber",
        "tool": "hammer screwdriver wrench saw drill pliers chisel axe shovel rake crowbar ladder sandpaper level "
        "clamp hoe spade mallet toolbox trowel hacksaw pickaxe tongs scissors",
        "vehicle": "car truck bus bicycle motorcycle train airplane helicopter boat ship van taxi tram scooter tractor "
        "ambulance submarine canoe yacht ferry limousine jeep wagon rocket",
        "garment": "shirt trousers jacket coat dress skirt sweater hat scarf glove sock shoe boot belt blouse jeans "
        "shorts vest cap pajamas sandal mitten hoodie cardigan",
        "body part": "head arm leg hand foot finger toe knee elbow shoulder neck nose ear eye mouth tongue chin cheek "
        "wrist ankle hip thumb forehead stomach",
        "country": "France Germany Italy Spain Portugal Brazil Canada Mexico China Japan India Egypt Kenya Nigeria "
        "Norway Sweden Finland Poland Greece Russia Australia Peru Chile Argentina",
        "sport": "football tennis basketball baseball hockey golf swimming boxing rugby volleyball cricket skiing "
        "wrestling badminton karate judo fencing gymnastics surfing rowing cycling archery softball skating",
        "instrument": "piano guitar violin drum flute trumpet cello clarinet harp saxophone trombone banjo ukulele "
        "accordion oboe tuba harmonica mandolin xylophone organ bassoon viola tambourine piccolo",
        "drink": "water coffee tea milk juice beer wine lemonade cocoa soda whiskey vodka rum gin champagne cider "
        "smoothie milkshake espresso cappuccino latte tequila brandy cola",
        "piece of furniture": "table chair sofa bed desk wardrobe bookcase shelf cupboard stool bench armchair dresser "
        "couch cabinet nightstand crib recliner ottoman sideboard bookshelf futon hammock mattress",
        "profession": "doctor teacher lawyer nurse engineer farmer baker plumber carpenter chef dentist pilot soldier "
        "electrician journalist accountant architect butcher waiter barber librarian tailor surgeon firefighter",
        "vegetable": "carrot potato onion parsnip cabbage lettuce spinach broccoli pea bean cucumber pepper celery "
        "garlic pumpkin radish turnip leek eggplant asparagus cauliflower zucchini beetroot kale",
        "building": "house school church hospital factory castle hotel library museum barn palace prison stadium "
        "temple mosque warehouse skyscraper cottage theater lighthouse cathedral garage apartment supermarket",
        "bird": "eagle sparrow robin owl hawk pigeon duck goose swan chicken turkey parrot crow raven seagull penguin "
        "ostrich peacock flamingo pelican falcon woodpecker hummingbird canary",
    }.items()
}

# Nothing here says what the word is: any of them fits a word of any category.
FRAMES = (
    "{word}",
    "The word is: {word}.",
    "Here is the word {word}.",
    "Think of {word}.",
    'It says "{word}".',
    "Next on the list: {word}",
)

NONSENSE = _words("dax wug fep blick zorp tuv gorp mib kesh plon vash nulg rix jomp quab sled drot yim bex glim")

# What a sentence of the sentiment tasks can be about, and how it can be judged.
SUBJECTS = _words(
    "film book meal hotel concert phone game holiday restaurant speech shoe laptop lesson party song museum"
)
GOOD = _words(
    "wonderful excellent great fantastic delightful superb amazing lovely brilliant perfect charming splendid"
)
BAD = _words("terrible awful boring horrible disappointing dreadful poor annoying disgusting useless miserable ghastly")
OPINIONS = (
    "The {subject} was {word}.",
    "I found the {subject} {word}.",
    "What a {word} {subject}!",
    "We all thought that the {subject} was {word}.",
    "In short, a {word} {subject}.",
    "Everyone said how {word} the {subject} was.",
)

# Largest number in a comparison.
RANGES = (20, 30, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
