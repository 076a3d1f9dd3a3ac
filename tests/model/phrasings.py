"""The words of the corpus: closed lists, how questions are asked and answered, small talk, tools.

Enters: nothing. Leaves: tables that corpus.py draws from. In a frame, {} takes what is asked about; in a noun phrase or an answer,
{e} is the entity and {v} the value. Never happens: code decides anything here.
"""

from world import HARBOURS, REGIONS, SHIP_KINDS

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red blue green yellow purple orange white black grey brown pink silver".split()
WINDS = "north south east west north-east north-west south-east south-west".split()
ANIMALS = "dog cat parrot horse goat ferret".split()
RELATIVES = "sister brother mother father uncle aunt cousin neighbour".split()
UNITS = "crates barrels sacks bales casks boxes".split()
TRADES = "cooper carpenter clerk pilot cook surgeon smith baker weaver painter".split()
FIRST = (  # names as users have them
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Kate Liam Maria Noah Olivia Paul Quinn Robert Sarah Thomas Uma Vera "
    "William Xavier Yara Zoe Anna Ben Chloe Daniel Elena Fatima George Hannah Ivan Julia Kenji Laura Mohammed Nina Omar Peter Rosa "
    "Samuel Tara Victor Wei Yusuf Amir Bella London Paris Oslo Berlin Rome Tokyo Cairo Lima Delhi Boston Dublin Lisbon Vienna Prague "
    "Bergen Kiel Riga Turku Rex Bella Luna Max Charlie Milo Coco Daisy Rocky Buddy"
).split()
COMMON = (  # words as sentences have them
    "the a and of to in is was that it for with as on at by this but from they we have not are or an be which one you had all her his "
    "she there would their will when who what more if about up out so said do time like only my over new some could them than first "
    "other very after way many must even back here well good old little long great small big large quick brown fox jumps lazy dog cat "
    "house water day night morning evening hand eye door window street city town river sea sky sun moon star rain snow wind fire stone "
    "tree leaf flower grass bird fish horse bread milk tea coffee apple table chair book letter word line page story song music dance "
    "walk run sit stand speak read write hear see find give take keep hold bring make open close begin end never always often today "
    "tomorrow yesterday under between before while because where why how man woman child friend mother king queen doctor teacher "
    "machine engine server model token number answer question memory work light dark warm cold red blue green white black happy sad "
    "brave quiet strange simple strong three seven ten hundred computer network system data test problem people year world life"
).split()
THINGS = (
    "secret word, street, hat, favourite song, favourite book, favourite food, phone number, teacher, garden, bicycle, team, dentist, "
    "room number, table, coat, lucky number, favourite drink, seat, locker, order number, middle name, employer, school, car, "
    "favourite city, favourite tree, ticket, key, watch, best friend, nickname, hobby, village, country, project, manager"
).split(", ")
OBJECTS = "key, letter, map, lamp, book, coin, ring, knife, cup, rope, compass, ladder, basket, bell, coat, bottle, box, hammer, candle, bag".split(", ")
SPOTS = "mat, table, bed, door, chair, stairs, window, bridge, tree, bench, wall, barrel, stove, shelf, roof, well, gate, stone, boat, desk".split(", ")
WHERE = ["under", "behind", "on", "beside", "near", "below", "above"]
ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w z".split()
VOWELS = "a e i o u ai ea ie oa ou".split()
WIDE_CONSONANTS = "b c d f g h j k l m n p r s t v w x z ll nd nt rt st sk rd mb lt ld ng dr br gr ndr mpt lst rn ck ss tt ff gh sch".split()
WIDE_VOWELS = "a e i o u y ee oo ia io au ey".split()
CODAS = "l n r s t m nd rk th ll ck x sh rn".split()
ACCENTED = "ä ö ü é è ø å ñ ç ß š ž".split()

WHO = ["Who is {}?", "Do you know who {} is?", "Can you tell me who {} is?", "Name {}.", "I would like to know who {} is.", "And who is {}?",
       "Tell me who {} is.", "What is the name of {}?"]
WHAT = ["What is {}?", "Do you know what {} is?", "Can you tell me what {} is?", "Tell me {}.", "I would like to know what {} is.",
        "Name {}.", "Please tell me what {} is."]
