"""The sections of a model card, each a text made from the card alone; an empty text leaves its section out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from . import numbers
from . import resource_sections as resources
from .card import COMPRESSED, DENSE, Card
from .plots import FOLDER, PLOTS
from .tables import Grid, condition, fastest, headline, measured_with, results_grid, size_grid, speed_grid


def introduction(card: Card) -> str:
    """One paragraph: what it is, and the three numbers that matter."""
    name, size = card.base.name, card.size
    base = f"[{name}](https://huggingface.co/{card.base.hub_id})" if card.base.hub_id else f"`{name}`"
    parts = [
        f"{base}, trained on {_and(data.name for data in card.data)} and compressed with the recipe "
        f"`{card.recipe.name}`: {_plan(card)}."
    ]
    if card.primary_pair is not None:
        dense, score = card.primary_pair
        parts.append(
            f"{card.data_of(score).name} {score.split} {numbers.metric_name(score.metric)} {numbers.value(score)} "
            f"(dense {numbers.value(dense)})."
        )
    dense_files = f"{numbers.size(size.true_dense_bytes)} in {size.true_dense_dtype}"
    parts.append(f"On disk {numbers.size(size.true_bytes)} (dense {dense_files}).")
    best = fastest(card)
    if best is not None:
        parts.append(f"Best speed-up over dense {numbers.speed_up(best.speedup)} ({condition(best)}).")
    return " ".join([*parts, headline(card.speeds)])


def results(card: Card) -> str:
    grid = results_grid(card)
    if not grid.rows:
        return "Not measured."
    scores = [row.score for row in card.scores]
    protocols = {f"`{s.task}` version {s.task_version}" + _settings(s.settings): None for s in scores}
    notes = f"Difference: {COMPRESSED} minus {DENSE}. Protocol: {'; '.join(protocols)}."
    if any(not score.complete for score in scores):
        notes += " Rows marked (sample) scored only a part of the split and rank nothing."
    return f"{grid.markdown()}\n\n{notes}"


def size(card: Card) -> str:
    size, part = card.size, card.size.breakdown
    text = (
        f"{size_grid(card).markdown()}\n\n"
        "Paper size counts as the papers do: kept values and their indices in the GEMMs of the transformer blocks and "
        "of the final projection; no scales, no embeddings. Files on disk count everything: "
        f"{numbers.size(part.values)} of values, {numbers.size(part.indices)} of indices, "
        f"{numbers.size(part.scales)} of scales, {numbers.size(part.other)} of all the rest (embeddings, biases, "
        f"configuration, tokenizer). {size.nonzeros:,} of {size.parameters:,} parameters are not zero "
        f"({size.nonzeros / size.parameters:.1%})."
    )
    forms = resources.storage(card)
    return f"{text}\n\n{forms}" if forms else text


def speed(card: Card) -> str:
    generation = resources.decode(card)
    if not card.speeds:
        return "\n\n".join(filter(None, (headline(card.speeds), generation)))
    repeats = sorted({speed.repeats for speed in card.speeds})
    text = (
        f"{headline(card.speeds)}\n\n{speed_grid(card).markdown()}\n\n{measured_with(card.speeds)} "
        f"Median milliseconds per batch of {' or '.join(map(str, repeats))} calls, dense and compressed in turn in one "
        "process; in brackets the 10th to 90th percentile."
    )
    return f"{text}\n\n{generation}" if generation else text


def plots(names: Sequence[str]) -> str:
    """Pictures that lie in ``plots/`` beside the card, each with what it shows."""
    return "\n\n".join(f"![{PLOTS[name]}]({FOLDER}/{name})\n\n{PLOTS[name]}" for name in names)


def recipe(card: Card) -> str:
    plan = card.plan
    return "\n".join([
        f"- recipe `{card.recipe.name}`: {' '.join(card.recipe.source.split())}",
        f"- plan: {_plan(card)} (roles: {', '.join(plan.roles) or 'none'}); "
        f"{plan.accelerated} of them have a shape that hardware 2:4 kernels take",
        f"- adapter `{card.base.adapter}` ({card.base.library})",
    ])  # fmt: skip


def training(card: Card) -> str:
    record = card.training
    if record is None:
        return "None: one-shot."

    def show(number: float | None) -> str:
        return "-" if number is None else f"{number:g}" if isinstance(number, float) else f"{number:,}"

    rows = [
        [
            stage.name, show(stage.epochs), show(stage.steps), show(stage.batch), show(stage.learning_rate),
            numbers.duration(stage.seconds),
        ]
        for stage in record.stages
    ]  # fmt: skip
    return (
        f"{Grid(['stage', 'epochs', 'steps', 'batch', 'learning rate', 'time'], rows).markdown()}\n\n"
        f"Seed {record.seed}; {record.samples:,} training rows; {numbers.duration(record.seconds)} on {record.device}."
    )


def reproduce(card: Card) -> str:
    return "```bash\n" + "\n".join(card.commands) + "\n```"


def limits(card: Card) -> str:
    return "\n".join(f"- {limit}" for limit in card.limits)


def versions(card: Card) -> str:
    found: dict[str, dict[str, None]] = {}
    for libraries in [*(row.score.libraries for row in card.scores), *(speed.libraries for speed in card.speeds)]:
        for name, version in libraries.items():
            found.setdefault(name, {})[version] = None
    found.pop("squeezoo", None)
    text = (
        f"squeezoo {card.squeezoo}" + (f" (commit `{card.code}`)" if card.code else "") + f", measured on {card.date}"
    )
    shown = ", ".join(f"{name} {' and '.join(found[name])}" for name in sorted(found))
    text = f"{text} with {shown}." if shown else f"{text}."
    return " ".join(filter(None, (text, resources.machine(card))))


def licence(card: Card) -> str:
    revision = f", revision `{card.base.revision}`" if card.base.revision else ""
    lines = [f"- base model {card.base.name}{revision}: {card.base.licence}"]
    lines += [f"- data {data.name}: {data.licence}" + (f" ({data.note})" if data.note else "") for data in card.data]
    return "\n".join(lines)


def _plan(card: Card) -> str:
    """``2:4 sparse int8 weights and int8 inputs in 37 GEMMs``."""
    plan = card.plan
    sparse = f"{_and(plan.patterns)} sparse" if plan.patterns else ""
    weights = " ".join(word for word in (sparse, _bits(plan.weight_bits)) if word)
    what = [f"{weights} weights"] if weights else []
    what += [f"{_bits(plan.input_bits)} inputs"] if plan.input_bits else []
    text = f"{_and(what) or 'nothing changed'} in {plan.gemms} GEMMs"
    return f"{text}, {plan.attention} attention maps" if plan.attention else text


def _settings(settings: Mapping[str, object]) -> str:
    return "".join(f", {name} {value}" for name, value in sorted(settings.items()))


def _bits(bits: Sequence[int]) -> str:
    return _and(f"int{b}" for b in bits)


def _and(items: Iterable[str]) -> str:
    return " and ".join(items)
