"""Short questions with one right answer that a small language model may know: capitals, opposites, past tenses, sums.

Written for this benchmark; every question stands behind three examples of its kind, drawn with a fixed seed.
"""

from __future__ import annotations

import random

from moekit.decoding.questions import Question

CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin,
Russia Moscow, China Beijing, Japan Tokyo, India Delhi, Egypt Cairo, Greece Athens, Turkey Ankara, Sweden Stockholm,
Norway Oslo, Denmark Copenhagen, Finland Helsinki, Poland Warsaw, Austria Vienna, Hungary Budapest, Belgium Brussels,
Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Thailand Bangkok, Vietnam Hanoi, Iran Tehran,
Iraq Baghdad, Israel Jerusalem, Lebanon Beirut, Syria Damascus, Australia Canberra, Indonesia Jakarta,
Romania Bucharest, Bulgaria Sofia, Ukraine Kyiv, Switzerland Bern, Scotland Edinburgh, Wales Cardiff,
Iceland Reykjavik, Morocco Rabat, Nepal Kathmandu, Pakistan Islamabad, Bangladesh Dhaka, Venezuela Caracas,
Colombia Bogota, Jordan Amman, Nigeria Abuja, Ghana Accra, Ethiopia Addis, Serbia Belgrade, Croatia Zagreb,
Taiwan Taipei, Tunisia Tunis, Estonia Tallinn"""
OPPOSITES = """hot cold, big small, tall short, fast slow, old new, good bad, happy sad, light dark, day night, up down,
left right, open closed, full empty, rich poor, strong weak, hard soft, wet dry, high low, long short, loud quiet,
early late, clean dirty, thick thin, heavy light, wide narrow, deep shallow, sweet sour, true false, first last,
inside outside, above below, black white, north south, east west, love hate, win lose, buy sell, give take, push pull,
start stop, begin end, alive dead, safe dangerous, young old, near far, more less, before after, yes no, male female,
increase decrease, success failure, summer winter, right wrong, asleep awake, cheap expensive"""
PASTS = """go went, see saw, eat ate, run ran, come came, take took, give gave, write wrote, speak spoke, break broke,
drive drove, sing sang, swim swam, begin began, drink drank, know knew, grow grew, throw threw, fly flew, draw drew,
buy bought, bring brought, think thought, teach taught, catch caught, find found, hold held, stand stood, tell told,
sell sold, leave left, feel felt, keep kept, sleep slept, meet met, send sent, spend spent, build built, lose lost,
win won, make made, have had, say said, pay paid, hear heard, sit sat, get got, forget forgot, choose chose, fall fell,
rise rose, ride rode, wear wore, shake shook, hide hid, bite bit, lead led, feed fed, hang hung, dig dug"""
FORMS = {
    "Q: What is the capital of {}?\nA:": CAPITALS,
    "Q: What is the opposite of {}?\nA:": OPPOSITES,
    "Q: What is the past tense of {}?\nA:": PASTS,
}


def short_questions(seed: int) -> list[Question]:
    """All questions but the sums, and as many sums, in an order and behind examples drawn with `seed`.

    Other seeds give the same questions behind other examples: split them by their answers, not by seeds.
    """
    draw, out = random.Random(seed), []
    kinds = [
        [(form.format(asked), right) for asked, right in (pair.split() for pair in words.replace("\n", " ").split(","))]
        for form, words in FORMS.items()
    ]
    kinds.append([(f"Q: What is {a} plus {b}?\nA:", str(a + b)) for a in range(1, 10) for b in range(1, 7)])
    for pairs in kinds:
        for number, (text, right) in enumerate(pairs):
            others = draw.sample([x for place, x in enumerate(pairs) if place != number], 3)
            shown = "".join(f"{asked} {answer}\n" for asked, answer in others)
            out.append(Question(shown + text, right))
    draw.shuffle(out)
    return out
