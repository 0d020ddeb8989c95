"""A fairseq file is read as data: what it may name, what is refused, and that nothing in it runs."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import standins
import torch
from squeezoo.models.dense import DenseError
from squeezoo.models.fairseq_checkpoint import load_fairseq_checkpoint
from squeezoo.models.fairseq_pickle import Inert, plain, read_pickle


@contextmanager
def library_class(module: str, name: str) -> Iterator[Any]:
    """A class that pickles under a library's name; the library is gone again when the file is read."""
    made = type(name, (), {"__module__": module})
    parents = [module[:i] for i, letter in enumerate(module) if letter == "."] + [module]
    held = {parent: sys.modules.get(parent) for parent in parents}
    for parent in parents:
        sys.modules[parent] = ModuleType(parent)
    setattr(sys.modules[module], name, made)
    try:
        yield made
    finally:
        for parent, before in held.items():
            del sys.modules[parent]
            if before is not None:
                sys.modules[parent] = before


class Exploit:
    """What unpickling would run."""

    def __init__(self, function: Any, argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> Any:
        return self.function, (self.argument,)


@pytest.mark.parametrize("function", [exec, eval, __import__], ids=lambda f: f.__name__)
def test_code_in_a_file_does_not_run(tmp_path: Path, function: Any) -> None:
    marker = tmp_path / "ran"
    argument = f"open({str(marker)!r}, 'w')" if function is not __import__ else "this"
    torch.save({"model": {}, "args": Exploit(function, argument)}, tmp_path / "x.pt")
    with pytest.raises(DenseError, match=rf"needs the class .*{function.__name__}, which is not loaded"):
        load_fairseq_checkpoint(tmp_path / "x.pt")
    assert not marker.exists()


def test_allowed_names_are_never_called(tmp_path: Path) -> None:
    """A file may name `operator.getitem` and the like: here they only hold what they were given."""
    import operator

    class Calls:
        def __reduce__(self) -> Any:
            return operator.getitem, ({"a": 1}, "a")

    torch.save({"value": Calls(), "type": list}, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt")
    assert isinstance(found["value"], Inert)
    assert found["value"].arguments == ({"a": 1}, "a")
    assert found["type"] is not list


def test_the_refusal_says_what_and_what_instead(tmp_path: Path) -> None:
    with library_class("fairseq.tasks.audio_finetuning", "AudioFinetuningTask") as made:
        torch.save({"model": {}, "task": made()}, tmp_path / "x.pt")
    with pytest.raises(DenseError) as caught:
        load_fairseq_checkpoint(tmp_path / "x.pt")
    for word in ("x.pt", "fairseq.tasks.audio_finetuning.AudioFinetuningTask", "argparse.Namespace", "to_container"):
        assert word in str(caught.value)


def test_fairseq_dictionaries_give_the_symbols(tmp_path: Path) -> None:
    """The task state of a CTC model holds a fairseq.data.dictionary.Dictionary; read without fairseq."""
    model, inner = standins.wav2vec_ctc()
    w2v_args = {"model": {"_name": "wav2vec2", **inner}, "task": {}}
    with library_class("fairseq.data.dictionary", "Dictionary") as made:
        dictionary = made()
        dictionary.symbols, dictionary.indices = list(standins.SYMBOLS), {}
        state = {"target_dictionary": dictionary}
        cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": w2v_args}, "task": {"_name": "audio_finetuning"}}
        standins.save(model, tmp_path / "c.pt", cfg=cfg, task_state=state)
    assert load_fairseq_checkpoint(tmp_path / "c.pt").symbols == standins.SYMBOLS


def test_omegaconf_containers_become_plain(tmp_path: Path) -> None:
    """Objects of the shape that OmegaConf pickles (tests/extras reads real ones)."""
    with (
        library_class("omegaconf.dictconfig", "DictConfig") as mapping,
        library_class("omegaconf.listconfig", "ListConfig") as sequence,
        library_class("omegaconf.nodes", "AnyNode") as node,
    ):

        def wrap(value: Any) -> Any:
            made = {dict: mapping, list: sequence}.get(type(value), node)()
            if isinstance(value, dict):
                made._content = {key: wrap(item) for key, item in value.items()}
            elif isinstance(value, list):
                made._content = [wrap(item) for item in value]
            else:
                made._val = value
            return made

        content = {"model": {"_name": "wav2vec2", "layers": [1, None, {"x": 0.5}]}, "flag": True}
        torch.save({"cfg": wrap(content), "score": np.float64(0.25)}, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt")
    assert plain(found["cfg"]) == content
    assert isinstance(found["score"], Inert)


def test_plain_opens_namespaces_inside_each_other() -> None:
    assert plain(Namespace(a=Namespace(b=[Namespace(c=1)]), d=(1, 2))) == {"a": {"b": [{"c": 1}]}, "d": (1, 2)}


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    with pytest.raises(DenseError, match="no file"):
        load_fairseq_checkpoint(file)
    standins.save(standins.bart(), file, args=Namespace(**standins.BART_ARGS))
    whole = file.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(DenseError, match="damaged"):
            load_fairseq_checkpoint(file)
    for contents, message in (
        ([1, 2], "no fairseq checkpoint"),
        ({"state_dict": {}}, "has state_dict"),
        ({"model": {"w": 3}, "args": Namespace(arch="bart")}, "w is a int"),
        ({"model": {}}, "neither `args` nor `cfg.model`"),
    ):
        torch.save(contents, file)
        with pytest.raises(DenseError, match=message):
            load_fairseq_checkpoint(file)


def test_the_safe_names_of_the_caller_stay_as_they_were(tmp_path: Path) -> None:
    """torch keeps one list per process."""
    standins.save(standins.bart(), tmp_path / "x.pt", args=Namespace(**standins.BART_ARGS))
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Namespace])
    try:
        load_fairseq_checkpoint(tmp_path / "x.pt")
        assert set(torch.serialization.get_safe_globals()) == {*before, Namespace}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
