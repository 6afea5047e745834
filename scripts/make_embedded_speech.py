"""Make the embedded speech: clips of synthesized speech that ship inside the package.

    python scripts/make_embedded_speech.py [--folder ssl_kit/assets/speech]

Needs the program espeak-ng (1.51 made the shipped clips; its output for given arguments does not vary from run to
run). A speaker is an espeak-ng voice and variant with its own pitch and speed. The sentences were written for this
project. Clips are mono, 16 kHz, 16-bit FLAC, with silence trimmed to 0.1 s at both ends and a common active level.
"""

import argparse
import csv
import hashlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16000
LEVEL = 10 ** (-40 / 20)  # RMS over speech; low, because every bit of level costs FLAC 2 KB a second
CLIPS_PER_SPEAKER = 3

SENTENCES = {
    "en": {
        "train": [
            "The ferry leaves at seven, but the fog may keep it in the harbour.",
            "She tuned the old piano with a fork and a great deal of patience.",
            "Please put the blue folder on the shelf next to the window.",
            "A small robot carried eleven cups across the noisy kitchen.",
            "We measured the room twice and still missed the broken tile.",
            "Yesterday the children built a bridge out of paper and string.",
            "His bicycle squeaks whenever he turns left at the bakery.",
            "Rain ran down the glass while the engineers argued about echoes.",
            "Could you tell me which train goes straight to the mountains?",
            "The orchestra waited quietly until somebody found the missing score.",
            "Fresh bread and strong coffee make a long morning shorter.",
            "They walked around the lake and counted thirty nine ducks.",
            "Nobody heard the telephone because the fan was far too loud.",
            "Turn the microphone towards the door and speak as you always do.",
            "My neighbour grows tomatoes, peppers and a very stubborn lemon tree.",
            "The lecture begins in hall four and ends before the library closes.",
        ],
        "valid": [
            "Seven green bottles stood on the wall of the empty garage.",
            "He forgot his umbrella, so he stayed and read another chapter.",
            "The map shows a path that the forest swallowed years ago.",
            "Bring warm gloves, the workshop has no heating after five.",
            "A quiet voice from the corner asked for one more minute.",
            "The clock above the counter has been wrong since Thursday.",
        ],
        "calibration": [
            "Our guide pointed at a star and named it after his dog.",
            "The carpenter checked each joint with her thumb and nodded.",
            "Two buses arrived at once and neither of them was ours.",
            "I would rather repair the lamp than buy another one.",
            "Snow covered the tracks, and the village became very still.",
            "Open the second drawer and hand me the shortest screwdriver.",
            "The parrot repeats the weather report every single evening.",
            "A narrow staircase leads up to the reading room.",
        ],
        "test": [
            "The tide comes in quickly, so keep your shoes on the rocks.",
            "Twelve musicians shared three chairs and a single music stand.",
            "Her answer was brief, polite and entirely unexpected.",
            "Somebody left a warm scarf on the back seat of the taxi.",
            "The baker sold his last loaf before the bells had rung.",
            "When the lights went out, we listened to the old house breathe.",
            "A yellow kite drifted over the stadium and out to sea.",
            "Please repeat the number slowly, the line is full of noise.",
        ],
    },
    "de": {
        "train": [
            "Der alte Leuchtturm steht noch immer am Ende der langen Mole.",
            "Am Morgen roch die ganze Straße nach Brot und nassem Laub.",
            "Kannst du mir bitte erklären, woher dieses Geräusch kommt?",
            "Im Keller summt seit gestern ein ziemlich eigensinniger Motor.",
        ],
        "test": [
            "Wir haben den Schlüssel unter dem dritten Blumentopf gefunden.",
            "Hinter dem Bahnhof wartet ein Mann mit einem roten Koffer.",
            "Die Brücke bleibt bis zum Frühling für Fahrräder gesperrt.",
            "Niemand wusste, warum die Uhr plötzlich rückwärts lief.",
        ],
    },
    "fr": {
        "train": [
            "Le petit marché ouvre ses portes avant le lever du soleil.",
            "Elle a rangé les verres et fermé doucement la fenêtre.",
            "Nous avons perdu la carte, mais le chemin semblait simple.",
            "Un chien dormait devant la porte de la bibliothèque.",
        ],
        "calibration": [
            "La pluie tombait sur le toit comme une chanson sans fin.",
            "Mon frère répare des radios dans un atelier minuscule.",
            "Il faut parler plus fort, le moteur couvre toutes les voix.",
            "Demain, nous prendrons le bateau pour visiter les îles.",
        ],
    },
    "es": {
        "train": [
            "La panadera canta mientras prepara la masa de la tarde.",
            "El tren pasó despacio junto a los campos de girasoles.",
            "Dejé las llaves sobre la mesa y salí sin hacer ruido.",
            "Mi abuela guarda cartas antiguas en una caja de madera.",
        ],
        "valid": [
            "Nadie quiso abrir la ventana porque hacía demasiado viento.",
            "El reloj de la plaza marca siempre la misma hora.",
            "Compramos naranjas, queso y una botella de agua fría.",
            "Habla más cerca del micrófono, por favor, no te oigo bien.",
        ],
    },
    "it": {
        "train": [
            "Il gatto del vicino attraversa il cortile ogni mattina.",
            "Abbiamo aspettato la barca fino al tramonto, senza fretta.",
            "La lezione comincia tardi quando piove sulla collina.",
            "Porta il martello grande e due chiodi molto lunghi.",
        ],
    },
    "pl": {
        "test": [
            "Stary młyn nad rzeką znowu pracuje po długiej zimie.",
            "Dzieci zbudowały latawiec z gazet i cienkich patyków.",
            "Proszę mówić powoli, bo w sali słychać głośne echo.",
            "Wieczorem pociąg stanął w polu i nikt nie wiedział dlaczego.",
        ],
    },
}

