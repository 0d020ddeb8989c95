"""A `Card` as a Hugging Face model card: metadata with ``model-index``, then what people want to know, in that order.

A pure function of the card, so a README.md can always be made again from its results.json; nobody edits it by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..eval.results import atomic_write_text
from . import numbers, resource_sections, sections
from .card import COMPRESSED, Card
from .datasets import hub_split
from .load_lines import how_to_load
from .plots import plot_names
from .published_section import published
from .tables import render_comparison, render_table, render_terminal

__all__ = ["README", "render_card", "render_comparison", "render_table", "render_terminal", "write_card"]

README = "README.md"
HEADER = "<!-- Generated from results.json by `squeezoo card DIR`; edits here are lost. -->"


def render_card(card: Card, plots: Sequence[str] = ()) -> str:
    """The whole README.md. Parts that the card has nothing to say about are left out.

    Args:
        plots: names of the PNG files in ``plots/`` beside it, as `plots.plot_names` gives them.
    """
    parts = [
        ("Results", sections.results(card)),
        ("Size", sections.size(card)),
        ("Speed", sections.speed(card)),
        ("Plots", sections.plots(plots)),
        ("Loading and memory", resource_sections.loading_and_memory(card)),
        ("Energy and CO2", resource_sections.energy(card)),
        ("Other hardware (model)", resource_sections.other_hardware(card)),
        ("How to load", how_to_load(card)),
        ("Recipe and plan", sections.recipe(card)),
        ("Training", sections.training(card)),
        ("Seeds and trials", resource_sections.trials(card)),
        ("How to reproduce", sections.reproduce(card)),
        ("Limits", sections.limits(card)),
        ("Published numbers", published(card)),
        ("Versions", sections.versions(card)),
        ("Licence", sections.licence(card)),
    ]
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts if text)
    return f"---\n{_metadata(card)}\n---\n{HEADER}\n\n# {card.name}\n\n{sections.introduction(card)}\n\n{body}\n"


def write_card(card: Card, folder: str | Path) -> Path:
    """Write ``results.json`` and ``README.md`` into ``folder``, each whole or not at all; returns the latter's path.

    Plots that lie in ``folder/plots`` are shown in it; `plots.write_plots` makes them.
    """
    text = render_card(card, plot_names(folder))
    card.save(folder)
    path = Path(folder) / README
    atomic_write_text(path, text)
    return path


def _metadata(card: Card) -> str:
    """The YAML front matter, written by huggingface_hub itself so that its own parser reads it back."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for row in card.scores:
        # A score of a part of a split is left out: leaderboards would rank it beside complete ones.
        if row.variant == COMPRESSED and row.score.complete:
            data = card.data_of(row.score)
            split = hub_split(data.task, row.score.split) if data.hub_id else None  # None: no such rows on the Hub
            results.append(
                EvalResult(
                    task_type=data.pipeline,
                    dataset_type=data.hub_id if data.hub_id and split else data.task,
                    dataset_name=data.name,
                    dataset_config=data.config if split else None,
                    dataset_split=split or row.score.split,
                    metric_type=row.score.metric,
                    metric_name=numbers.metric_name(row.score.metric),
                    metric_value=round(row.score.value, 6),
                )
            )
    plan = card.plan
    sparse = [f"{pattern.replace(':', '-')}-sparse" for pattern in plan.patterns]  # a colon would name a namespace
    metadata = ModelCardData(
        library_name="squeezoo",
        base_model=card.base.hub_id,
        base_model_relation="quantized" if card.base.hub_id else None,
        license=card.base.licence.lower(),
        pipeline_tag=card.data[0].pipeline if card.data else None,
        tags=["squeezoo", card.recipe.name, *sparse, *(f"int{bits}" for bits in plan.weight_bits)],
        datasets=list(dict.fromkeys(data.hub_id for data in card.data if data.hub_id)) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    return metadata.to_yaml(line_break="\n")
