"""Writes the embedded quickstart data: short messages that patients send to eight clinics.

Every sentence core, side remark and reply was written by hand (folder ``clinic/phrases``).
This script splits them into a train and a test part, then joins them into messages in the
manner of each site. Run ``python -m simulations.data.make_clinic``; the same files come out
each time, byte for byte.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simulations.data.clinic_text import (
    AMERICAN,
    DAYS,
    FIRST_PERSON,
    SUBJECT_SLOTS,
    TYPOS,
    Patient,
    close,
    roughen,
    sentence_case,
    swap,
)

FOLDER = Path(__file__).parent / "clinic"
SEED = 20240611
ROWS = {"train": 400, "test": 100}
LABELS = (
    "cardiology",
    "dermatology",
    "orthopaedics",
    "paediatrics",
    "gastroenterology",
    "billing-and-records",
)
HELD_OUT_SITUATIONS = 0.2  # share of situations that only the test part uses
HELD_OUT_CORES = 0.3  # share of the other situations that give one core to the test part
MAX_SIMILARITY = 0.5
KIN: dict[str, tuple[tuple[str, bool], ...]] = {
    "18-39": (
        ("my brother", False),
        ("my sister", True),
        ("my boyfriend", False),
        ("my girlfriend", True),
        ("my husband", False),
        ("my wife", True),
        ("my flatmate", False),
    ),
    "40-64": (
        ("my husband", False),
        ("my wife", True),
        ("my mum", True),
        ("my dad", False),
        ("my brother", False),
        ("my sister", True),
    ),
    "65+": (
        ("my mum", True),
        ("my dad", False),
        ("my nan", True),
        ("my grandad", False),
        ("my aunt", True),
        ("my uncle", False),
        ("my husband", False),
        ("my wife", True),
        ("my father", False),
        ("my mother", True),
    ),
    "baby": (("our baby", False), ("our baby", True), ("my little one", True)),
    "small": (("my little one", False), ("our little girl", True), ("my little boy", False)),
    "school": (("our eldest", False), ("our youngest", True)),
    "teen": (("our teenager", False), ("our eldest", True)),
    "any child": (("my son", False), ("my daughter", True), ("our son", False)),
}
YEARS = {"18-39": (19, 39), "40-64": (41, 64), "65+": (66, 88)}
CHILD_YEARS = {"small": (2, 5), "school": (6, 11), "teen": (13, 17)}
NUMBER = re.compile(r"\d|\b(year|years|twins|both of|grade|two|three|four|seven|eight|ten)\b", re.I)
GRAVE = re.compile(r"ambulance|emergency|poison line|at once|straight|immediately|condolences|loss")


@dataclass(frozen=True)
class Core:
    """One hand-written way to say what a situation is about."""

    text: str
    label: str
    ages: tuple[str, ...]
    stages: tuple[str, ...]
    sex: str
    own_voice: bool
    sites: tuple[str, ...]
    replies: tuple[str, ...]


def read(name: str) -> Any:
    """Loads one phrase file."""
    with (FOLDER / "phrases" / f"{name}.yaml").open(encoding="utf-8") as stream:
        return yaml.safe_load(stream)


def replies_for(entries: list[Any], position: int) -> tuple[str, ...]:
    """Picks the replies that answer the core at a position; plain strings answer all cores."""
    fitting = (e if isinstance(e, str) else e["text"] * (position in e["cores"]) for e in entries)
    return tuple(reply for reply in fitting if reply)


def split_cores(rng: random.Random) -> dict[str, list[Core]]:
    """Reads the bank and parts it, before any message is composed, into train and test."""
    parts: dict[str, list[Core]] = {"train": [], "test": []}
    for label in LABELS:
        bank = read(label)
        held_out = set(rng.sample(range(len(bank)), round(HELD_OUT_SITUATIONS * len(bank))))
        for number, item in enumerate(bank):
            cores = [
                Core(
                    text=text,
                    label=label,
                    ages=tuple(item["ages"]),
                    stages=tuple(item.get("stages", ())),
                    sex=item.get("sex", ""),
                    own_voice=item.get("voice") == "self",
                    sites=tuple(item.get("sites", ())),
                    replies=replies_for(item["replies"], position),
                )
                for position, text in enumerate(item["cores"], 1)
            ]
            rng.shuffle(cores)
            gives_one = len(cores) > 2 and rng.random() < HELD_OUT_CORES
            cut = len(cores) if number in held_out else int(gives_one)
            parts["test"] += cores[:cut]
            parts["train"] += cores[cut:]
    return parts


def stems(text: str) -> set[str]:
    """Returns the first four letters of the longer words, to keep remarks from repeating."""
    return {word[:4] for word in re.findall(r"[a-z]{4,}", text.lower())}


def choose_patient(core: Core, site: dict[str, Any], rng: random.Random) -> Patient:
    """Draws the patient's age band and whether somebody else does the writing."""
    band = rng.choices(core.ages, [site["ages"].get(age, 3) for age in core.ages])[0]
    if core.own_voice:
        return Patient(band)
    if band == "0-17":
        pool = KIN["any child"] + KIN[rng.choice(core.stages)]
    elif FIRST_PERSON.search(core.text) or rng.random() >= site["relative"]:
        return Patient(band)
    else:
        pool = KIN[band]
    kin, female = rng.choice([k for k in pool if k[1] or not core.sex])
    return Patient(band, kin, female)


