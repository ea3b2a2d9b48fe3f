"""What a mean over tasks must not mix in silently, by the tasks' names: MMLU, and tasks in a language."""

from __future__ import annotations

import re

MMLU = "MMLU"
IS_MMLU = re.compile(r"(^|_)mmlu")
CODES = (
    "ar bg bn ca cs da de el en es et eu fa fi fr gl gu he hi hr ht hu hy id it ja kn ko lt ml mr ms my ne nl pl pt qu "
    "ro ru sk sr sv sw ta te th tr uk ur vi yo zh zu"
)
WORDS = {  # of names, what they mean
    **{"arabic": "ar", "basque": "eu", "catalan": "ca", "chinese": "zh", "english": "en", "french": "fr"},
    **{"galician": "gl", "german": "de", "italian": "it", "japanese": "ja", "korean": "ko", "polish": "pl"},
    **{"portuguese": "pt", "russian": "ru", "spanish": "es", "turkish": "tr"},
    **{
        "arabicmmlu": "ar",
        "ceval": "zh",
        "cmmlu": "zh",
        "greekmmlu": "el",
        "kmmlu": "ko",
        "turkishmmlu": "tr",
    },
}
SCRIPT = re.compile(r"_([a-z]{3})_[A-Z][a-z]{3}(?:_|$)")  # belebele_deu_Latn


def part(task: str) -> str | None:
    """MMLU, or the language that the name of the task carries, as "de"; None for any other task.

    An MMLU in a language is of that language. Of two languages, as in mgsm_en_cot_de, the last one is meant.
    """
    if found := SCRIPT.search(task):
        return found[1]
    words = re.split(r"[_-]", task.lower())
    of_language = [WORDS.get(word, word) for word in words if word in WORDS or word in CODES.split()]
    return of_language[-1] if of_language else MMLU if IS_MMLU.search(task) else None
