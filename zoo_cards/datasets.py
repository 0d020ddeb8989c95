"""What a card says about the data behind each task: Hub id, licence, citation, and an input to try the model with."""

from __future__ import annotations

from dataclasses import dataclass

from ..eval import get_task
from .parts import Data

# The Hub's names for what a model does, where they are not those of the tasks' kinds.
PIPELINES = {
    "text-regression": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "dialogue": "text-generation",
    "speech-recognition": "automatic-speech-recognition",
}
# What the Hub's data sets call a split, where our tasks say otherwise; `eval`'s readers ask the Hub for the same ones.
HUB_SPLITS = {
    "dev": "validation",
    "valid": "validation",
    "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
    "train-clean-100": "train.100",
    "train-clean-360": "train.360",
    "train-other-500": "train.500",
    "dev-clean": "validation",
    "dev-other": "validation",
    "test-clean": "test",
    "test-other": "test",
}
# Splits that are parts of a Hub split, or that stand under another configuration than the task's: no name of theirs
# would be true on the Hub.
NOT_ON_HUB = {
    "squad1-articles": ("train", "dev"),
    "imdb/halves": ("validation", "test"),
    "librispeech/clean": ("train-other-500",),
    "librispeech/other": ("train-clean-100", "train-clean-360"),
}
_UNSTATED = "no licence stated by its authors, research use"


@dataclass(frozen=True)
class About:
    """What is known of a task's data beside its `Task`; the arguments are those of `Data`."""

    name: str
    hub_id: str | None
    config: str | None
    licence: str
    example: tuple[str, ...] = ()
    image: tuple[int, int, int] | None = None


def _glue(name: str, config: str, licence: str, *example: str) -> About:
    return About(name, "nyu-mll/glue", config, licence, example)


def _wikitext(size: int) -> dict[str, About]:
    hub, licence = "EleutherAI/wikitext_document_level", "CC BY-SA 3.0"
    text = ("The tower was built in the fourteenth century and",)
    protocols = {"token": "per token", "sliding": "sliding window", "word": "per word", "masked": "masked tokens"}
    return {
        f"wikitext{size}/{member}": About(
            f"WikiText-{size} ({said})", hub, f"wikitext-{size}-raw-v1", licence,
            text if member != "masked" else ("The tower was built in the fourteenth [MASK].",),
        )
        for member, said in protocols.items()
    }  # fmt: skip


_MULTINLI = ("OANC and other licences, see Williams et al. 2018", "The cat sleeps on the sofa.", "An animal rests.")
_SQUAD = ("rajpurkar/squad", None, "CC BY-SA 4.0", ("Where is the office?", "The firm moved its office to London."))
_IMDB = ("stanfordnlp/imdb", None, _UNSTATED, ("A quiet, gripping film.",))
_NEWS = ("The council has agreed to repair the bridge. Work begins in May and will take three months.",)
_DIALOGUE = ("Hello! What do you do for a living?",)
_LIBRISPEECH = ("openslr/librispeech_asr", "CC BY 4.0")

_ABOUT: dict[str, About] = {
    "glue/cola": _glue(
        "CoLA", "cola", "sentences from published works, used as fair use, research use", "The book was read by her."
    ),
    "glue/sst2": _glue("SST-2", "sst2", _UNSTATED, "A quiet, gripping film."),
    "glue/mrpc": _glue(
        "MRPC", "mrpc", "Microsoft Research licence, research use", "The firm sold its London office.",
        "Its office in London was sold by the firm.",
    ),
    "glue/stsb": _glue(
        "STS-B", "stsb", "scores CC BY-SA 4.0, texts of several licences", "A man plays a guitar.",
        "A man is playing music.",
    ),
    "glue/qqp": _glue(
        "QQP", "qqp", "Quora's terms, non-commercial use", "How do I learn to swim?",
        "What is the best way to learn swimming?",
    ),
    "glue/mnli": _glue("MNLI matched", "mnli", *_MULTINLI),
    "glue/mnli-mm": _glue("MNLI mismatched", "mnli", *_MULTINLI),
    "glue/qnli": _glue("QNLI", "qnli", "CC BY-SA 4.0", "Where is the office?", "The firm moved its office to London."),
    "glue/rte": _glue("RTE", "rte", _UNSTATED, "The firm moved its office to London.", "The firm is in London."),
    "glue/wnli": _glue(
        "WNLI", "wnli", "CC BY 4.0", "The cup did not fit into the box because it was too big.", "The cup was too big."
    ),
    "digits": About(
        "scikit-learn digits", None, None, "CC BY 4.0 (UCI Machine Learning Repository)", image=(1, 8, 8)
    ),
    "cifar10": About("CIFAR-10", "uoft-cs/cifar10", None, _UNSTATED, image=(3, 32, 32)),
    "imagenet": About(
        "ImageNet-1k", "ILSVRC/imagenet-1k", None, "ImageNet's terms, non-commercial research", image=(3, 224, 224)
    ),
    **_wikitext(2),
    **_wikitext(103),
    "wnut17": About("WNUT-17", "leondz/wnut_17", None, "CC BY 4.0", ("Ada Lovelace moved to London.",)),
    "conll2003": About(
        "CoNLL-2003", "eriktks/conll2003", None, "Reuters' agreement, research use", ("Ada Lovelace moved to London.",)
    ),
    "imdb": About("IMDb", *_IMDB),
    "imdb/halves": About("IMDb, its test set halved for validation", *_IMDB),
    "squad1": About("SQuAD 1.1", *_SQUAD),
    "squad1-articles": About("SQuAD 1.1, articles of its development set", *_SQUAD),
    "squad2": About("SQuAD 2.0", "rajpurkar/squad_v2", *_SQUAD[1:]),
    "cnn_dailymail": About(
        "CNN/DailyMail", "abisee/cnn_dailymail", "3.0.0", "articles of CNN and Daily Mail, research use", _NEWS
    ),
    "xsum": About("XSum", "EdinburghNLP/xsum", None, "articles of the BBC, research use", _NEWS),
    "personachat": About("Persona-Chat", "AlekseyKorshuk/persona-chat", None, _UNSTATED, _DIALOGUE),
    "personachat-synthetic": About(
        "Synthetic-Persona-Chat", "google/Synthetic-Persona-Chat", None, "CC BY 4.0", _DIALOGUE
    ),
    "librispeech/clean": About("LibriSpeech test-clean", _LIBRISPEECH[0], "clean", _LIBRISPEECH[1]),
    "librispeech/other": About("LibriSpeech test-other", _LIBRISPEECH[0], "other", _LIBRISPEECH[1]),
    "speech-folder": About("recordings of one's own", None, None, "not known"),
}  # fmt: skip


def describe_task(task_name: str) -> Data:
    """The data behind a task, for `Card.data`.

    Raises:
        ValueError: unknown task.
    """
    task = get_task(task_name)
    about = _ABOUT[task.name]
    return Data(
        task=task.name,
        name=about.name,
        pipeline=PIPELINES.get(task.kind, task.kind),
        hub_id=about.hub_id,
        config=about.config,
        image=about.image,
        example=about.example,
        licence=about.licence,
        note=task.source,
    )


def hub_split(task: str, split: str) -> str | None:
    """What the task's Hub data set calls ``split``; None where it has no split of exactly these rows."""
    return None if split in NOT_ON_HUB.get(task, ()) else HUB_SPLITS.get(split, split)
