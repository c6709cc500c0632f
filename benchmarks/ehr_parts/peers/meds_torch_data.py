"""Runs in the environment of meds-torch-data: prepares a MEDS root, then times an epoch for every line on standard input.

Arguments: MEDS root, folder for the prepared data, folder of labels, length, batch size, share of events to hide.
The first line that is printed says what was prepared; then one JSON object an epoch. Default flags: with
``include_time_delta=False`` this version gives every subject the tokens of the first subject of its shard.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from meds_torchdata import MEDSPytorchDataset, MEDSTorchDataConfig  # pyrefly: ignore[missing-import]


def main() -> None:
    root, prepared, labels, length, size, share = sys.argv[1:]
    start = time.perf_counter()
    tool = Path(sys.executable).with_name("MTD_preprocess")
    environment_path = f"{tool.parent}:/usr/bin:/bin"
    command = [
        tool,
        f"MEDS_dataset_dir={root}",
        f"output_dir={prepared}",
        "do_reshard=True",
        "hydra.run.dir=" + prepared + "/log",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": environment_path, "HOME": prepared})
    if done.returncode:
        raise SystemExit(f"MTD_preprocess ended with {done.returncode}: {done.stderr[-2000:]}")
    config = MEDSTorchDataConfig(
        prepared, max_seq_len=int(length), seq_sampling_strategy="to_end", task_labels_dir=labels
    )
    data = MEDSPytorchDataset(config, split="train")
    loader = data.get_dataloader(batch_size=int(size), shuffle=True)
    torch.set_num_threads(1)
    print(json.dumps({"subjects": len(data), "prepare_s": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        events = hidden = 0
        cpu, wall = time.process_time(), time.perf_counter()
        for batch in loader:
            real = batch.code != 0
            mask = (torch.rand(batch.code.shape) < float(share)) & real
            events, hidden = events + int(real.sum()), hidden + int(mask.sum())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu_s": cpu, "wall_s": wall, "events": events, "hidden": hidden}), flush=True)


main()
