"""Languages in names of lm-eval's tasks: codes, words, and tasks that are all in one language."""

from __future__ import annotations

TWO = (
    "am ar as az be bg bn bo br ca co cs cy da de el en eo es et eu fa ff fi fo fr ga gd gl gn gu ha he hi hr ht hu "
    "hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo lt lv mg mi mk ml mn mr ms my ne nl no ny om or pa pl "
    "ps pt qu rn ro ru rw sd si sk sl sn so sq sr ss st su sv sw ta te tg th ti tk tl tn tr ts tw uk ur uz vi wo xh "
    "yi yo zh zu"
)
THREE = (  # the same in two letters; dialects of Arabic are one, and forms of Norwegian
    "afr:af als:sq sqi:sq amh:am ara:ar arb:ar acm:ar acq:ar aeb:ar apc:ar ars:ar ary:ar arz:ar "
    "asm:as azj:az azb:az aze:az bel:be ben:bn bod:bo bre:br bul:bg cat:ca ces:cs ckb:ku cym:cy dan:da deu:de "
    "ekk:et ell:el eng:en est:et eus:eu ewe:ee fao:fo fas:fa pes:fa prs:fa fin:fi fra:fr fuv:ff gaz:om orm:om gle:ga "
    "gla:gd glg:gl grn:gn guj:gu hat:ht hau:ha heb:he hin:hi hrv:hr hun:hu hye:hy ibo:ig ind:id isl:is ita:it jav:jv "
    "jpn:ja kan:kn kat:ka kaz:kk khk:mn khm:km kin:rw kir:ky kmr:ku kor:ko lao:lo lat:la lav:lv lvs:lv lin:ln lit:lt "
    "ltz:lb lug:lg mal:ml mar:mr mkd:mk mlt:mt mri:mi mya:my nld:nl nno:no nob:no nor:no npi:ne nya:ny ory:or pan:pa "
    "pbt:ps plt:mg pol:pl por:pt ron:ro run:rn rus:ru san:sa sin:si slk:sk slv:sl sna:sn snd:sd som:so sot:st spa:es "
    "srp:sr ssw:ss sun:su swa:sw swh:sw swe:sv tam:ta tel:te tgk:tg tgl:tl tha:th tir:ti tsn:tn tso:ts tuk:tk tur:tr "
    "twi:tw uig:ug ukr:uk urd:ur uzb:uz uzn:uz vie:vi wol:wo xho:xh yor:yo zho:zh zsm:ms zul:zu bam:bm fil:tl cmn:zh"
)
ALONE = (  # without two letters
    "abk ach afb aka aln apu aqz arq azz bbj bcc bem bgc bho bor bos bra bsk btx bua bxr ceb chu cjk ckm cls dhd dik "
    "dje dyu ekp fon frm fro got grc haw hbo hbs hit hsb hyw idu ilo iso kab kac kam kbp kea kik kmb knc koi kon kpv "
    "krl kxh lgg lij lua luo mag mdf mni mos myv nag nds nhi nso nus nyn olo orv ota pcm quc rwr sag sah shn sme sms "
    "swv taq teo tpn ttc tum tzm umb urb urh vai vep war wbp xcl xnr xpg yrl yue"
)
CODES = {  # as they are in names, each with the one by which its language is called
    **{code: code for code in (TWO + " " + ALONE).split()},
    **dict(pair.split(":") for pair in THREE.split()),
    "jp": "ja",
    "va": "ca",
}
NAMES = (
    "albanian:sq amharic:am arabic:ar armenian:hy azerbaijani:az basque:eu belarusian:be bengali:bn bulgarian:bg "
    "catalan:ca chinese:zh croatian:hr dutch:nl english:en estonian:et farsi:fa finnish:fi french:fr galician:gl "
    "georgian:ka german:de greek:el hausa:ha hebrew:he hindi:hi hungarian:hu igbo:ig indonesian:id icelandic:is "
    "italian:it japanese:ja kannada:kn kazakh:kk kirundi:rn korean:ko lithuanian:lt macedonian:mk malay:ms "
    "malayalam:ml nepali:ne norwegian:no oromo:om persian:fa pidgin:pcm polish:pl portuguese:pt russian:ru "
    "serbian:sr somali:so spanish:es swahili:sw swedish:sv tagalog:tl tamil:ta telugu:te tigrinya:ti turkish:tr "
    "ukrainian:uk urdu:ur uyghur:ug uzbek:uz vietnamese:vi yoruba:yo"
)
WORDS = dict(pair.split(":") for pair in NAMES.split())
OF_ONE_LANGUAGE = {  # what the first word of a task's name matches
    "aexams|aradice|arab.*|darija.*|egy(mmlu|hellaswag)": "ar",
    "bangla": "bn",
    "cabbq|cabreu|catalanqa|catcola|cieacova|coqcat|parafraseja|teca": "ca",
    "greekmmlu": "el",
    "esbbq|escola|noticia": "es",
    "basque|bec2016eu|bhtc|epec|eus|vaxx|qnlieu|wiceu": "eu",
    "galcola": "gl",
    "evalita.*": "it",
    "ja|jfinqa": "ja",
    "click|csatqa|haerae|hrm8k|kbl|kmmlu|kobest|kormedmcqa": "ko",
    "nor(belebele|commonsenseqa|ec|idiom|openbookqa|quad|rewrite|summ|summarize|truthfulqa)|nrk": "no",
    "polemo2": "pl",
    "assin2?": "pt",
    "libra|ru": "ru",
    "turblimp|turkishmmlu": "tr",
    "aclue|ceval|cmmlu|tmlu|tmmluplus|zhoblimp": "zh",
}
