"""Publishing: a measured folder becomes an entry with index and README table, or nothing changes."""

import json

import pytest
from squeezoo.zoo_cards import publish as module
from squeezoo.zoo_cards.publish import BEGIN, END, PublishError, publish, update_table, zoo_table
from squeezoo.zoo_cards.render import write_card


def test_a_card_without_weights(tmp_path, new_card):
    card = new_card(weights="reproducible")
    write_card(card, tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").write_bytes(b"stays at home")
    target = publish(tmp_path / "run", tmp_path / "zoo")
    assert target == tmp_path / "zoo" / "cards" / card.name
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "results.json"]
    assert [entry["name"] for entry in json.loads((tmp_path / "zoo" / "index.json").read_text())] == [card.name]


def test_included_weights_come_along_and_are_checked(tmp_path, new_card):
    """A real tiny checkpoint: all its files arrive, a damaged one is refused, a large one too."""
    from squeezoo.compress.attach import attach_, prune_
    from squeezoo.compress.backends import CheckpointError
    from squeezoo.compress.checkpoint import save_checkpoint
    from squeezoo.compress.plan import make_plan
    from squeezoo.compress.recipe import Recipe
    from squeezoo.compress.verify import verify
    from tiny import TINY

    card = new_card(weights="included")
    model, recipe = TINY["timm_vit"](), Recipe.load("magnitude-2-4")
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    run = save_checkpoint(
        model, plan, recipe, tmp_path / "run", name=card.name, base={"name": "tiny", "revision": None}
    )
    write_card(card, run)
    target = publish(run, tmp_path / "zoo")
    assert verify(target).name == card.name

    limit, module.MAX_BYTES = module.MAX_BYTES, 1000
    try:
        with pytest.raises(PublishError, match="the repository takes 1,000"):
            publish(run, tmp_path / "zoo")
    finally:
        module.MAX_BYTES = limit
    (run / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        publish(run, tmp_path / "zoo")
    assert verify(target).name == card.name


def test_the_table_goes_between_its_markers(tmp_path, new_card):
    write_card(new_card(weights="reproducible"), tmp_path / "run")
    publish(tmp_path / "run", tmp_path / "zoo")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_table(readme, tmp_path / "zoo")
    assert readme.read_text() == f"before\n{BEGIN}\n{zoo_table(tmp_path / 'zoo')}\n{END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(PublishError, match="lacks the lines"):
        update_table(readme, tmp_path / "zoo")
    assert readme.read_text() == "no markers"


def test_the_committed_readme_has_the_table_of_the_committed_zoo():
    """So that no number in README.md is edited by hand."""
    text = (module.ZOO.parent / "README.md").read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == zoo_table().strip()
