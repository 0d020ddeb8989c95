"""The card's section *How to load*: five lines of Python that load the model and show what it does."""

from __future__ import annotations

import json

from ..eval import get_task
from .card import Card
from .parts import Data

_INPUTS = '**tokenizer({texts}, return_tensors="pt")'
# kind of task: the line that runs the model on one example
_TEXT_LINES = {
    "text-classification": f"print(model({_INPUTS}).logits.softmax(-1))",
    "text-regression": f"print(model({_INPUTS}).logits)",
    "token-classification": f"print(model({_INPUTS}).logits.argmax(-1))  # a class for each token",
    "masked-lm": f"print(tokenizer.batch_decode(model({_INPUTS}).logits.argmax(-1)))",
    "causal-lm": f"print(tokenizer.batch_decode(model.generate({_INPUTS}, max_new_tokens=20)))",
    "question-answering": f"print(model({_INPUTS}))  # scores of each token as the answer's first and last",
}
_TEXT_LINES["summarization"] = _TEXT_LINES["dialogue"] = _TEXT_LINES["causal-lm"]


def how_to_load(card: Card) -> str:
    """Markdown of the section: the lines, and what ``model`` is."""
    kind = get_task(card.data[0].task).kind
    lines = {"image-classification": _images, "speech-recognition": _sound}.get(kind, _texts)(card, card.data[0])
    code = "\n".join(lines)
    text = (
        f"```python\n{code}\n```\n\n"
        f"`model` is an ordinary {card.base.library} module in evaluation mode; its GEMMs run on integer kernels where "
        "the recipe and the machine allow it."
    )
    if card.weights == "reproducible":
        text += (
            " **The weights are not distributed with Squeezoo**: run the commands under *How to reproduce* first and "
            "give the folder that they write instead of the name."
        )
    return text


def _texts(card: Card, data: Data) -> list[str]:
    texts = ", ".join(json.dumps(text) for text in data.example)
    return [
        "import squeezoo",
        f'model = squeezoo.load("{card.name}")',
        f'tokenizer = squeezoo.load_processor("{card.name}")',
        _TEXT_LINES[get_task(data.task).kind].format(texts=texts),
    ]


def _images(card: Card, data: Data) -> list[str]:
    timm = card.base.library == "timm"
    shape = ", ".join(str(length) for length in (1, *(data.image or ())))
    return [
        "import squeezoo",
        "import torch",
        f'model = squeezoo.load("{card.name}")',
        f"images = torch.zeros({shape})  # batch, channels, height, width",
        f"print(model({'images' if timm else 'pixel_values=images'}){'' if timm else '.logits'}.softmax(-1))",
    ]


def _sound(card: Card, data: Data) -> list[str]:
    """One channel at the rate that the model was trained on, which its feature extractor knows and checks."""
    return [
        "import soundfile, squeezoo",
        'sound, rate = soundfile.read("recording.flac", dtype="float32")  # one channel, the rate of the model',
        f'model, processor = squeezoo.load("{card.name}"), squeezoo.load_processor("{card.name}")',
        'inputs = processor(sound, sampling_rate=rate, return_tensors="pt")',
        "print(processor.batch_decode(model(**inputs).logits.argmax(-1)))",
    ]
