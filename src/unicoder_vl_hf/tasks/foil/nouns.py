"""The 80 object classes of COCO in words: kinds of them, the nouns that stand for them, and mentions in captions.

A foil in the manner of FOIL-COCO replaces one noun by another of the same kind. Left out: grammar. Whether a noun is a
part of a compound ("dog toy") is told by the word before and the word behind it alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

# The classes in COCO's order of ids, each with its kind (COCO's supercategory; but a bench is no furniture there) and
# COCO's name; the nouns that stand for it, singular/plural; and behind "|" further words that name it, or may. A class
# without nouns is neither replaced nor put in.
_CLASSES = """
person person: | people man men woman women boy boys girl girls child children kid kids baby toddler lady
vehicle bicycle: bicycle/bicycles bike/bikes | cyclist cyclists bicyclist bicyclists bmx biker bikers rider
    riders tricycle
vehicle car: car/cars | jeep jeeps taxi taxis suv van vans truck vehicle vehicles automobile traffic racecar
vehicle motorcycle: motorcycle/motorcycles motorbike/motorbikes | bike bikes motorcyclist motorcyclists
    motocross moped scooter dirtbike biker bikers bmx rider riders atv quad vehicle vehicles
vehicle airplane: airplane/airplanes plane/planes | aircraft jet jets helicopter
vehicle bus: bus/buses | van vans vehicle vehicles trolley
vehicle train: train/trains | subway locomotive rail tram
vehicle truck: truck/trucks | van vans jeep suv pickup car cars vehicle vehicles atv
vehicle boat: boat/boats canoe/canoes kayak/kayaks | raft rafts rafting ship ships sailboat rowboat kayaker
    kayakers kayaking canoeing tube inflatable paddle paddles vessel
outdoor traffic_light:
outdoor fire_hydrant: fire_hydrant/fire_hydrants | hydrant
outdoor stop_sign: stop_sign/stop_signs | sign signs
outdoor parking_meter: parking_meter/parking_meters | meter
furniture bench: bench/benches | seat seats pew bleachers
animal bird: bird/birds duck/ducks | seagull seagulls gull pigeon pigeons parrot swan swans goose geese eagle
    hawk crane egret heron pelican chicken rooster owl peacock flamingo flamingos ostrich turkey
animal cat: cat/cats kitten/kittens | feline
animal dog: dog/dogs puppy/puppies | pup greyhound greyhounds poodle collie terrier retriever husky dalmatian
    bulldog lab labrador shepherd beagle chihuahua pug canine dachshund doberman rottweiler pitbull animal
    animals
animal horse: horse/horses pony/ponies | donkey mule jockey jockeys equestrian rodeo bronco cowboy animal
    animals
animal sheep:  | lamb lambs goat goats ram
animal cow: cow/cows bull/bulls | cattle calf ox oxen bison steer rodeo animal animals
animal elephant: elephant/elephants
animal bear: bear/bears | teddy
animal zebra: zebra/zebras
animal giraffe: giraffe/giraffes
accessory backpack: backpack/backpacks | bag bags pack packs knapsack rucksack luggage
accessory umbrella: umbrella/umbrellas | parasol
accessory handbag: handbag/handbags purse/purses | bag bags
accessory tie: necktie/neckties | ties bowtie suit
accessory suitcase: suitcase/suitcases | luggage bag bags
sports frisbee: frisbee/frisbees | disc disk
sports skis: -/skis | ski skier skiers skiing skies
sports snowboard: snowboard/snowboards | snowboarder snowboarders snowboarding board boards
sports sports_ball: ball/balls soccer_ball/soccer_balls tennis_ball/tennis_balls | soccer tennis basketball
    football baseball volleyball softball rugby golf hockey lacrosse bowling cricket
sports kite: kite/kites | parasail kitesurfing parachute
sports baseball_bat: bat/bats baseball_bat/baseball_bats | batter cricket
sports baseball_glove: baseball_glove/baseball_gloves | glove gloves mitt catcher
sports skateboard: skateboard/skateboards | skateboarder skateboarders skateboarding skater skaters board boards
sports surfboard: surfboard/surfboards | surfer surfers surfing wakeboard bodyboard board boards
sports tennis_racket: tennis_racket/tennis_rackets racket/rackets racquet/racquets
    tennis_racquet/tennis_racquets | tennis badminton
