"""The folder of an unfinished run: what makes a killed run go on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

PROGRESS = "progress.json"


class RunError(RuntimeError):
    """A run that cannot start or go on."""


class Work:
    """The folder of an unfinished run: ``progress.json`` and ``stage-<k>.safetensors`` for every finished stage.

    Args:
        fingerprint: of all that the run depends on. restart: throw what is there away.

    Raises:
        RunError: it holds work of a run with another fingerprint. Where that got nowhere, its folder is taken over.
    """

    def __init__(self, folder: Path, fingerprint: str, restart: bool) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.fingerprint = fingerprint
        if restart and folder.exists():
            shutil.rmtree(folder)
        if (folder / PROGRESS).is_file():
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            self.records = progress["records"]
            if progress["fingerprint"] == fingerprint:
                return
            if self.is_worth_keeping:
                raise RunError(
                    f"{folder} holds an unfinished run with another recipe, model or data; give --restart to throw it "
                    "away, or choose another output folder"
                )
            self.records = []
            for left in folder.glob("stage-*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def done(self) -> int:
        return len(self.records)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether it holds more than what is made again in moments: training, pruning by data, a search for an order of
        channels. Outputs of teachers are known by their content and serve any run."""
        costly = any(
            record["stage"] == "finetune" or record.get("method") in ("wanda", "sparsegpt") or "permuted" in record
            for record in self.records
        )
        return costly or any(self.folder.glob("stage-*/checkpoint-*/trainer_state.json"))

    def _write(self) -> None:
        temporary = self.folder / f"{PROGRESS}.tmp"
        temporary.write_text(json.dumps({"fingerprint": self.fingerprint, "records": self.records}), encoding="utf-8")
        temporary.replace(self.folder / PROGRESS)

    def finish(self, model: nn.Module, index: int, record: dict[str, Any]) -> None:
        """Save the state after a stage, then mark it done, then drop the stage's own checkpoints."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        temporary = self.folder / f"stage-{index}.tmp"
        save_file(state, temporary)
        temporary.replace(self.folder / f"stage-{index}.safetensors")
        self.records.append(record)
        self._write()
        shutil.rmtree(self.folder / f"stage-{index}", ignore_errors=True)

    def keep_log(self, index: int, lines: list[dict[str, Any]]) -> None:
        """Keep the journal of a training stage until the checkpoint is written."""
        if lines:
            text = "".join(json.dumps({"stage": index + 1} | line) + "\n" for line in lines)
            (self.folder / f"log-{index}.jsonl").write_text(text, encoding="utf-8")

    def write_log(self, path: Path) -> None:
        """Join the journals of all stages into one file; none where there is nothing to say."""
        found = sorted(self.folder.glob("log-*.jsonl"), key=lambda log: int(log.stem.split("-")[1]))
        if found:
            path.write_text("".join(log.read_text(encoding="utf-8") for log in found), encoding="utf-8")

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def remove_if_worthless(self) -> None:
        """After an error: leave nothing behind that only stands in the way of the corrected command."""
        if not self.is_worth_keeping and not any(self.folder.glob("teacher/*/*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def load_(self, model: nn.Module, index: int) -> None:
        """Put the state after stage ``index`` into an attached model; quantizers know by their scale if they are on."""
        model.load_state_dict(load_file(self.folder / f"stage-{index}.safetensors"))
