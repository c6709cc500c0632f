"""Charlson comorbidity from ICD-9-CM and ICD-10 codes.

Groups: Quan et al., Med Care 2005, 43(11):1130-9, enhanced ICD-9-CM and ICD-10. Weights: Charlson et al. 1987, without points
for age (the age stands beside it). A severe form replaces its mild one: liver, diabetes, cancer.
"""

import re
from collections.abc import Iterable

import numpy as np

_ICD = re.compile(r"(?:DIAGNOSIS//ICD//(9|10)//|ICD(9|10)CM/)([A-Z0-9.]+)")

# weight, ICD-9-CM, ICD-10. A code belongs to a group if it begins with one of its stems, or lies between two of a length.
GROUPS: dict[str, tuple[int, str, str]] = {
    "myocardial infarction": (1, "410 412", "I21 I22 I252"),
    "congestive heart failure": (
        1,
        "39891 40201 40211 40291 40401 40403 40411 40413 40491 40493 4254-4259 428",
        "I099 I110 I130 I132 I255 I420 I425-I429 I43 I50 P290",
    ),
    "peripheral vascular disease": (
        1,
        "0930 4373 440 441 4431-4439 4471 5571 5579 V434",
        "I70 I71 I731 I738 I739 I771 I790 I792 K551 K558 K559 Z958 Z959",
    ),
    "cerebrovascular disease": (1, "36234 430-438", "G45 G46 H340 I60-I69"),
    "dementia": (1, "290 2941 3312", "F00-F03 F051 G30 G311"),
    "chronic pulmonary disease": (
        1,
        "4168 4169 490-505 5064 5081 5088",
        "I278 I279 J40-J47 J60-J67 J684 J701 J703",
    ),
    "rheumatic disease": (1, "4465 7100-7104 7140-7142 7148 725", "M05 M06 M315 M32-M34 M351 M353 M360"),
    "peptic ulcer disease": (1, "531-534", "K25-K28"),
    "mild liver disease": (
        1,
        "07022 07023 07032 07033 07044 07054 0706 0709 570 571 5733 5734 5738 5739 V427",
        "B18 K700-K703 K709 K713-K715 K717 K73 K74 K760 K762-K764 K768 K769 Z944",
    ),
    "diabetes": (
        1,
        "2500-2503 2508 2509",
        "E100 E101 E106 E108-E111 E116 E118-E121 E126 E128-E131 E136 E138-E141 E146 E148 E149",
    ),
    "diabetes with complications": (
        2,
        "2504-2507",
        "E102-E105 E107 E112-E115 E117 E122-E125 E127 E132-E135 E137 E142-E145 E147",
    ),
    "hemiplegia or paraplegia": (
        2,
        "3341 342 343 3440-3446 3449",
        "G041 G114 G801 G802 G81 G82 G830-G834 G839",
    ),
    "renal disease": (
        2,
        "40301 40311 40391 40402 40403 40412 40413 40492 40493 582 5830-5837 585 586 5880 V420 V451 V56",
        "I120 I131 N032-N037 N052-N057 N18 N19 N250 Z490-Z492 Z940 Z992",
    ),
    "cancer": (
        2,
        "140-172 174-194 1950-1958 200-208 2386",
        "C00-C26 C30-C34 C37-C41 C43 C45-C58 C60-C76 C81-C85 C88 C90-C97",
    ),
    "moderate or severe liver disease": (
        3,
        "4560-4562 5722-5728",
        "I850 I859 I864 I982 K704 K711 K721 K729 K765-K767",
    ),
    "metastatic solid tumour": (6, "196-199", "C77-C80"),
    "AIDS": (6, "042-044", "B20-B22 B24"),
}
_NAMES = list(GROUPS)
_REPLACED = {
    "mild liver disease": "moderate or severe liver disease",
    "diabetes": "diabetes with complications",
    "cancer": "metastatic solid tumour",
}


def charlson_groups(vocabulary: Iterable[str]) -> np.ndarray:
    """int32 [vocabulary]: bit g is set for a diagnosis of group g of ``GROUPS``; -1 for what is no ICD diagnosis.

    Read are ``DIAGNOSIS//ICD//9//4280``, ``DIAGNOSIS//ICD//10//I509`` (MIMIC-IV), ``ICD9CM/428.0`` and ``ICD10CM/I50.9`` (OMOP).
    """
    return np.array([_bits(code) for code in vocabulary], np.int32)


def charlson_score(groups: np.ndarray) -> int:
    """The index of a person with these codes (entries of ``charlson_groups``, none of them -1)."""
    bits = int(np.bitwise_or.reduce(groups, initial=0))
    found = {name for g, name in enumerate(_NAMES) if bits >> g & 1}
    return sum(GROUPS[name][0] for name in found if _REPLACED.get(name) not in found)


def _bits(code: str) -> int:
    match = _ICD.fullmatch(code)
    if match is None:
        return -1
    icd = match[3].replace(".", "")
    nine = "9" in (match[1], match[2])
    return sum(1 << g for g, (_, icd9, icd10) in enumerate(GROUPS.values()) if _in(icd, icd9 if nine else icd10))


def _in(icd: str, stems: str) -> bool:
    for stem in stems.split():
        low, _, high = stem.partition("-")
        if len(icd) >= len(low) and low <= icd[: len(low)] <= (high or low):
            return True
    return False
