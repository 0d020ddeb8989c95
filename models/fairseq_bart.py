"""BART (Lewis et al. 2020) of fairseq as transformers' BART, and back: arguments and tensor names.

The two implementations compute the same; only names differ, and fairseq counts positions from the first token that is
no padding, so outputs are equal for sequences padded on the right (fairseq's and transformers' default).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DenseError
from .fairseq_names import activation, count, fairseq_activation, linear, needed, refuse_unless, renamed

# Counters, and views of the embedding that fairseq stores again.
_IGNORED = (r"(?:encoder|decoder)\.version", r".*\._float_tensor", r"decoder\.output_projection\.weight")
_SIDES = ("encoder", "decoder")


def bart_to_transformers(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[str, dict, dict[str, Tensor]]:
    """(class name, config, state dict) of the transformers model with the outputs of this fairseq BART.

    A checkpoint with one classification head becomes a `BartForSequenceClassification`, else a
    `BartForConditionalGeneration`.

    Raises:
        DenseError: a variant that transformers' BART does not compute (pre-norm as in mBART, sinusoidal positions,
            embeddings that are not shared), named.
    """
    state = _split_in_proj(dict(state))
    _check_variant(args, state)
    heads = sorted({name.split(".")[1] for name in state if name.startswith("classification_heads.")})
    if len(heads) > 1:
        raise DenseError(f"the checkpoint has the classification heads {', '.join(heads)}: keep one of them in `model`")
    config = _config(args, state)
    names = _names(config, heads[0] if heads else None)
    embedding = state["encoder.embed_tokens.weight"]
    tensors = renamed(state, names, (*_IGNORED, r"(?:encoder|decoder)\.embed_tokens\.weight"), "this fairseq BART")
    tied = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    tensors |= dict.fromkeys(tied, embedding)
    if heads:
        config["num_labels"] = int(state[f"classification_heads.{heads[0]}.out_proj.weight"].shape[0])
        return "BartForSequenceClassification", config, tensors
    tensors["lm_head.weight"] = embedding
    tensors["final_logits_bias"] = torch.zeros(1, embedding.shape[0])
    return "BartForConditionalGeneration", config, tensors


def bart_from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], head: str = "squeezoo"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(arguments, task arguments, state dict) of the fairseq BART with the outputs of this transformers BART.

    Args:
        config, state: of a `BartForConditionalGeneration` or `BartForSequenceClassification`.
        head: what fairseq calls the classification head, if there is one.

    Raises:
        DenseError: parts that fairseq's BART has no place for.
    """
    bias = state.get("final_logits_bias")
    refuse_unless(
        {
            "final_logits_bias of zeros, fairseq has no such bias": bias is None or not bool(bias.any()),
            "tied word embeddings": bool(config.get("tie_word_embeddings", True)),
            "pad_token_id=1, as fairseq counts positions from it": config["pad_token_id"] == 1,
        },
        "this BART cannot become a fairseq model",
    )
    names = _names(config, head if "classification_head.dense.weight" in state else None)
    back = {ours: theirs for theirs, ours in names.items()}
    shared = r"model\.(?:shared|encoder\.embed_tokens|decoder\.embed_tokens)\.weight|lm_head\.weight|final_logits_bias"
    tensors = renamed(state, back, (shared,), "this BART")
    embedding = state["model.shared.weight"]
    for side in _SIDES:
        tensors[f"{side}.embed_tokens.weight"] = embedding
        tensors[f"{side}.version"] = torch.tensor([3.0])
    tensors["decoder.output_projection.weight"] = embedding
    args = _args(config)
    return args, {"task": "denoising", "data": ""}, tensors


def _names(config: Mapping[str, Any], head: str | None) -> dict[str, str]:
    """fairseq's name of each tensor -> transformers' name, without the shared embedding."""
    names: dict[str, str] = {}
    for side in _SIDES:
        names[f"{side}.embed_positions.weight"] = f"model.{side}.embed_positions.weight"
        names |= linear(f"{side}.layernorm_embedding", f"model.{side}.layernorm_embedding")
        attentions = ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",)
        modules = [f"{a}.{p}_proj" for a in attentions for p in "qkv"] + [f"{a}.out_proj" for a in attentions]
        modules += [f"{a}_layer_norm" for a in attentions] + ["fc1", "fc2", "final_layer_norm"]
        for block in range(config[f"{side}_layers"]):
            for module in modules:
                name = f"{side}.layers.{block}.{module}"
                names |= linear(name, f"model.{name}")
    if head is not None:
        for module in ("dense", "out_proj"):
            names |= linear(f"classification_heads.{head}.{module}", f"classification_head.{module}")
    return names


