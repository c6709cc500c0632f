import html.parser
import itertools
import re

import numpy as np
import pandas as pd
import pytest

from mmjepa.evaluate.collapse import collapse_panel
from mmjepa.evaluate.judge import Arm, judge
from mmjepa.evaluate.probe import LinearProbe
from mmjepa.evaluate.rollout import rollout_metrics
from mmjepa.evaluate.tables import EmbeddingTable, ScoreTable
from mmjepa.refusal import Refusal
from mmjepa.report import figures, words, write_report

EVIL = '<script>alert("x")</script> & $x^2$ -->'


def judged():
    def site(n, seed, split):
        random = np.random.default_rng(seed)
        eta, ids, at = 2 * random.normal(size=n), np.arange(n) + 1000 * seed, np.full(n, np.datetime64("2020", "us"))
        names = np.where(np.arange(n) % 2, "train", "held_out") if split else None
        good = EmbeddingTable(ids, at, eta[:, None] + 0.3 * random.normal(size=(n, 3)), names)
        noise = EmbeddingTable(ids, at, random.normal(size=(n, 3)), names)
        y = pd.array(random.random(n) < 1 / (1 + np.exp(-eta)), dtype="boolean")
        labels = pd.DataFrame({"subject_id": ids, "prediction_time": at, "value": y})
        return good, noise, ScoreTable(ids, at, eta, "log_odds"), labels

    a, b = site(400, 1, True), site(300, 2, False)
    arms = [
        Arm(EVIL, a[1], b[1], LinearProbe(C=1.0)),
        Arm("good", a[0], b[0], LinearProbe(C=1.0), "a good one"),
        Arm("bayes", a[2], b[2], oracle=True),
    ]
    return judge(arms, a[3], outside_labels=b[3], draws=200)


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    z = np.cumsum(random.normal(size=(40, 20, 2)), axis=1)
    forecast = rollout_metrics(z, z[:, [5]].repeat(8, axis=1), np.arange(40), np.zeros((20, 2)), start=5, draws=50)
    metrics = [
        {"step": i, "phase": "one" if i < 5 else EVIL, "loss": 1.0 / (i + 1), "predict": 0.5, "gradient.ct": 9.0}
        for i in range(10)
    ]
    finding = {
        "check": "1",
        "name": EVIL,
        "verdict": "warn",
        "count": 1,
        "sentence": EVIL,
        "advice": EVIL,
        "task": EVIL,
    }
    return {
        "title": EVIL,
        "question": EVIL,
        "cohort": {"inside": {EVIL: 12345, "paired": EVIL}, "outside": {"paired": 0}},
        "results": judged(),
        "metrics": metrics,
        "collapse": {EVIL: collapse_panel(random.normal(size=(50, 8)))},
        "rollout": {"table": forecast.table.to_dict("records"), "summary": forecast.summary, "actions": EVIL},
        "audit": {"verdict": "warn", "findings": [finding | {"verdict": "pass"}, finding]},
        "limits": [EVIL],
        "config_yaml": EVIL,
        "facts": {EVIL: EVIL},
    }


def page_of(data, folder):
    write_report(data, folder / "report.html")
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    return page_of(data, tmp_path_factory.mktemp("report"))