def age_remark(core: Core, patient: Patient, rng: random.Random) -> str:
    """Returns a half sentence with the patient's age where the core leaves room for it."""
    if NUMBER.search(core.text) or core.own_voice or rng.random() > 0.14:
        return ""
    if patient.band == "0-17":
        stage = rng.choice(core.stages)
        if stage not in CHILD_YEARS or len(core.stages) > 1:
            return ""
        return f"<he> is {rng.randint(*CHILD_YEARS[stage])}"
    return f"<I> <am> {rng.randint(*YEARS[patient.band])}"


def compose(core: Core, site: dict[str, Any], shared: dict[str, Any], rng: random.Random) -> Any:
    """Builds one row of the data set around a core."""
    patient = choose_patient(core, site, rng)
    rates, calm = site["rates"], not any(GRAVE.search(r[:70]) for r in core.replies)
    pieces: list[str] = []
    group = "records" if core.label == "billing-and-records" else "adult"
    if patient.band == "0-17" and group == "adult":
        group = "child"
    if rng.random() < rates["greeting"]:
        pieces.append(rng.choice(site["greetings"]))
    intro = "intros_relative" if patient.kin else "intros"
    intro = "intros_child" if patient.band == "0-17" else intro
    nameless = patient.band == "0-17" and not SUBJECT_SLOTS.search(core.text)
    if not core.own_voice and (nameless or rng.random() < rates["intro"]):
        pieces.append(close(rng.choice(site[intro])))
    pieces.append(close(core.text))
    asking = core.text.endswith("?")
    if group != "records" and (remark := age_remark(core, patient, rng)):
        pieces.append(close(remark))
    if calm and not core.own_voice and rng.random() < rates["side"] * (0.5 if asking else 1.0):
        sides = [s for kind in shared[group] if kind != core.label for s in shared[group][kind]]
        used = stems(core.text)
        pieces.append(close(rng.choice([s for s in sides if not stems(s) & used])))
    if not asking and calm and rng.random() < rates["ask"]:
        pieces.append(close(rng.choice((shared if group == "records" else site)["asks"])))
    if rng.random() < rates["closer"]:
        pieces.append(rng.choice(site["closers"]))
    text = sentence_case(" ".join(patient.fill(p, rng, site["currency"]) for p in pieces))
    if site["spelling"] == "american":
        text = swap(text, AMERICAN, rng, 1.0)
    text = roughen(text, site["register"], rng)
    if rng.random() < site["typos"]:
        text = swap(text, TYPOS, rng, 0.35)
    reply = make_reply(core, patient, site, shared, rng)
    return {
        "text": text,
        "label": core.label,
        "site": site["slug"],
        "age_band": patient.band,
        "prompt": text,
        "completion": reply,
    }


