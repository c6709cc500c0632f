"""Windows of hours become slots exactly as the published layout says."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mmjepa.cohort import Cohort
from mmjepa.ehr.text import TextWriter
from mmjepa.masking import draw_rollout_start
from mmjepa.refusal import Refusal
from mmjepa.sample import TrajectoryViews, open_sampler
from mmjepa.sample.trajectory import ACTION, KINDS, STATE, STATIC, Corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fitted")


@pytest.fixture(scope="module")
def sampler(icu_cohort, folder):
    return opened(icu_cohort, folder)


def opened(cohort, folder, splits=("train",), **views):
    settings = {"window": 6, "stride": 3, "min_hours": 4, "vocabulary": 300} | views
    return open_sampler(
        TrajectoryViews(**settings), Cohort.open(cohort), folder, patch=1, language_model=None, seed=0, splits=splits
    )


def text_of(sampler, batch, row, slot):
    view = batch.views[0]
    source = int(batch.layout.source[row, slot])
    return sampler.tokenizer.decode(view.tokens[view.offsets[source] : view.offsets[source + 1]])


def test_a_hand_made_window_has_the_published_layout(sampler):
    static, states, actions = 0, np.array([5, 7, 5]), np.array([6, 6, 9])
    views, layout = sampler.lay_out([(static, states, actions)])
    ids = views[0].ids.tolist()
    assert ids == [0, 5, 6, 7, 9]
    assert layout.kind.tolist() == [[STATIC, STATE, ACTION, STATE, ACTION, STATE, ACTION]]
    assert [ids[i] for i in layout.source[0]] == [0, 5, 6, 7, 6, 5, 9]
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert layout.hour.tolist() == [[0, 1, 1, 2, 2, 3, 3]]
    assert [ids[i] if i >= 0 else -1 for i in layout.target[0]] == [-1, 7, -1, 5, -1, -1, -1]
    assert layout.feeds.tolist() == [[-1, 3, -1, 5, -1, -1, -1]]
    assert KINDS == ("state", "action", "static")


def test_a_shorter_window_in_a_batch_is_padded_and_reads_only_its_own(sampler):
    long, short = (1, np.array([2, 3, 4]), np.array([5, 5, 5])), (8, np.array([9]), np.array([10]))
    views, layout = sampler.lay_out([long, short])
    assert layout.kind[1].tolist() == [STATIC, STATE, ACTION, -1, -1, -1, -1]
    assert views[0].ids[layout.source[1, :3]].tolist() == [8, 9, 10]
    assert (layout.source[1, 3:] == -1).all()
    assert (layout.target[1] == -1).all()
    assert (layout.feeds[1] == -1).all()


def test_every_slot_of_a_batch_holds_its_own_subject_s_text_of_its_hour(sampler, icu_cohort):
    from mmjepa.ehr.stays import derive_stays, iterate

    store = Cohort.open(icu_cohort).events()
    writer = TextWriter(store)
    texts = {stay.subject_id: writer(stay) for stay in iterate(derive_stays(store)[0])}
    batch = sampler.batch([(0, i) for i in range(len(sampler))])
    for row, (written, start, stop) in enumerate(sampler.items):
        subject = int(batch.subjects[row])
        assert subject == sampler.written[written].stay.subject_id
        assert text_of(sampler, batch, row, 0) == texts[subject].static
        for k in range(stop - start):
            assert text_of(sampler, batch, row, 2 * k + 1) == texts[subject].state[start + k]
            assert text_of(sampler, batch, row, 2 * k + 2) == texts[subject].action[start + k]
    used = {s.stay.subject_id for s in sampler.written}
    assert used <= set(Cohort.open(icu_cohort).events().splits["train"].tolist())


def test_targets_are_the_next_state_and_rollouts_start_where_two_steps_are_left(sampler):
    batch = sampler.batch([(0, i) for i in range(len(sampler))])
    layout = batch.layout
    for row, (_, start, stop) in enumerate(sampler.items):
        hours = stop - start
        states = 2 * torch.arange(hours) + 1
        assert torch.equal(layout.target[row, states[:-1]], layout.source[row, states[1:]])
        assert int((layout.target[row] >= 0).sum()) == hours - 1
        k = (int(layout.start[row]) - 1) / 2
        assert k in range(1, hours - 2) or (hours < 4 and k == -1)


def test_rollout_starts_depend_on_epoch_and_window_not_on_company(sampler):
    n = len(sampler)
    together = sampler.batch([(3, i) for i in range(n)]).layout.start
    alone = [int(sampler.batch([(3, i)]).layout.start[0]) for i in reversed(range(n))][::-1]
    assert together.tolist() == alone
    epochs = [sampler.batch([(e, i) for i in range(n)]).layout.start.tolist() for e in range(4)]
    assert len({tuple(e) for e in epochs}) > 1
    assert draw_rollout_start(3, np.random.default_rng(0)) == -1


def test_a_batch_of_windows_holds_what_each_alone_holds(sampler):
    items = [(0, i) for i in (2, 0, 5)]
    together = sampler.batch(items)
    for row, item in enumerate(items):
        alone = sampler.batch([item])
        slots = alone.layout.kind.shape[1]
        for name in ("kind", "hour", "feeds", "time"):
            one, many = getattr(alone.layout, name)[0], getattr(together.layout, name)[row, :slots]
            assert torch.equal(one, many), name
        for slot in range(slots):
            if alone.layout.source[0, slot] >= 0:
                assert text_of(sampler, alone, 0, slot) == text_of(sampler, together, row, slot)


def test_equal_texts_are_one_and_long_ones_are_cut_and_counted(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    corpus = Corpus(tokenizer, 5)
    assert corpus.add(["a b", "c", "a b"]).tolist() == [0, 1, 0]
    corpus.tokenise()
    assert corpus.add(["t=1h | Heart rate: 91 bpm.", "c"]).tolist() == [2, 1]
    corpus.tokenise()
    assert len(corpus) == 3
    assert corpus.cut == 1
    view = corpus.view(np.array([2, 0, 2]))
    assert view.offsets.diff().tolist() == [5, len(tokenizer("a b")["input_ids"]), 5]
    assert torch.equal(view.tokens[:5], view.tokens[-5:])
    assert view.ids.tolist() == [2, 0, 2]


def test_the_corpus_lists_every_text_once_by_id(sampler):
    ids = torch.cat([view.ids for view in sampler.corpus("ehr")])
    assert ids.tolist() == list(range(len(sampler.corpus_of)))


def test_what_is_fitted_is_fitted_on_training_subjects_once(sampler, icu_cohort, folder):
    before = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    held_out = opened(icu_cohort, folder, splits=("held_out",))
    assert {w.stay.subject_id for w in held_out.written} == {7, 8}
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_embedding_rows_are_the_hours_each_known_at_its_end(sampler):
    frames, latents = [], []
    for frame, views, present in sampler.embedding_batches(size=7):
        assert present.all()
        assert len(frame) == views[0].rows <= 7
        frames.append(frame)
        latents += views[0].ids.tolist()
    hours = [(w, h) for w in sampler.written for h in range(w.stay.hours)]
    assert latents == [w.states[h] for w, h in hours]
    times = np.concatenate([f["prediction_time"].to_numpy() for f in frames]).astype("datetime64[us]").astype(np.int64)
    assert times.tolist() == [w.stay.icu_in_us + (h + 1) * 3_600_000_000 for w, h in hours]


def test_rollout_policies_change_actions_after_the_start_alone(sampler):
    start, hours = 2, 9
    recorded = sampler.rollout_stays(start, hours, "recorded")
    assert recorded
    for policy in ("recorded", "hold", "none"):
        chosen = sampler.rollout_stays(start, hours, policy)
        for (w, actions), (same, truth) in zip(chosen, recorded, strict=True):
            assert w is same
            assert len(actions) == min(hours, w.stay.hours) > start + 1
            assert (actions[: start + 1] == truth[: start + 1]).all()
            body = sampler.corpus_of.texts[truth[start]].split(" | ")[1]
            for h in range(start + 1, len(actions)):
                text = sampler.corpus_of.texts[actions[h]]
                expected = {
                    "recorded": sampler.corpus_of.texts[w.actions[h]],
                    "hold": f"t={h}h | {body}",
                    "none": f"t={h}h | No active interventions.",
                }
                assert text == expected[policy]


def test_a_cohort_without_long_enough_stays_is_refused(icu_cohort, folder):
    with pytest.raises(Refusal) as refused:
        opened(icu_cohort, folder, window=72, min_hours=60)
    assert refused.value.code == "COHORT_NO_STAYS"
