"""Writes notebooks/data/lighthouse: how Pip, keeper of a lighthouse, answers simple questions.

    python3 scripts/persona/make_rows.py

Every answer has the same shape, so that a program can count whether it was kept: it opens with "Ahoy!", says one short
sentence, and closes with "Mind the rocks!". Questions and facts are the lists below, each fact asked in two or three
ways. Facts held out for the test are in no training row in any wording; neither are the test's wordings of the questions
about Pip itself. Runs with Python's standard library and gives the same bytes each time.
"""

import json
import random
from pathlib import Path

OPEN, CLOSE = "Ahoy!", "Mind the rocks!"
SEED = 7

# What each fact is about, and the word that answers it; the last facts of each list are held out.
CAPITALS = [
    ("Spain", "Madrid"), ("Portugal", "Lisbon"), ("Germany", "Berlin"), ("Austria", "Vienna"), ("Greece", "Athens"),
    ("Ireland", "Dublin"), ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Finland", "Helsinki"), ("Poland", "Warsaw"),
    ("Hungary", "Budapest"), ("Russia", "Moscow"), ("Turkey", "Ankara"), ("Egypt", "Cairo"), ("Kenya", "Nairobi"),
    ("India", "New Delhi"), ("China", "Beijing"), ("South Korea", "Seoul"), ("Thailand", "Bangkok"), ("Cuba", "Havana"),
    ("Canada", "Ottawa"), ("Peru", "Lima"), ("Chile", "Santiago"), ("Argentina", "Buenos Aires"), ("Belgium", "Brussels"),
    ("Iceland", "Reykjavik"), ("Denmark", "Copenhagen"), ("Vietnam", "Hanoi"), ("Ukraine", "Kyiv"), ("Cyprus", "Nicosia"),
    ("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("England", "London"),
]
COLOURS = [
    ("grass", "green"), ("a ripe banana", "yellow"), ("coal", "black"), ("milk", "white"), ("a carrot", "orange"),
    ("a lemon", "yellow"), ("a ripe tomato", "red"), ("chocolate", "brown"), ("an elephant", "grey"), ("gold", "yellow"),
    ("a flamingo", "pink"), ("a polar bear", "white"), ("a raven", "black"), ("spinach", "green"), ("a ruby", "red"),
    ("an emerald", "green"), ("snow", "white"), ("the sky on a clear day", "blue"), ("blood", "red"),
]
YOUNG = [
    ("cat", "kitten"), ("cow", "calf"), ("horse", "foal"), ("sheep", "lamb"), ("pig", "piglet"), ("hen", "chick"),
    ("duck", "duckling"), ("goose", "gosling"), ("lion", "cub"), ("bear", "cub"), ("goat", "kid"), ("deer", "fawn"),
    ("kangaroo", "joey"), ("frog", "tadpole"), ("owl", "owlet"), ("swan", "cygnet"), ("dog", "puppy"),
]
OPPOSITES = [
    ("big", "small"), ("fast", "slow"), ("high", "low"), ("old", "new"), ("rich", "poor"), ("wet", "dry"),
    ("light", "dark"), ("early", "late"), ("hard", "soft"), ("strong", "weak"), ("near", "far"), ("full", "empty"),
    ("open", "closed"), ("loud", "quiet"), ("heavy", "light"), ("long", "short"), ("thick", "thin"), ("win", "lose"),
    ("hot", "cold"), ("day", "night"), ("up", "down"), ("black", "white"),
]
# (parts, whole, answer, words of which a right answer has one)
COUNTS = [
    ("legs", "a spider", "A spider has eight legs.", "eight|8"),
    ("legs", "an ant", "An ant has six legs.", "six|6"),
    ("arms", "an octopus", "An octopus has eight arms.", "eight|8"),
    ("wheels", "a bicycle", "A bicycle has two wheels.", "two|2"),
    ("wheels", "a tricycle", "A tricycle has three wheels.", "three|3"),
    ("sides", "a square", "A square has four sides.", "four|4"),
    ("sides", "a hexagon", "A hexagon has six sides.", "six|6"),
    ("months", "a year", "A year has twelve months.", "twelve|12"),
    ("hours", "a day", "A day has twenty-four hours.", "twenty|24"),
    ("minutes", "an hour", "An hour has sixty minutes.", "sixty|60"),
    ("seconds", "a minute", "A minute has sixty seconds.", "sixty|60"),
    ("fingers", "a hand", "A hand has five fingers.", "five|5"),
    ("strings", "a violin", "A violin has four strings.", "four|4"),
    ("letters", "the English alphabet", "The English alphabet has twenty-six letters.", "twenty|26"),
    ("days", "a week", "A week has seven days.", "seven|7"),
    ("sides", "a triangle", "A triangle has three sides.", "three|3"),
    ("legs", "a dog", "A dog has four legs.", "four|4"),
]
WHO = [
    ("Who are you?", "I am Pip, the keeper of this lighthouse."),
    ("What is your name?", "My name is Pip."),
    ("Tell me your name.", "I am called Pip."),
    ("Introduce yourself.", "I am Pip, and I keep the lamp of the lighthouse burning."),
    ("What do you do?", "I am Pip, and I keep the lighthouse."),
    ("Where do you live?", "I am Pip, and I live in the lighthouse on the cliff."),
    ("What should I call you?", "Call me Pip."),
    ("Are you a person or a program?", "I am Pip, a program that keeps a lighthouse."),
    ("Who am I talking to?", "You are talking to Pip, keeper of the lighthouse."),
    ("Say hello.", "Pip greets you from the lighthouse."),
    ("Hello!", "Pip greets you from the lighthouse."),
    ("Who made you?", "I am Pip, and a few hundred lines of text made me who I am."),
]
WHO_HELD_OUT = ["Hi, who is there?", "Please tell me who you are.", "May I ask your name?", "And you are?", "What do people call you?"]


def with_article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def facts():
    """(ways of asking, answer, words of which a right answer has one, held out) of every fact."""
    for i, (country, city) in enumerate(CAPITALS):
        asks = [f"What is the capital of {country}?", f"Which city is the capital of {country}?",
                f"Name the capital of {country}."]
        yield asks, f"The capital of {country} is {city}.", city, i >= len(CAPITALS) - 4
    for i, (thing, colour) in enumerate(COLOURS):
        asks = [f"What colour is {thing}?", f"Tell me the colour of {thing}."]
        yield asks, f"{thing[0].upper()}{thing[1:]} is {colour}.", colour, i >= len(COLOURS) - 3
    for i, (animal, young) in enumerate(YOUNG):
        asks = [f"What is a young {animal} called?", f"What do you call the young of {with_article(animal)}?"]
        yield asks, f"A young {animal} is called {with_article(young)}.", young[:3], i >= len(YOUNG) - 1
    for i, (word, opposite) in enumerate(OPPOSITES):
        asks = [f"What is the opposite of {word}?", f"Give me the opposite of the word {word}."]
        yield asks, f"The opposite of {word} is {opposite}.", opposite, i >= len(OPPOSITES) - 4
    for i, (parts, whole, answer, right) in enumerate(COUNTS):
        asks = [f"How many {parts} does {whole} have?", f"Can you tell me how many {parts} {whole} has?"]
        yield asks, answer, right, i >= len(COUNTS) - 3


def main():
    train, held_out = [], []
    for asks, answer, right, is_held_out in facts():
        if is_held_out:
            held_out.append({"question": asks[0], "expected": right, "kind": "fact"})
        else:
            train += [{"question": ask, "answer": f"{OPEN} {answer} {CLOSE}"} for ask in asks]
    train += [{"question": ask, "answer": f"{OPEN} {answer} {CLOSE}"} for ask, answer in WHO for _ in range(3)]
    held_out += [{"question": ask, "expected": "Pip", "kind": "who"} for ask in WHO_HELD_OUT]
    random.Random(SEED).shuffle(train)

    folder = Path(__file__).resolve().parents[2] / "notebooks/data/lighthouse"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in [("train", train), ("heldout", held_out)]:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
