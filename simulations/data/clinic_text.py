"""Turns hand-written sentence pieces into finished clinic messages.

Pieces carry slots in angle brackets. A writer speaks either for themselves or for somebody
else, and the slots follow: ``<I> wake<s>`` becomes "I wake" or "my mother wakes", and "she
wakes" once the mother has been mentioned. The other half of the module gives a finished
message the manner of its site: chat style, simple English, American spelling, typing errors.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

SUBJECT_SLOTS = re.compile(r"<(I|I'm|I've|me|my|mine|he|he's|him|his)>")
FIRST_PERSON = re.compile(r"(?<!<)\b(I|I'm|I've|I'd|me|my|we|us|our|mum|dad)\b(?!>)")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "October", "November")
SPANS = {
    "days": ("three days", "four days", "five days", "six days", "nearly a week", "over a week"),
    "weeks": ("two weeks", "three weeks", "four weeks", "five weeks", "about a month", "six weeks"),
    "months": ("two months", "three months", "four months", "five months", "half a year"),
}
TERSE = {
    "please": "pls", "you": "u", "your": "ur", "because": "cos", "appointment": "appt",
    "weeks": "wks", "months": "mths", "about": "abt", "tomorrow": "tmrw", "doctor": "dr",
    "thanks": "thx", "and": "&", "are": "r", "minutes": "mins", "hours": "hrs", "with": "w/",
    "really": "rly", "something": "smth", "before": "b4", "though": "tho", "without": "w/o",
}  # fmt: skip
AMERICAN = {
    "mum": "mom", "nan": "grandma", "grandad": "grandpa", "colour": "color",
    "colouring": "coloring", "nappy": "diaper", "nappies": "diapers", "telly": "TV",
    "nursery": "daycare", "paracetamol": "Tylenol", "chemist": "pharmacy", "holiday": "vacation",
    "diarrhoea": "diarrhea", "anaesthetist": "anesthesiologist", "anaesthetic": "anesthesia",
    "physio": "PT", "jabs": "shots", "jab": "shot", "wee": "pee", "poo": "poop", "loo": "restroom",
    "tummy": "belly", "creche": "daycare", "coeliac": "celiac", "gynaecologist": "OB-GYN",
    "orthopaedist": "orthopedist", "grey": "gray", "lorry": "truck", "grommets": "ear tubes",
    "football": "soccer", "trousers": "pants", "jumper": "sweater", "GP": "primary",
    "queue": "line", "kilos": "kilos", "mobile": "cell", "licence": "license", "fibre": "fiber",
    "programme": "program", "metres": "meters", "litre": "liter", "litres": "liters",
    "oestrogen": "estrogen", "specialise": "specialize", "pram": "stroller", "cot": "crib",
}  # fmt: skip
TYPOS = {
    "appointment": "appointement", "because": "becuase", "receive": "recieve", "weird": "wierd",
    "stomach": "stomache", "swollen": "swolen", "really": "realy", "doctor": "docter",
    "tomorrow": "tommorow", "until": "untill", "since": "sinse", "breathe": "breath",
    "definitely": "definately", "medicine": "medecine", "their": "thier", "through": "thru",
    "with": "wiht", "again": "agian", "tablet": "tablett", "which": "wich", "different": "diffrent",
    "it's": "its", "there's": "theres", "don't": "dont", "can't": "cant", "won't": "wont",
    "I've": "Ive", "I'm": "Im", "insurance": "insurence", "itches": "iches", "believe": "beleive",
}  # fmt: skip
LONG_FORMS = {
    "I'm": "I am", "I've": "I have", "I'd": "I would", "it's": "it is", "there's": "there is",
    "don't": "do not", "doesn't": "does not", "can't": "cannot", "won't": "will not",
    "isn't": "is not", "didn't": "did not", "that's": "that is", "we're": "we are",
    "everything's": "everything is", "haven't": "have not", "wasn't": "was not",
    "she's": "she is", "he's": "he is", "what's": "what is", "aren't": "are not",
}  # fmt: skip
VERBS = {"am": "is", "was": "was", "have": "has", "s": "s", "es": "es", "y": "ies", "do": "does"}
OWN_VERBS = {"am": "am", "was": "was", "have": "have", "s": "", "es": "", "y": "y", "do": "do"}


@dataclass
class Patient:
    """Who a message is about and how the writer refers to that person.

    Attributes:
        band: Age band of the patient.
        kin: How the writer calls the patient ("my mother"); empty if they are the same person.
        female: Whether "she" or "he" is used for somebody else.
        known: Whether the text has already mentioned the person, so that pronouns may follow.
    """

    band: str
    kin: str = ""
    female: bool = False
    known: bool = False

    def fill(self, piece: str, rng: random.Random, currency: str) -> str:
        """Replaces every slot of a piece, left to right."""

        def slot(match: re.Match[str]) -> str:
            name = match.group(1)
            if name in SPANS:
                return rng.choice(SPANS[name])
            if name == "day":
                return rng.choice(DAYS)
            if name == "month":
                return rng.choice(MONTHS)
            if name == "amount":
                return f"{currency}{rng.choice((38, 45, 62, 85, 110, 140, 185, 240, 390, 615))}"
            if name == "kin":
                self.known = True
                return self.kin
            if name in VERBS:
                return VERBS[name] if self.kin else OWN_VERBS[name]
            return self._mention(name)

        return re.sub(r"<([A-Za-z']+)>", slot, piece)

    def _mention(self, name: str) -> str:
        """Returns the word for a person slot such as I, me or my."""
        case = {"he": "I", "he's": "I'm", "him": "me", "his": "my"}.get(name, name)
        if case not in ("I", "I'm", "I've", "me", "my", "mine"):
            raise ValueError(f"unknown slot <{name}> in a phrase")
        if not self.kin:
            return case
        if not self.known and case != "mine":
            self.known = True
            ending = {"I'm": " is", "I've": " has", "my": "'s"}.get(case, "")
            return self.kin + ending
        own = {"I": "she", "I'm": "she's", "I've": "she has", "me": "her", "my": "her"}
        other = {"I": "he", "I'm": "he's", "I've": "he has", "me": "him", "my": "his"}
        if case == "mine":
            return "hers" if self.female else "his"
        return (own if self.female else other)[case]

    def address(self, reply: str) -> str:
        """Fills the slots of a reply, in which staff speak to the writer."""
        words = {"you": "you", "youo": "you", "your": "your", "are": "are"}
        if self.kin:
            she = ("she", "her", "her") if self.female else ("he", "him", "his")
            words = {"you": she[0], "youo": she[1], "your": she[2], "are": "is"}
        words |= {"him": "her" if self.female else "him"}
        return re.sub(r"<(youo?|your|are|him)>", lambda m: words[m.group(1)], reply)


def swap(text: str, table: Mapping[str, str], rng: random.Random, share: float) -> str:
    """Replaces whole words by a table, each with the given probability, keeping capitals."""

    def one(match: re.Match[str]) -> str:
        word = match.group(0)
        new = table.get(word) or table.get(word.lower())
        if new is None or rng.random() >= share:
            return word
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+(?:'[a-z]+)?", one, text)


def sentence_case(text: str) -> str:
    """Capitalises the first letter of the text and of every sentence in it."""
    return re.sub(r"(^|[.?!] +)([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def close(piece: str) -> str:
    """Ends a piece with a full stop unless it already ends a sentence."""
    return piece if piece[-1] in ".?!,:" else piece + "."


def roughen(text: str, register: str, rng: random.Random) -> str:
    """Gives a finished message the manner of its site."""
    if register == "terse":
        text = swap(text.lower(), TERSE, rng, 0.5)
        text = re.sub(r"'(?=[a-z]{1,2}\b)", "", text) if rng.random() < 0.6 else text
        return re.sub(r"\.$", "", text) if rng.random() < 0.8 else text
    if register in ("formal", "simple"):
        text = swap(text, LONG_FORMS, rng, 1.0)
    if register == "simple":
        spans = r"\bfor (?=(two|three|four|five|six|about a|nearly a|over a|half a)\b)"
        text = re.sub(spans, "since ", text)
        text = re.sub(r"\b(the|a|an) (?=[a-z])", lambda m: m[0] if rng.random() > 0.3 else "", text)
    return text
