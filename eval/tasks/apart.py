"""What a mean over tasks must not mix in silently, by names that are known: MMLU, and tasks in a language."""

from __future__ import annotations

import re

from .languages import CODES, OF_ONE_LANGUAGE, WORDS

MMLU = "MMLU"
IS_MMLU = re.compile("mmlu|^hendryckstest")
# Behind these names a word of two or three letters may be a language's code, as in xnli_de.
FAMILIES = (
    "african_flores afridiacritics afrimgsm afrimmlu afriqa afrisenti afrixnli agieval_logiqa arc belebele "
    "bertaqa boolqa careqa cocoteros copa copal eqbench flores global_mmlu global_piqa glianorex headqa hellaswag "
    "ifeval indicxnli injongointent iwslt2017 lambada_openai_mt longbench_multifieldqa "
    "longbench_passage_retrieval m_mmlu mafand masakhaner masakhanews masakhapos mela mgsm mlqa mmlu mmmlu "
    "multiblimp naijarc nollysenti ntrex openai_mmlu openbookqa parafrases paws pawsx phrases piqa pisa salt sib "
    "siqa summarization translation truthfulqa tydiqa wmt14 wmt16 wnli xcopa xlsum xnli xquad xstorycloze "
    "xwinograd"
)
OF_LANGUAGES = re.compile(rf"(?:aradice_|leaderboard_|uhura[_-])?(?:{FAMILIES.replace(' ', '|')})[_-]")
SCRIPT = re.compile(r"_([a-z]{3})_[A-Z][a-z]{3}(?:_|$)")  # belebele_deu_Latn


def part(task: str) -> str | None:
    """MMLU, or the language other than English that the name of the task carries, as "de"; None for any other task.

    An MMLU in a language is of that language. Of two languages the first that is not English is meant.
    """
    name = task.lower()
    first, *others = re.split(r"[_-]+", name)
    found = [code for words, code in OF_ONE_LANGUAGE.items() if re.fullmatch(words, first)]
    if others[-1:] in (["en"], ["eng"]):  # a translation, as hrm8k_en
        found = []
    if script := SCRIPT.search(task):
        found.append(CODES.get(script[1], script[1]))
    if family := OF_LANGUAGES.match(name):
        found += [CODES[word] for word in re.split(r"[_-]+", name[family.end() :]) if word in CODES]
    found += [WORDS[word] for word in (first, *others) if word in WORDS]
    return next((code for code in found if code != "en"), MMLU if IS_MMLU.search(name) else None)
