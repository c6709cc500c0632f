"""Task files written for a test."""

import pytest
import yaml

from mmjepa.ehr.tasks import read_task

CODES = {"in": "IN", "out": "OUT", "event": "EVENT", "death": "MEDS_DEATH"}


@pytest.fixture
def make_task(tmp_path):
    """``make_task(windows, trigger="in", extras={}, more={}, given={})`` reads a task over IN, OUT, EVENT and MEDS_DEATH."""

    def make(windows, trigger="in", extras=None, more=None, given=None):
        predicates = {name: {"code": code} for name, code in CODES.items()} | (more or {})
        body = {"trigger": trigger, "windows": windows, "metadata": {"mmjepa": extras or {}}}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(body))
        rules = {"predicates": predicates, "metadata": {"mmjepa": given or {}}}
        (tmp_path / "predicates.yaml").write_text(yaml.safe_dump(rules))
        return read_task(tmp_path / "task.yaml", tmp_path / "predicates.yaml")

    return make


def window(start, end, inclusive=(False, True), **more):
    """A window's mapping."""
    return {"start": start, "end": end, "start_inclusive": inclusive[0], "end_inclusive": inclusive[1], **more}


@pytest.fixture(name="window")
def _window():
    return window


@pytest.fixture
def within(window):
    """Windows of "an event within ``hours`` of the trigger"; ``first``: further windows before."""

    def make(hours=24, **first):
        known = window(None, "trigger", (True, True), index_timestamp="end")
        return {**first, "input": known, "target": window("input.end", f"start + {hours}h", label="event")}

    return make