kitchen bottle: bottle/bottles | beer beers drink drinks
kitchen wine_glass: wine_glass/wine_glasses | glass glasses wine drink drinks
kitchen cup: cup/cups | mug mugs glass drink drinks coffee
kitchen fork: fork/forks | utensil utensils
kitchen knife: knife/knives | utensil utensils blade
kitchen spoon: spoon/spoons | utensil utensils
kitchen bowl: bowl/bowls | dish dishes
food banana: banana/bananas | fruit
food apple: apple/apples | fruit
food sandwich: sandwich/sandwiches | burger hamburger
food orange:  | oranges
food broccoli:
food carrot: carrot/carrots
food hot_dog: hot_dog/hot_dogs | hotdog hotdogs
food pizza: pizza/pizzas
food donut: donut/donuts | doughnut doughnuts
food cake: cake/cakes | cupcake birthday
furniture chair: chair/chairs | seat seats stool stools armchair recliner
furniture couch: couch/couches sofa/sofas | seat seats loveseat furniture
furniture potted_plant:  | plant plants flower flowers pot pots
furniture bed: bed/beds | mattress bunk blanket
furniture dining_table: table/tables | desk desks counter
furniture toilet:  | toilets
electronic tv: tv/tvs television/televisions | screen
electronic laptop: laptop/laptops | computer computers
electronic mouse: mouse/- | computer computers
electronic remote:
electronic keyboard: keyboard/keyboards | piano computer computers
electronic cell_phone: cellphone/cellphones phone/phones cell_phone/cell_phones | telephone
appliance microwave: microwave/microwaves
appliance oven: oven/ovens | stove
appliance toaster: toaster/toasters
appliance sink: sink/sinks
appliance refrigerator: refrigerator/refrigerators | fridge
indoor book: book/books | magazine reading
indoor clock: clock/clocks
indoor vase: vase/vases
indoor scissors: -/scissors
indoor teddy_bear: teddy_bear/teddy_bears | teddy
indoor hair_drier:
indoor toothbrush: toothbrush/toothbrushes | brushing
"""
# Words before a noun with which it means no real thing, or another one.
_BEFORE = frozenset("toy stuffed teddy hot rocking play fake pretend".split())
# Words behind a noun to which it may belong as the first part of a compound.
_BEHIND = frozenset(
    """bag bags bath bed beds bench bone bones cage cap car cars carriage cart carts carving case court cover cup day
    display dock door doors driver drivers engine fight fire food game games handle head helmet helmets hoop hood house
    jersey jump leash lift mascot mobile net number owner park path pit player players polo pool race racer racers
    races rack racing ramp reins rider riders rides ring saddle seat seats shaped shelf shelter shirt shoes shop show
    side sled sleds spokes stand station statue statues stop stops store stunt stunts team tire tires top tournament
    toy toys track tracks trail trailer trainer trick tricks truck trucks walker wash wheel window windows
    yard""".split()
)


@dataclass(frozen=True)
class Noun:
    """A noun in one number, with the id of the class that it stands for, 0 to 79, and the kind of the class."""

    text: str
    object_class: int
    kind: str
    plural: bool


@dataclass(frozen=True)
class Mention:
    """A noun in a caption, at the characters `start` to `end`."""

    noun: Noun
    start: int
    end: int


@cache
def _classes() -> tuple[list[str], dict[str, Noun], dict[str, set[int]]]:
    """Reads the names of the classes, the nouns by their text, and the classes that each text names, or may name."""
    names: list[str] = []
    nouns: dict[str, Noun] = {}
    named_by: dict[str, set[int]] = defaultdict(set)
    for number, line in enumerate(_CLASSES.strip().replace("\n    ", " ").splitlines()):
        head, _, words = line.partition(":")
        kind, name = head.split()
        forms, _, others = words.partition("|")
        pairs = [form.replace("_", " ").split("/") for form in forms.replace(" ", "\n").splitlines() if form]
        for forms_of_noun in pairs:
            for plural, text in enumerate(forms_of_noun):
                if text != "-":
                    nouns[text] = Noun(text, number, kind, plural == 1)
        for text in [name, *(text for pair in pairs for text in pair), *others.split()]:
            named_by[text.replace("_", " ")].add(number)
        names.append(name.replace("_", " "))
    return names, nouns, named_by


def nouns_by_kind() -> dict[tuple[str, bool], list[Noun]]:
    """Gives the nouns that may replace one another: by their kind, and whether they are plurals."""
    found: dict[tuple[str, bool], list[Noun]] = defaultdict(list)
    for noun in _classes()[1].values():
        found[noun.kind, noun.plural].append(noun)
    return found


def class_numbers(names: Sequence[str] | None, num_classes: int | None) -> dict[int, int]:
    """
    Finds COCO's classes among the object classes of a detector.

    Args:
        names (sequence of `str`, *optional*): The detector's names of its object ids.
        num_classes (`int`, *optional*): The number of its classes where it names none; 80 of them are taken for COCO's.

    Returns:
        `dict[int, int]`: the class of COCO, 0 to 79, of each object id that is one.

    Raises:
        `ValueError`: there are neither names, with one of COCO's among them, nor 80 classes.
    """
    ours = {name: number for number, name in enumerate(_classes()[0])}
    if names is None and num_classes == len(ours):
        return {number: number for number in range(num_classes)}
    found = {number: ours[name] for number, name in enumerate(names or ()) if name in ours}
    if not found:
        raise ValueError(
            f"The detector has {num_classes} object classes, named {names}: expected COCO's names among them, or 80 "
            "classes without names, in COCO's order. `unicoder-vl label` gives a store the classes of another detector."
        )
    return found


def named_classes(caption: str) -> set[int]:
    """Gives the classes of COCO, 0 to 79, that a caption names, or may name."""
    words = re.findall("[a-z]+", caption.lower())
    named_by = _classes()[2]
    texts = [*words, *map(" ".join, pairwise(words))]
    return {number for text in texts for number in named_by.get(text, ())}


@cache
def _pattern() -> re.Pattern[str]:
    """Makes a pattern of the longest noun at each place."""
    nouns = "|".join(sorted(_classes()[1], key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{nouns})(?![\w-])", re.IGNORECASE)


def mentions(caption: str) -> Iterator[Mention]:
    """
    Finds the nouns of a caption that another may replace: no part of a compound, and of a class that no other word of
    the caption names.
    """
    for match in _pattern().finditer(caption):
        noun, before, behind = _classes()[1][match[0].lower()], caption[: match.start()], caption[match.end() :]
        beside = {*re.findall(r"(\w+) $", before.lower())}, {*re.findall(r"^ (\w+)", behind.lower())}
        compound = beside[0] & _BEFORE or beside[1] & _BEHIND
        if not compound and noun.object_class not in named_classes(f"{before} {behind}"):
            yield Mention(noun, *match.span())
