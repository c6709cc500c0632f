import pickle

from mmjepa.refusal import Refusal


def test_a_refusal_reads_as_one_line_of_code_message_and_hint():
    assert str(Refusal("CT_TINY", "one slice", "Give more")) == "CT_TINY: one slice. Give more"
    assert str(Refusal("CT_TINY", "one slice")) == "CT_TINY: one slice"


def test_a_refusal_survives_the_way_back_from_another_process():
    refusal = pickle.loads(pickle.dumps(Refusal("A", "b", "c")))
    assert (refusal.code, refusal.message, refusal.hint) == ("A", "b", "c")
