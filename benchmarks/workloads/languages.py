"""The family of each language.

Source: the genealogical classification of Glottolog 5 (Hammarström, Forkel, Haspelmath and Bank, glottolog.org). A
family here is a top-level family of Glottolog, unless it holds so many of our languages that its branches say more:
Indo-European is split into its branches. Balto-Slavic (balt1263) is taken one step further down, into Eastern Baltic
(east2280; ``baltic`` here) and Slavic (slav1255); ``hellenic``, Ancient with Modern Greek, is Glottolog's Greek, which
stands there under Graeco-Phrygian; Latin stands with the Romance languages in ``italic``. Afro-Asiatic and
Atlantic-Congo are named by the one branch we have (Semitic, Bantu). Glottolog lists Esperanto among the artificial
languages, outside every family, and so do we.

The codes are those of the package simplemma (BCP 47; ``hbs`` is Serbo-Croatian, ``enm`` Middle English, ``grc``
Ancient Greek, ``se`` Northern Sámi, ``gv`` Manx).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

LANGUAGES_BY_FAMILY: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "albanian": {"sq": "Albanian"},
        "armenian": {"hy": "Armenian"},
        "austronesian": {"id": "Indonesian", "ms": "Malay", "tl": "Tagalog"},
        "baltic": {"lt": "Lithuanian", "lv": "Latvian"},
        "bantu": {"sw": "Swahili"},
        "celtic": {"cy": "Welsh", "ga": "Irish", "gd": "Scottish Gaelic", "gv": "Manx"},
        "constructed": {"eo": "Esperanto"},
        "dravidian": {"ml": "Malayalam"},
        "germanic": {
            "da": "Danish",
            "de": "German",
            "en": "English",
            "enm": "Middle English",
            "is": "Icelandic",
            "lb": "Luxembourgish",
            "nb": "Norwegian Bokmål",
            "nl": "Dutch",
            "nn": "Norwegian Nynorsk",
            "sv": "Swedish",
        },
        "hellenic": {"el": "Greek", "grc": "Ancient Greek"},
        "indo-iranian": {"fa": "Persian", "hi": "Hindi"},
        "italic": {
            "ast": "Asturian",
            "ca": "Catalan",
            "es": "Spanish",
            "fr": "French",
            "gl": "Galician",
            "it": "Italian",
            "la": "Latin",
            "pt": "Portuguese",
            "ro": "Romanian",
        },
        "kartvelian": {"ka": "Georgian"},
        "semitic": {"ar": "Arabic", "he": "Hebrew"},
        "slavic": {
            "bg": "Bulgarian",
            "cs": "Czech",
            "hbs": "Serbo-Croatian",
            "mk": "Macedonian",
            "pl": "Polish",
            "ru": "Russian",
            "sk": "Slovak",
            "sl": "Slovene",
            "uk": "Ukrainian",
        },
        "turkic": {"tr": "Turkish"},
        "uralic": {"et": "Estonian", "fi": "Finnish", "hu": "Hungarian", "se": "Northern Sámi"},
    }
)

FAMILY_OF: Mapping[str, str] = MappingProxyType(
    {code: family for family, members in LANGUAGES_BY_FAMILY.items() for code in members}
)
NAME_OF: Mapping[str, str] = MappingProxyType(
    {code: name for members in LANGUAGES_BY_FAMILY.values() for code, name in members.items()}
)


def families_of(languages: Iterable[str]) -> list[str]:
    """The families that these languages belong to, sorted, each once."""
    return sorted({FAMILY_OF[language] for language in languages})
