"""Commands on what there is: the zoo, adapters, recipes, tasks, this machine."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import JsonFlag, Out, command, out, say, show_found, show_json


@command
def publish(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder with results.json")], json_: JsonFlag = False
) -> None:
    """Put a measured checkpoint into this source checkout's zoo: card, small weights, index, README table.

    Example: squeezoo publish runs/quickstart/digits-vit.digits.gpusq-gemm-int8
    """
    from .zoo_cards.publish import publish as run
    from .zoo_cards.publish import update_table

    target = run(folder)
    update_table()
    if json_:
        show_json({"folder": str(target)})
    else:
        out.print(f"published {target}", highlight=False, markup=False, soft_wrap=True)


@command
def list_(
    pattern: Annotated[str, typer.Argument(help="shell wildcard over the names")] = "*", json_: JsonFlag = False
) -> None:
    """The zoo: published compressed models.

    Example: squeezoo list 'minilm*'
    """
    from . import catalog

    show_found(catalog.zoo(pattern), json_)


@command
def info(
    name: Annotated[str, typer.Argument(help="zoo name, or the folder of a checkpoint")], json_: JsonFlag = False
) -> None:
    """Everything the index knows about one published model; of a folder: its plan, how each matrix is stored and what
    runs it here.

    Example: squeezoo info digits-vit.digits.gpusq-gemm-int8
    """
    from . import catalog

    folder = Path(name)
    show_found(catalog.checkpoint_entry(folder) if folder.is_dir() else catalog.zoo_entry(name), json_)


class CompareFormat(str, Enum):
    """What a comparison is written as."""

    text = "text"
    markdown = "markdown"
    html = "html"


@command
def compare(
    sources: Annotated[list[str], typer.Argument(help="folders with a results.json, or zoo names")],
    format_: Annotated[CompareFormat, typer.Option("--format", help="of the output")] = CompareFormat.text,
    out_file: Annotated[Path | None, typer.Option("--out", "-o", help="write a file instead of printing")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="with --out: score against latency and size")] = False,
    mixed: Annotated[bool, typer.Option("--mixed", help="allow different models, tasks and samples, marked")] = False,
    json_: JsonFlag = False,
) -> None:
    """Several variants of one model side by side: scores, sizes, speed, from their cards. Measures nothing.

    Example: squeezoo compare runs/minilm-l6.mrpc.gpusq-gemm-int8 runs/minilm-l6.mrpc.asp-2-4 --format markdown
    """
    from .zoo_cards.compare import compare as run
    from .zoo_cards.compare_render import to_html, to_markdown, to_text, write_comparison

    if json_ and (out_file is not None or format_ is not CompareFormat.text):
        raise ValueError("--json prints the comparison as JSON: give it without --out and --format")
    if plots and out_file is None:
        raise ValueError("plots are files: say where with --out")
    found = run(sources, mixed=mixed)
    if json_:
        show_json(found.to_dict())
        return
    if out_file is not None:
        for path in write_comparison(found, out_file, format_.value, plots):
            out.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
        return
    writers: dict[str, Callable[[Any], str]] = {"text": to_text, "markdown": to_markdown, "html": to_html}
    out.print(writers[format_.value](found), highlight=False, markup=False, soft_wrap=True)


@command
def export(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder or a zoo name")],
    to: Annotated[str, typer.Option("--to", help="dense, compressed-tensors or onnx")],
    out_dir: Out,
    json_: JsonFlag = False,
) -> None:
    """Write a checkpoint as a folder that loads without Squeezoo: in transformers (dense), vLLM (compressed-tensors) or
    ONNX Runtime (onnx).

    Example: squeezoo export runs/minilm-l6.mrpc.gpusq-gemm-int8 --to compressed-tensors --out exported
    """
    from .compress.export import export as run
    from .zoo_cards.hub import resolve

    made = run(resolve(checkpoint), to, out_dir)  # type: ignore[arg-type]
    if json_:
        show_json({"folder": str(made.folder), "notes": list(made.notes)})
        return
    for note in made.notes:
        say(f"note: {note}")
    out.print(f"wrote {made.folder}", highlight=False, markup=False, soft_wrap=True)


@command
def adapters(
    show: Annotated[str | None, typer.Option(help="print one adapter's record")] = None,
    check: Annotated[str | None, typer.Option(help="run the self-test on a model: folder, name or Hub id")] = None,
    json_: JsonFlag = False,
) -> None:
    """The architectures that can be squeezed, built in and from installed packages; or what an adapter does to a model.

    Example: squeezoo adapters --check runs/minilm-l6.mrpc.dense
    """
    from . import catalog

    if check is None:
        show_found(catalog.adapters() if show is None else catalog.adapter(show), json_)
        return
    data, table = catalog.check(check)
    show_found((data, table), json_)
    if any(entry["passed"] is False for entry in data):
        raise typer.Exit(1)


@command
def recipes(
    show: Annotated[str | None, typer.Option(help="print one recipe, all defaults written out")] = None,
    json_: JsonFlag = False,
) -> None:
    """The built-in recipes.

    Example: squeezoo recipes --show gpusq-gemm-int8
    """
    from . import catalog

    show_found(catalog.recipes() if show is None else catalog.recipe(show), json_)


@command
def tasks(json_: JsonFlag = False) -> None:
    """The evaluation tasks.

    Example: squeezoo tasks
    """
    from . import catalog

    show_found(catalog.tasks(), json_)


@command
def doctor(json_: JsonFlag = False) -> None:
    """Versions, processor and GPU features, and what the runtime can use here.

    Example: squeezoo doctor
    """
    from . import catalog

    show_found(catalog.doctor(), json_)
