"""N:M attention while generating: caches of every kind must give what the full forward pass gives."""

import pytest
import torch
from maps import make_sharp, make_sparse, specs
from squeezoo.compress.attention_doors import attach_attention_
from squeezoo.compress.attention_map import activate_attention_
from tiny import GROUPED, tiny_batch

NAMES = ("opt", "gpt2", "llama", "bart")
NEW = 5  # tokens: after the 12 of the prompt every place of a group of 4


def generate(model, input_ids, **options):
    """Greedy tokens and the logits of each step."""
    out = model.generate(
        input_ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def prompt(name):
    """Two prompts, the second padded: on the left, where decoders want it; BART's encoder on the right."""
    batch = tiny_batch(name, n=2)
    flip = (lambda x: x) if name == "bart" else (lambda x: x.flip(1))
    return flip(batch["input_ids"]), {"attention_mask": flip(batch["attention_mask"])}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_attached_it_generates_what_the_original_generates(name):
    """Before activation: same greedy tokens, logits to 1e-5, with cache and padding."""
    input_ids, mask = prompt(name)
    model = make_sharp(name)
    tokens, logits, _ = generate(model, input_ids, **mask)
    attach_attention_(model, specs(model))
    found, found_logits, _ = generate(model, input_ids, **mask)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, atol=1e-5, rtol=0)
    activate_attention_(model)
    assert (generate(model, input_ids, **mask)[1] - logits).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_changes_nothing(name, cache):
    """C.2: groups at absolute index in the cache. Dynamic caches begin at key 0; static ones are longer than what is
    filled, and the empty tail is masked, so invalid."""
    input_ids, mask = prompt(name)
    model = make_sparse(name)
    tokens, logits, _ = generate(model, input_ids, use_cache=False, **mask)
    found, found_logits, _ = generate(model, input_ids, cache_implementation=cache, **mask)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bart"])
def test_step_by_step_equals_one_forward_pass(name):
    """The logits of each step are those that a single pass over the whole sequence gives at that place."""
    model = make_sparse(name)
    input_ids = prompt(name)[0][:1]
    tokens, logits, _ = generate(model, input_ids)
    with torch.no_grad():
        whole = model(tokens).logits[:, input_ids.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cache", "layer"), [("dynamic", "DynamicSliding"), ("static", "StaticSliding")])
def test_a_sliding_cache_keeps_its_groups(cache, layer):
    """Keys that fell out of the window move the rest of the cache, not the groups: equal to no cache at all."""
    import transformers
    from tiny import _seeded

    config = transformers.MistralConfig(**GROUPED, sliding_window=6)
    model = _seeded(lambda: transformers.MistralForCausalLM(config))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                weight.mul_(12)
            elif "_proj" in key:
                weight.mul_(4)
    attach_attention_(model, specs(model))
    activate_attention_(model)
    input_ids = prompt("mistral")[0][:1]
    tokens, logits, _ = generate(model, input_ids, use_cache=False)
    found, found_logits, past = generate(model, input_ids, cache_implementation=cache)
    assert type(past.layers[0]).__name__.startswith(layer)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, atol=1e-5, rtol=1e-5)


def test_beams_and_returned_maps():
    """Beam search reorders the cache; the maps that generate returns are pruned."""
    from squeezoo.compress.masks import Pattern, check_nm

    model = make_sparse("bart")
    input_ids, mask = prompt("bart")
    options = dict(num_beams=3, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, **mask)
    out = model.generate(input_ids, output_attentions=True, **options)
    assert torch.equal(out.sequences, model.generate(input_ids, use_cache=False, **options).sequences)
    maps = [p for step in (*out.decoder_attentions, *out.cross_attentions) for p in step]
    assert maps
    assert all(check_nm(p, Pattern(2, 4)) for p in maps)
