"""The Charlson index is that of Quan's coding and Charlson's weights."""

import pytest

from mmjepa.ehr.charlson import GROUPS, charlson_groups, charlson_score

# one code of each version a group, and one that only looks like it
EXAMPLES = {
    "myocardial infarction": ("41071", "I214", "411", "I20"),
    "congestive heart failure": ("4280", "I5023", "4253", "I421"),
    "peripheral vascular disease": ("44021", "I7025", "4430", "I730"),
    "cerebrovascular disease": ("43491", "I639", "4390", "I700"),
    "dementia": ("29410", "G309", "2940", "G310"),
    "chronic pulmonary disease": ("49121", "J449", "5060", "J680"),
    "rheumatic disease": ("7140", "M0579", "7143", "M350"),
    "peptic ulcer disease": ("53140", "K259", "5350", "K290"),
    "mild liver disease": ("5715", "K7460", "07020", "K710"),
    "diabetes": ("25000", "E119", "2490", "E15"),
    "diabetes with complications": ("25060", "E1122", "2519", "E162"),
    "hemiplegia or paraplegia": ("34290", "G8191", "3448", "G835"),
    "renal disease": ("5856", "N186", "40300", "I129"),
    "cancer": ("1629", "C3490", "17301", "C449"),
    "moderate or severe liver disease": ("5722", "K7290", "5720", "K720"),
    "metastatic solid tumour": ("1977", "C787", "1959", "C759"),
    "AIDS": ("042", "B20", "0450", "B23"),
}


def groups_of(*codes):
    return [[name for g, name in enumerate(GROUPS) if bits >> g & 1] for bits in charlson_groups(codes).tolist()]


@pytest.mark.parametrize("name", GROUPS)
def test_each_group_holds_its_codes_of_both_versions_and_not_their_neighbours(name):
    nine, ten, not_nine, not_ten = EXAMPLES[name]
    assert groups_of(f"DIAGNOSIS//ICD//9//{nine}", f"DIAGNOSIS//ICD//10//{ten}") == [[name], [name]]
    for others in groups_of(f"DIAGNOSIS//ICD//9//{not_nine}", f"DIAGNOSIS//ICD//10//{not_ten}"):
        assert name not in others


def test_ranges_end_where_the_publication_says():
    groups = groups_of(
        *(f"DIAGNOSIS//ICD//9//{code}" for code in ("140", "1729", "1739", "185", "1958", "1959", "2089", "209"))
    )
    assert ["cancer" in found for found in groups] == [True, True, False, True, True, False, True, False]
    assert groups_of("DIAGNOSIS//ICD//10//E101", "DIAGNOSIS//ICD//10//E11") == [["diabetes"], []]


def test_a_code_may_belong_to_two_groups():
    assert groups_of("DIAGNOSIS//ICD//9//40403") == [["congestive heart failure", "renal disease"]]


def test_only_diagnoses_are_read():
    codes = ["PROCEDURE//ICD//9//4280", "LAB//4280//mg", "DIAGNOSIS//ICD//11//BD10", "ICD9Proc/42.8", "DIAGNOSIS//4280"]
    assert (charlson_groups(codes) == -1).all()
    assert groups_of("ICD9CM/428.0", "ICD10CM/I50.9") == [["congestive heart failure"]] * 2


def test_weights_add_up_and_a_severe_form_replaces_its_mild_one():
    def score(*codes):
        return charlson_score(charlson_groups([f"DIAGNOSIS//ICD//10//{code}" for code in codes]))

    assert score() == score("I10") == 0
    assert score("I214", "I252") == 1  # one group, counted once
    assert score("E119") == 1
    assert score("E119", "E1122") == 2
    assert score("K7460", "K7290") == 3
    assert score("C3490") == 2
    assert score("C3490", "C787") == 6
    assert score("I509", "J449", "N186", "B20", "G8191") == 1 + 1 + 2 + 6 + 2
    everything = score(*(ten for _, ten, _, _ in EXAMPLES.values()))
    assert everything == 29  # 33 points and the three mild forms of severe ones left out