class Outline(html.parser.HTMLParser):
    """Collects tags with their attributes and checks that they are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_stands_alone(page):
    for tag, attributes in Outline(page).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_page_is_accessible(page):
    tags = Outline(page).tags
    assert ("html", {"lang": "en"}) in tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    pictures = [attributes for tag, attributes in tags if attributes.get("role") == "img"]
    assert len(pictures) == len([tag for tag, _ in tags if tag == "svg"]) == 4
    assert all(len(attributes["aria-label"]) > 40 for attributes in pictures)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert all(target[1:] in ids for target in targets)


def test_every_arm_its_learner_and_its_interval_are_shown(page, data):
    for site in data["results"]["sites"].values():
        for arm in site["arms"].values():
            assert words.limits(arm["auroc"]) in page
    assert "learner: logistic regression, fixed C = 1 (not tuned)" in page
    assert "bayes (oracle: knows the truth, not a competitor)" in page
    assert "No ordering of the arms is promised" in page


def test_the_reading_follows_from_the_numbers(data):
    inside, outside, fall, *rest = words.reading(data["results"])
    oracle = [sentence for sentence in rest if "best score possible" in sentence]
    assert inside.startswith("Inside (200 patients")
    assert "highest AUROC is that of good" in inside
    assert "Clearly better than" in outside
    assert "good" in fall
    assert len(oracle) == 2
    assert all("no arm lies above it" in sentence for sentence in oracle)


def test_risks_worse_than_the_prevalence_and_signs_of_collapse_are_said(data):
    results = judged()
    found = results["sites"]["inside"]
    found["arms"]["good"]["brier"]["value"] = found["trivial"]["brier"] + 0.01
    assert any("Inside, the risks of" in text and "good" in text for text in words.reading(results))
    panels = {"a": {"warnings": []}, "b": {"warnings": ["LOW_RANK"]}}
    assert words.collapse_reading(panels) == ["Signs of collapse: b; see the health of the embedding below."]
    assert words.collapse_reading({"a": {"warnings": []}}) == []


def test_an_arm_above_the_oracle_is_called_a_leak(data):
    results = judged()
    results["sites"]["inside"]["arms"]["bayes"]["auroc"]["value"] = 0.5
    assert "good lies above it, which no honest model can: look for a leak" in words.reading(results)[3]


def test_verdicts_on_collapse_are_sentences():
    healthy = {"warnings": [], "not_checked": []}
    assert words.collapse_verdict(healthy) == "Healthy by all three checks."
    assert "few directions" in words.collapse_verdict({"warnings": ["LOW_RANK"], "not_checked": ["STD_FELL"]})
    assert "not checked" in words.collapse_verdict({"warnings": [], "not_checked": ["STD_FELL"]})


def test_a_failed_audit_is_said_at_the_head_of_the_report(data, tmp_path):
    for verdict, said in (("fail", True), ("warn", False)):
        (tmp_path / verdict).mkdir()
        text = page_of(data | {"audit": data["audit"] | {"verdict": verdict}}, tmp_path / verdict)
        assert ("fails the leakage audit" in text.split("<main")[0]) == said


@pytest.mark.parametrize("key", ["cohort", "results", "metrics", "collapse", "rollout", "audit", "limits", "facts"])
def test_a_section_appears_only_with_its_data(data, tmp_path, key):
    sections = {"facts": "made", "collapse": "health", "metrics": "training", "cohort": "data"}
    text = page_of({"title": "t", key: data[key]}, tmp_path)
    assert re.findall(r'<h2 id="(\w+)"', text)[0] == sections.get(key, key)
    assert text.count("<h2") == (2 if key == "results" else 1)


def test_a_title_alone_is_a_page_and_the_same_data_give_the_same_bytes(data, page, tmp_path):
    assert "<h2" not in page_of({"title": "t"}, tmp_path)
    (tmp_path / "again").mkdir()
    assert page_of(data, tmp_path / "again") == page


def test_unknown_parts_and_existing_files_are_refused(tmp_path):
    for data, code in (({"title": "t", "rolout": 1}, "REPORT_KEY"), ({}, "REPORT_KEY")):
        with pytest.raises(Refusal) as caught:
            write_report(data, tmp_path / "r.html")
        assert caught.value.code == code
    write_report({"title": "t"}, tmp_path / "r.html")
    with pytest.raises(Refusal) as caught:
        write_report({"title": "t"}, tmp_path / "r.html")
    assert caught.value.code == "OUTPUT_EXISTS"


def test_losses_of_very_different_size_are_drawn_on_a_scale_with_plain_numbers(monkeypatch):
    import matplotlib.axes

    seen = []
    original = matplotlib.axes.Axes.set_yscale
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_yscale", lambda axes, kind: seen.append(axes) or original(axes, kind)
    )
    figures.losses([{"step": step, "phase": "p", "loss": 100.0 / step**2} for step in range(1, 20)])
    labels = [text.get_text() for text in seen[0].get_yticklabels()]
    assert len(seen) == 1
    assert "1" in labels
    assert not any("$" in label for label in labels)