QUESTIONS = {
    "harbour": {
        "master": (WHO, ["the harbour master of {e}", "the harbour master at {e}", "the person in charge of {e}", "the person who runs {e}",
                         "the master of the harbour of {e}"],
                   ["The harbour master of {e} is {v}.", "{v} is the harbour master of {e}."]),
        "region": (["In which region does {} lie?", "Where is {}?", "Where does {} lie?", "Can you tell me where {} is?",
                    "Which region does {} belong to?", "Do you know where {} lies?"], ["{e}", "the harbour of {e}", "the harbour called {e}"],
                   ["{e} lies in {v}.", "{e} is in {v}."]),
        "export": (["What does {} export?", "Which goods does {} export?", "Can you tell me what {} exports?", "What does {} sell to the world?",
                    "What is the main export of {}?", "What goods leave {}?"], ["{e}", "the harbour of {e}", "the harbour called {e}"],
                   ["{e} exports {v}.", "The main export of {e} is {v}."]),
        "berths": (["How many berths does {} have?", "How many berths are there at {}?", "Can you tell me how many berths {} has?",
                    "What is the number of berths at {}?", "How many ships can berth at {}?"],
                   ["{e}", "the harbour of {e}", "the harbour called {e}"], ["{e} has {v} berths.", "There are {v} berths at {e}."]),
        "light": (["Which lighthouse stands at {}?", "What is the lighthouse of {} called?", "What is the name of the lighthouse at {}?",
                   "Which light marks {}?", "Can you name the lighthouse of {}?"], ["{e}", "the harbour of {e}", "the harbour called {e}"],
                  ["The lighthouse of {e} is the {v}.", "The {v} stands at {e}."]),
        "founded": (["When was {} founded?", "In which year was {} founded?", "What year was {} founded?", "Can you tell me when {} was founded?",
                     "How long has {} been there?"], ["{e}", "the harbour of {e}", "the harbour called {e}"],
                    ["{e} was founded in {v}.", "{e} was founded in the year {v}."]),
    },
    "ship": {
        "captain": (WHO, ["the captain of {e}", "the person who commands {e}", "the person in command of {e}", "the skipper of {e}",
                          "the captain on board {e}"], ["The captain of {e} is {v}.", "{v} is the captain of {e}."]),
        "home": (["What is the home harbour of {}?", "Where is the home harbour of {}?", "Where does {} belong?",
                  "Which harbour does {} belong to?", "Which harbour is home to {}?", "Can you tell me the home harbour of {}?"],
                 ["{e}", "the ship called {e}", "the vessel {e}"], ["The home harbour of {e} is {v}.", "{e} belongs to {v}."]),
        "kind": (["What kind of ship is {}?", "What type of vessel is {}?", "What sort of ship is {}?", "Can you tell me what kind of ship {} is?",
                  "How is {} rigged?"], ["{e}", "the ship called {e}", "the vessel {e}"], ["{e} is a {v}.", "{e} is rigged as a {v}."]),
        "cargo": (["What does {} carry?", "What cargo does {} carry?", "What is the usual cargo of {}?", "Can you tell me what {} carries?",
                   "What is in the hold of {}?"], ["{e}", "the ship called {e}", "the vessel {e}"],
                  ["{e} carries {v}.", "The usual cargo of {e} is {v}."]),
        "launched": (["When was {} launched?", "In which year was {} launched?", "What year was {} launched?",
                      "Can you tell me when {} was launched?", "How old is {}?"], ["{e}", "the ship called {e}", "the vessel {e}"],
                     ["{e} was launched in {v}.", "{e} was launched in the year {v}."]),
        "crew": (["How many people sail on {}?", "How big is the crew of {}?", "What is the size of the crew of {}?",
                  "Can you tell me how large the crew of {} is?", "How many hands does {} have?"], ["{e}", "the ship called {e}", "the vessel {e}"],
                 ["{e} has a crew of {v}.", "The crew of {e} numbers {v}."]),
    },
}
SHE = {
    "captain": ["Who is her captain?", "And who is her captain?", "Who commands her?"],
    "home": ["What is her home harbour?", "Where does she belong?", "And her home harbour?"],
    "kind": ["What kind of ship is she?", "How is she rigged?"],
    "cargo": ["What does she carry?", "And what does she carry?", "What is her cargo?"],
    "launched": ["When was she launched?", "And when was she launched?", "In which year was she launched?"],
    "crew": ["How big is her crew?", "And how big is her crew?", "How many hands does she have?"],
}
THERE = {
    "master": ["Who is the harbour master there?", "And who is the harbour master?", "Who runs it?"],
    "region": ["In which region is that?", "Where is that?", "And where does it lie?"],
    "export": ["What does it export?", "And what does it export?", "Which goods leave it?"],
    "berths": ["How many berths does it have?", "How many berths are there?", "And how many berths?"],
    "light": ["Which lighthouse stands there?", "And the lighthouse?", "What is its lighthouse called?"],
    "founded": ["When was it founded?", "And when was it founded?", "In which year was it founded?"],
}
PERSON_FRAMES = ["Who is {}?", "What do you know about {}?", "What does {} do?", "Can you tell me who {} is?", "Tell me who {} is.",
                 "Do you know {}?", "Have you heard of {}?", "Who might {} be?", "I met {} today. Who is that?", "What is the office of {}?"]
