"""The text and packing parts of the EHR benchmark run on real texts, and what they measure is exact."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ehr.py"


def run(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, "--small", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines()]


@pytest.mark.real_data
def test_ids_are_those_of_whole_texts_and_packed_latents_those_of_each_alone(tmp_path, data_folder):
    root = data_folder / "mimic_iv_demo_meds"
    text, repeats, packing = run("--only", "text,packing", "--mimic", root, "--scratch", tmp_path)
    assert text["same_ids"]
    assert text["events"] > 1000
    assert repeats["distinct"] < repeats["slots"]
    assert packing["largest_difference"] < 1e-5
    assert packing["against_bucketed"] > 0


def test_without_the_demo_the_lines_say_why(tmp_path):
    lines = run("--only", "text,packing", "--scratch", tmp_path, "--mimic", tmp_path / "nowhere")
    assert [(row["part"], row["met"]) for row in lines] == [("text", False), ("packing", False)]
    assert all("--mimic" in row["why"] for row in lines)