# (split, language of the sentences, espeak-ng voice and variant, pitch 0-99, words per minute)
SPEAKERS = [
    ("train", "en", "en-us+m1", 38, 155), ("train", "en", "en-gb+f1", 62, 160), ("train", "en", "en-us+m3", 28, 145),
    ("train", "en", "en-gb-scotland+f2", 70, 150), ("train", "en", "en-029+m4", 45, 165),
    ("train", "en", "en-us+f3", 55, 170), ("train", "en", "en-gb-x-rp+m7", 50, 150),
    ("train", "en", "en-us-nyc+f5", 48, 158), ("train", "en", "en-gb-x-gbclan+klatt", 40, 150),
    ("train", "en", "en-gb+Andy", 35, 168), ("train", "en", "en-us+Annie", 66, 152),
    ("train", "de", "de+m2", 42, 150), ("train", "de", "de+f4", 60, 145), ("train", "fr", "fr-fr+f2", 58, 150),
    ("train", "es", "es+m6", 46, 160), ("train", "it", "it+f1", 64, 155),
    ("valid", "en", "en-us+m5", 33, 150), ("valid", "en", "en-gb+linda", 58, 155),
    ("valid", "es", "es-419+f3", 52, 155),
    ("calibration", "en", "en-us+m8", 52, 160), ("calibration", "en", "en-gb+f4", 50, 150),
    ("calibration", "en", "en-gb-x-gbcwmd+Alex", 36, 155), ("calibration", "en", "en-us+belinda", 68, 148),
    ("calibration", "fr", "fr-be+m1", 44, 145),
    ("test", "en", "en-us+m6", 30, 158), ("test", "en", "en-gb+f5", 72, 150), ("test", "en", "en-us+steph", 60, 160),
    ("test", "en", "en-gb-scotland+m2", 42, 148), ("test", "en", "en-029+Alicia", 54, 155),
    ("test", "de", "de+m3", 37, 150), ("test", "pl", "pl+f2", 56, 150),
]
COLUMNS = ["file", "speaker", "split", "language", "voice", "pitch", "words_per_minute", "sentence", "duration_s",
           "sha256"]


def synthesize(sentence: str, voice: str, pitch: int, words_per_minute: int) -> np.ndarray:
    "Speech of one sentence at 16 kHz, float64 (sample,)."
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(words_per_minute), "--stdout", sentence]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    # espeak-ng streams: its header does not know the length, so the samples are taken from behind the 44 bytes
    rate = int.from_bytes(wave[24:28], "little")
    samples = np.frombuffer(wave[44:len(wave) - len(wave) % 2], dtype="<i2") / 32768
    if np.abs(samples).max(initial=0) < 0.01:
        raise RuntimeError(f"{' '.join(command)} made no sound; is the voice installed?")
    return soxr.resample(samples, rate, SAMPLE_RATE, quality="VHQ")


def tidy(samples: np.ndarray) -> np.ndarray:
    "Trim to 0.1 s around the speech, set the level of its active 20 ms frames, keep the peak below full scale."
    frame = SAMPLE_RATE // 50
    power = np.square(samples[:len(samples) // frame * frame]).reshape(-1, frame).mean(axis=1)
    active = np.flatnonzero(power > power.max() * 1e-4)
    start, stop = max(0, active[0] * frame - SAMPLE_RATE // 10), (active[-1] + 1) * frame + SAMPLE_RATE // 10
    return samples[start:stop] * LEVEL / np.sqrt(power[active].mean())


def encode(samples: np.ndarray) -> bytes:
    "16-bit FLAC at the highest compression level."
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return buffer.getvalue()


def make(folder: Path) -> list[dict]:
    "Write all clips and index.csv into the folder; return the rows of the index."
    folder.mkdir(parents=True, exist_ok=True)
    rows, used = [], {}
    for number, (split, language, voice, pitch, speed) in enumerate(SPEAKERS):
        speaker = f"voice{number:02d}"
        sentences = SENTENCES[language][split]
        first = used.get((split, language), 0)  # the next speaker goes on where the last one stopped
        used[split, language] = first + CLIPS_PER_SPEAKER
        for clip in range(CLIPS_PER_SPEAKER):
            sentence = sentences[(first + clip) % len(sentences)]
            samples = tidy(synthesize(sentence, voice, pitch, speed))
            data, name = encode(samples), f"{speaker}-{clip}.flac"
            (folder / name).write_bytes(data)
            rows.append(dict(zip(COLUMNS, [name, speaker, split, language, voice, pitch, speed, sentence,
                                           f"{len(samples) / SAMPLE_RATE:.4f}", hashlib.sha256(data).hexdigest()],
                                 strict=True)))
    with open(folder / "index.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "ssl_kit" / "assets" / "speech"
    parser.add_argument("--folder", type=Path, default=default, help="where the clips go")
    arguments = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        print("espeak-ng is not installed; install it with your system's package manager", file=sys.stderr)
        return 1
    rows = make(arguments.folder)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    seconds = sum(float(row["duration_s"]) for row in rows)
    print(f"{len(rows)} clips of {len(SPEAKERS)} speakers, {seconds / 60:.1f} minutes, {size / 1e6:.2f} MB")
    return 0 if size < 5e6 else 1


if __name__ == "__main__":
    sys.exit(main())