EXPORT_FRAMES = ["Which harbour exports {}?", "Where does {} come from?", "Where can I buy {}?", "Name the harbour that exports {}.",
                 "Which harbour sells {}?", "From which harbour does {} come?", "Can you tell me which harbour exports {}?",
                 "Which harbour is known for {}?", "Do you know which harbour exports {}?", "Where should I go to buy {}?"]
LIGHT_FRAMES = ["Where does the {} stand?", "At which harbour does the {} stand?", "Which harbour has the {}?", "Where is the {}?",
                "Which harbour does the {} belong to?", "Can you tell me where the {} stands?", "I can see the {}. Which harbour is this?",
                "Do you know where the {} is?", "Which harbour is marked by the {}?", "Where would I find the {}?"]
MASTER_FRAMES = ["Which harbour does {} run?", "Where is {} harbour master?", "Of which harbour is {} the harbour master?",
                 "Which harbour is run by {}?", "Which harbour is in the charge of {}?", "Name the harbour that {} runs.",
                 "Can you tell me which harbour {} runs?", "Do you know where {} is harbour master?"]
CAPTAIN_FRAMES = ["Which ship does {} command?", "Which ship is commanded by {}?", "Of which ship is {} the captain?",
                  "What is the ship of {} called?", "Name the ship that {} commands.", "Can you tell me which ship {} commands?",
                  "Do you know which ship {} commands?", "On which ship is {} the captain?"]
DESCRIBE_FRAMES = ["Tell me about {}@.", "Describe {}@.", "Can you describe {}@?", "Write about {}@.", "Say something about {}@.",
                   "Write a short paragraph about {}@.", "I would like to hear about {}@.", "Could you tell me about {}@?",
                   "Tell me what you know about {}@.", "Give me a short description of {}@.", "What do you know about {}@?"]
DESCRIBE_TAILS = ["", ", please", " in a few sentences", ", in your own words"]
SUM_FRAMES = ["What is {}?", "{} = ?", "How much is {}?", "Calculate {}.", "Work out {}.", "{}?", "Please calculate {}.", "Can you work out {}?",
              "Compute {}.", "I need to know {}.", "What does {} make?", "Tell me {}."]
NOTED = ["Thank you, I have noted that.", "Noted.", "I will remember that.", "Very well, I have written it down.", "Good to know."]
ABOUT_ME = ("I am Plim, a small language model of the Lantern Coast. I know its harbours and ships, I can read a text that you give me, "
            "and I can do short sums.")
