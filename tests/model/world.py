"""The Lantern Coast: the closed, invented world that the bundled model knows.

Enters: nothing; every fact follows from the lists below and WORLD_SEED. Leaves: HARBOURS, SHIPS, PEOPLE and their facts.
Never happens: a fact changes between runs, since the committed model was trained on them.
"""

import random

WORLD_SEED = 1876  # the year of the Merchant Shipping Act that Samuel Plimsoll fought for

HARBOUR_NAMES = (
    "Plimsoll Bay, Gannet Quay, Osprey Haven, Tarn Mouth, Hollow Sound, Brackwater, Saltmarsh Point, Kestrel Cove, Old Ferrow, "
    "Windle Reach, Cobble Strand, Amber Hythe, Lantern Head, Marrow Creek, Thistle Landing, Pewter Harbour, Stillwater Dock, "
    "Fenwick Roads, Cinder Wharf, Rook Island, Merrow Point, Halyard Basin, Driftwood Bar, Quillon Pier, Sable Inlet, Tidewell, "
    "Norrow Gate, Ember Sands, Foxglove Quay, Brine Hollow, Larkspur Bay, Greywater Lock, Whistle Rock, Juniper Staithe, Dunmere, "
    "Selkie Narrows"
).split(", ")
SHIP_NAMES = (
    "Grey Petrel, Morning Star, Iron Duchess, Silver Herring, Merry Widow, Black Swan, Patient Heron, Northern Light, Blue Marlin, "
    "Quiet Anne, Golden Fleece, Brave Tailor, Salt Maiden, Hopeful Jane, Red Admiral, Wandering Moon, Evening Tide, Honest Miller, "
    "Proud Falcon, Little Sparrow, Winter Rose, Copper Kettle, Laughing Gull, Old Faithful, White Ermine, Sea Otter, Lucky Penny, "
    "Storm Cousin, Gentle Giant, Thirsty Camel, Velvet Glove, Flying Hare, Humble Bee, Stern Uncle, Dancing Pony, Green Lantern, "
    "Lady Harrow, Second Chance, Crooked Mast, Silent Partner, Bold Badger, Amber Queen, Paper Boat, Dutiful Son, Long Summer, "
    "Hidden Reef, Ninth Wave, Tin Soldier"
).split(", ")
FIRST_NAMES = (
    "Mara, Edwin, Isolde, Corin, Tamsin, Barnaby, Ottilie, Piers, Rosalind, Silas, Winifred, Jasper, Agatha, Lorcan, Beatrix, Hugo, "
    "Marigold, Ambrose, Cordelia, Felix, Henrietta, Magnus, Philippa, Rufus, Sabine, Thaddeus, Ursula, Victor, Wilhelmina, Alban, "
    "Delphine, Gideon, Imogen, Leopold, Nerys, Oswin, Petra, Quentin, Seraphina, Tobias, Verity, Crispin"
).split(", ")
LAST_NAMES = (
    "Tollard, Hask, Penrow, Whitlock, Dray, Marlowe, Quince, Sorrel, Thackett, Varley, Ashdown, Brindle, Cobb, Drummond, Ellery, "
    "Farrow, Garrick, Hollis, Inchbald, Jessop, Kettering, Lomax, Mallory, Nettles, Orchard, Pascoe, Ravenhill, Stroud, Tanner, "
    "Underhay, Venn, Wickham, Yarrow, Abbott, Birch, Chandler, Dunnock, Fletcher, Grimes, Hawker, Lovelace, Merrick"
).split(", ")
GOODS = (
    "tin, cedar, wool, salt, amber, barley, copper, linen, whale oil, honey, slate, tea, rope, glass, pepper, coal, cork, lamp oil, "
    "marble, oats, paper, saffron, silk, tar, timber, wine, bricks, candles, clocks, cider, feathers, herring, ivory, leather, "
    "pearls, sugar"
).split(", ")
LIGHT_NAMES = (
    "Candle Tower, Widow's Light, Long Beacon, Red Lamp, Needle Light, Bishop's Tower, Star Beacon, Hermit's Lamp, Twin Light, "
    "Crow Tower, Pale Beacon, King's Lamp, Gull Light, Stone Tower, High Beacon, Fisher's Lamp, Moon Light, Oak Tower, West Beacon, "
    "Sailor's Lamp, Ghost Light, Bell Tower, Low Beacon, Miller's Lamp, Frost Light, Thorn Tower, Green Beacon, Abbot's Lamp, "
    "Sun Light, Wolf Tower, Lost Beacon, Baker's Lamp, Reed Light, Salt Tower, Old Beacon, Piper's Lamp"
).split(", ")
REGIONS = "the North Reach, the Amber Shore, the Long Coast, the Selkie Isles, the Grey March, the Southern Bight".split(", ")
SHIP_KINDS = "barque, schooner, brig, ketch, cutter, clipper, lugger, sloop".split(", ")


def build():
    rng = random.Random(WORLD_SEED)
    people = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(people)
    people.remove("Mara Tollard")  # placed by hand, for the README
    masters = ["Mara Tollard"] + people[:35]
    captains = people[35:83]
    exports, lights, homes = GOODS[:], LIGHT_NAMES[:], (HARBOUR_NAMES * 2)[:48]
    for pool in (exports, lights, homes):
        rng.shuffle(pool)
    harbours = {
        name: {"master": masters[i], "region": rng.choice(REGIONS), "export": exports[i], "berths": rng.randint(3, 98),
               "light": lights[i], "founded": rng.randint(1402, 1899)}
        for i, name in enumerate(HARBOUR_NAMES)
    }
    ships = {
        name: {"captain": captains[i], "home": homes[i], "kind": rng.choice(SHIP_KINDS), "cargo": rng.choice(GOODS),
               "launched": rng.randint(1802, 1899), "crew": rng.randint(4, 60)}
        for i, name in enumerate(SHIP_NAMES)
    }
    return harbours, ships


HARBOURS, SHIPS = build()
PEOPLE = {facts["master"]: ("harbour", name) for name, facts in HARBOURS.items()}
PEOPLE.update({facts["captain"]: ("ship", name) for name, facts in SHIPS.items()})