def make_reply(core: Core, patient: Patient, site: dict[str, Any], shared: dict[str, Any], rng: random.Random) -> str:
    """Writes the answer of the clinic's staff, one or two sentences long."""
    american = site["spelling"] == "american"
    time = f"{rng.randint(8, 16)}{':' if american else '.'}{rng.choice(('00', '15', '30', '40'))}"
    if not patient.known and not core.stages:
        patient.kin = ""  # the text names nobody, so staff answer the writer
    reply = rng.choice(core.replies).replace("<slot>", f"{rng.choice(DAYS)} at {time}")
    reply = patient.fill(patient.address(reply), rng, site["currency"])
    one_sentence = len(re.findall(r"[.?!](?: |$)", reply)) == 1
    if one_sentence and not GRAVE.search(reply) and rng.random() < 0.7:
        kind = "records" if core.label == "billing-and-records" else "symptoms"
        reply += " " + rng.choice(shared[f"reply_{kind}"])
    if not reply.startswith("Thank") and rng.random() < 0.25:
        reply = f"{rng.choice(site['hellos'])} {reply[0].lower()}{reply[1:]}"
    return swap(reply, AMERICAN, rng, 1.0) if american else reply


def normal(text: str) -> str:
    """Lowercases a text and strips punctuation, for comparisons."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def shingles(text: str) -> frozenset[str]:
    """Returns the set of three-word runs of a text."""
    words = normal(text).split()
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


class Neighbours:
    """Finds the highest Jaccard similarity of a text to a set of texts, on 3-word runs."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._rows: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Adds one text to the set."""
        runs = shingles(text)
        for run in runs:
            self._rows[run].append(len(self._sizes))
        self._sizes.append(len(runs))

    def nearest(self, text: str) -> float:
        """Returns the similarity of the text to its nearest neighbour in the set."""
        runs = shingles(text)
        shared = Counter(row for run in runs for row in self._rows.get(run, ()))
        return max((n / (len(runs) + self._sizes[r] - n) for r, n in shared.items()), default=0.0)


def label_counts(mix: dict[str, int], rows: int) -> dict[str, int]:
    """Turns the percentages of a site into row counts."""
    if sum(mix.values()) != 100:
        raise ValueError(f"label mix adds up to {sum(mix.values())}, not 100")
    return {label: mix[label] * rows // 100 for label in LABELS}


def build() -> dict[str, list[dict[str, str]]]:
    """Makes all rows of both parts."""
    parts = split_cores(random.Random(f"{SEED}:split"))
    sites, shared = read("sites"), read("shared")
    out: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    seen: set[str] = set()
    train_texts = Neighbours()
    for part, rows in out.items():
        uses: Counter[str] = Counter()
        for site in sites:
            rng = random.Random(f"{SEED}:{part}:{site['slug']}")
            made: list[dict[str, str]] = []
            for label, count in label_counts(site["mix"], ROWS[part]).items():
                pool = [c for c in parts[part] if c.label == label]
                pool = [c for c in pool if not c.sites or site["slug"] in c.sites]
                goal = len(made) + count
                for _ in range(count * 50):
                    if len(made) == goal:
                        break
                    core = pick(pool, uses, site["length"], rng)
                    row = compose(core, site, shared, rng)
                    key, words = normal(row["text"]), len(row["text"].split())
                    too_near = part == "test" and train_texts.nearest(row["text"]) >= MAX_SIMILARITY
                    if key in seen or too_near or not 4 <= words <= 60:
                        continue
                    seen.add(key)
                    uses[core.text] += 1
                    made.append(row)
                if len(made) != goal:
                    raise RuntimeError(f"too few distinct {label} messages for {site['slug']}")
            rng.shuffle(made)
            out[part] += made
        for row in rows if part == "train" else ():
            train_texts.add(row["text"])
    return out


def pick(pool: list[Core], uses: Counter[str], length: str, rng: random.Random) -> Core:
    """Draws one of the least used cores, of a length that suits the site."""
    sample = rng.sample(pool, min(len(pool), 12))
    sign = {"short": 1, "long": -1}.get(length, 0)
    return min(sample, key=lambda c: uses[c.text] + sign * len(c.text.split()) / 12)


def main() -> None:
    """Writes train.jsonl and test.jsonl."""
    for part, rows in build().items():
        with (FOLDER / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