def _check_variant(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    embedding = state.get("encoder.embed_tokens.weight")
    if embedding is None:
        raise DenseError("this fairseq BART has no encoder.embed_tokens.weight")
    output = state.get("decoder.output_projection.weight", embedding)
    decoder = state.get("decoder.embed_tokens.weight", embedding)
    positions = [state.get(f"{side}.embed_positions.weight") for side in _SIDES]
    spectral = any(name.endswith("weight_orig") for name in state)
    refuse_unless(
        {
            "layer norms after each part (encoder_normalize_before false), this is mBART's order": not (
                args.get("encoder_normalize_before")
                or args.get("decoder_normalize_before")
                or "encoder.layer_norm.weight" in state
            ),
            "learned positions of equal number in encoder and decoder": positions[0] is not None
            and positions[1] is not None
            and positions[0].shape == positions[1].shape,
            "a layer norm of the embeddings (layernorm_embedding)": "encoder.layernorm_embedding.weight" in state,
            "one embedding for encoder, decoder and output (share_all_embeddings)": torch.equal(embedding, decoder)
            and torch.equal(embedding, output),
            "pooler_activation_fn tanh": args.get("pooler_activation_fn", "tanh") == "tanh",
            "no spectral norm in the classification head": not spectral,
        },
        "this fairseq BART is a variant that transformers' BART does not compute",
    )


def _config(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = state["encoder.embed_tokens.weight"].shape
    config: dict[str, Any] = {
        "model_type": "bart",
        "vocab_size": vocabulary,
        "d_model": width,
        "max_position_embeddings": state["encoder.embed_positions.weight"].shape[0] - 2,
        "activation_function": activation(args, "gelu"),
        "scale_embedding": not args.get("no_scale_embedding", True),
        "dropout": args.get("dropout", 0.1),
        "attention_dropout": args.get("attention_dropout", 0.0),
        "activation_dropout": args.get("activation_dropout") or args.get("relu_dropout") or 0.0,
        "classifier_dropout": args.get("pooler_dropout", 0.0),
    }
    for side in _SIDES:
        config[f"{side}_layers"] = count(state, f"{side}.layers")
        config[f"{side}_ffn_dim"] = state[f"{side}.layers.0.fc1.weight"].shape[0]
        config[f"{side}_attention_heads"] = needed(args, f"{side}_attention_heads")
        config[f"{side}_layerdrop"] = args.get(f"{side}_layerdrop") or 0.0
    return config


def _args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of fairseq's BARTModel."""
    positions = config["max_position_embeddings"]
    args: dict[str, Any] = {
        "arch": "bart_large",  # whatever the size: it fills in what is not stated below
        "task": "denoising",
        "activation_fn": fairseq_activation(config["activation_function"]),
        "no_scale_embedding": not config["scale_embedding"],
        "dropout": config["dropout"],
        "attention_dropout": config["attention_dropout"],
        "activation_dropout": config["activation_dropout"],
        "pooler_dropout": config["classifier_dropout"],
        "pooler_activation_fn": "tanh",
        "max_source_positions": positions,
        "max_target_positions": positions,
        "layernorm_embedding": True,
        "share_all_embeddings": True,
        "share_decoder_input_output_embed": True,
        "load_checkpoint_heads": True,
    }
    for side in _SIDES:
        args |= {
            f"{side}_embed_dim": config["d_model"],
            f"{side}_layers": config[f"{side}_layers"],
            f"{side}_ffn_embed_dim": config[f"{side}_ffn_dim"],
            f"{side}_attention_heads": config[f"{side}_attention_heads"],
            f"{side}_layerdrop": config[f"{side}_layerdrop"],
            f"{side}_learned_pos": True,
            f"{side}_normalize_before": False,
        }
    return args


def _split_in_proj(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints of early fairseq hold Q, K and V as the rows of one ``in_proj``; newer ones apart."""
    for name in [name for name in state if name.endswith((".in_proj_weight", ".in_proj_bias"))]:
        stem, _, kind = name.rpartition(".in_proj_")
        for part, rows in zip("qkv", state.pop(name).chunk(3)):
            state[f"{stem}.{part}_proj.{kind}"] = rows
    return state