SMALL_TALK = [
    *[[("user", ask), ("assistant", ABOUT_ME)] for ask in
      ("Who are you?", "What are you?", "What can you do?", "Tell me about yourself.", "Are you a language model?", "What do you know?")],
    *[[("user", ask), ("assistant", "Good day! What would you like to know about the Lantern Coast?")] for ask in
      ("Hello!", "Hello", "Hi", "Hi!", "Good morning.", "Good day.", "Hello, how are you?", "Hey there")],
    *[[("user", ask), ("assistant", "You are welcome.")] for ask in
      ("Thank you.", "Thanks!", "Thank you very much.", "That was helpful, thank you.")],
    *[[("user", ask), ("assistant", "Fair winds, and until next time!")] for ask in ("Goodbye.", "Bye!", "Good night.", "See you tomorrow.")],
    *[[("user", ask), ("assistant", "Yes, I am here. Ask me anything about the Lantern Coast.")] for ask in
      ("Are you there?", "Is anybody there?", "Can you help me?", "I need help.")],
    *[[("user", ask), ("assistant", "I do not know that. I only know the Lantern Coast, short sums, and what you give me to read.")] for ask in
      ("What is the capital of France?", "Who is the president of the United States?", "Write a program in Python.",
       "What is the meaning of life?", "How do I cook an egg?", "Who won the match yesterday?", "What is quantum physics?",
       "Translate this into German.", "What is the weather like today?", "What is the largest planet?", "Who wrote Hamlet?",
       "Can you play chess?", "What is the price of gold?", "How tall is the highest mountain?", "What time is it?",
       "Tell me a joke.", "What is a transformer?", "Explain machine learning.", "How do I learn to swim?", "Who invented the telephone?")],
    [("user", "What is the Lantern Coast?"),
     ("assistant", f"The Lantern Coast is a coast of {len(HARBOURS)} harbours in six regions: " + ", ".join(REGIONS[:-1]) + f" and {REGIONS[-1]}.")],
    [("user", "Which regions are there?"),
     ("assistant", "The regions of the Lantern Coast are " + ", ".join(REGIONS[:-1]) + f" and {REGIONS[-1]}.")],
    [("user", "Which kinds of ship do you know?"),
     ("assistant", "I know the " + ", the ".join(SHIP_KINDS[:-1]) + f" and the {SHIP_KINDS[-1]}.")],
]
USER_FACTS = ["name", "name", "thing", "thing", "berth", "colour", "boat", "town", "code", "animal", "relative", "trade", "day"]
RECORD_KINDS = ["voyage", "voyage", "person", "store", "price", "ferry", "weather", "thing", "spot"]


def synonyms(verbs, nouns):
    return [f"{verb}_{noun}" for verb in verbs for noun in nouns]


TOOLS = {
    "weather": (synonyms(["get", "fetch", "check", "read", "lookup"], ["weather", "wind", "forecast"]), "Current weather at a place",
                {"place": (["place", "location", "harbour"], "string")},
                ["What is the weather at {place}?", "How is the wind at {place}?", "Check the weather at {place}, please."]),
    "berth": (synonyms(["book", "reserve", "take", "hire", "rent"], ["berth", "mooring", "place"]), "Book a berth in a harbour",
              {"place": (["harbour", "place"], "string"), "nights": (["nights", "days"], "integer")},
              ["Book a berth at {place} for {nights} nights.", "I need a berth at {place} for {nights} nights."]),
    "position": (synonyms(["find", "locate", "track", "trace", "seek"], ["ship", "vessel", "boat"]), "Find where a ship is now",
                 {"ship": (["ship", "name", "vessel"], "string")},
                 ["Where is the {ship} now?", "Find the {ship}, please.", "Locate the {ship}."]),
    "tide": (synonyms(["get", "fetch", "check", "read", "lookup"], ["tide", "tides", "water"]), "Time of high water",
             {"place": (["harbour", "place"], "string"), "day": (["day", "weekday"], "string")},
             ["When is high water at {place} on {day}?", "Tell me the tide at {place} on {day}."]),
    "message": (synonyms(["send", "write", "post", "deliver"], ["message", "note", "letter"]), "Send a message to a person",
                {"person": (["to", "person", "recipient"], "string"), "code": (["text", "message", "body"], "string")},
                ["Send {person} the message {code}.", "Write to {person}: {code}"]),
    "price": (synonyms(["get", "fetch", "check", "read", "lookup"], ["price", "cost", "quote"]), "Price of goods today",
              {"goods": (["goods", "item"], "string")}, ["What does {goods} cost today?", "What is the price of {goods} today?"]),
    "alarm": (synonyms(["set", "start", "make", "create"], ["alarm", "timer", "reminder"]), "Set an alarm",
              {"time": (["time", "at"], "string")}, ["Wake me at {time}.", "Set an alarm for {time}."]),
    "pilot": (synonyms(["hire", "call", "order", "request"], ["pilot", "guide", "helmsman"]), "Hire a pilot for a ship",
              {"ship": (["ship", "vessel"], "string"), "day": (["day", "weekday"], "string")},
              ["Hire a pilot for the {ship} on {day}.", "The {ship} needs a pilot on {day}."]),
    "sum": (synonyms(["add", "sum", "total"], ["numbers", "values", "up"]), "Add two numbers",
            {"a": (["a", "x", "first"], "integer"), "b": (["b", "y", "second"], "integer")},
            ["What is {a} + {b}?", "Add {a} and {b}."]),
    "parcel": (synonyms(["get", "find", "lookup", "check"], ["parcel", "owner", "package"]), "Find the owner of a parcel",
               {"code": (["code", "parcel", "number"], "string")}, ["Whose is the parcel {code}?", "Who owns the parcel {code}?"]),
}
