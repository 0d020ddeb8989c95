"""Wav2Vec2 (Baevski et al. 2020) of fairseq as transformers' Wav2Vec2, and back: tensor names and what has no equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .fairseq_names import linear, needed, refuse_unless, renamed
from .fairseq_wav2vec2_args import EXTRACTORS, args_of, config_of, ctc_args_of, ctc_config_of

# Used in pre-training only; they come back from the checkpoint given as ``like``.
PRETRAINING = r"(?:quantizer|input_quantizer|project_q|project_inp|final_proj|target_glu)\..*"
_CTC_PREFIX, _CTC_HEAD = "w2v_encoder.w2v_model.", "w2v_encoder.proj"


def wav2vec2_to_transformers(
    args: Mapping[str, Any], state: Mapping[str, Tensor], ctc: bool
) -> tuple[str, dict, dict[str, Tensor]]:
    """(class name, config, state dict) of the transformers model with the outputs of this fairseq model.

    Args:
        ctc: ``args`` and ``state`` are of a `Wav2VecCtc`, which becomes a `Wav2Vec2ForCTC`; else of a `Wav2Vec2Model`,
            which becomes a `Wav2Vec2Model` without the modules that only pre-training uses.

    Raises:
        DenseError: a variant that transformers' Wav2Vec2 does not compute (conformer or adapter blocks, quantized
            input, deep positional convolution), named.
    """
    outer, head = args, {}
    if ctc:
        inner = args.get("w2v_args") or {}
        args = needed(inner, "model") if inner else needed(args, "w2v_args")
        head = renamed(
            {n: t for n, t in state.items() if n.startswith(_CTC_HEAD)}, linear(_CTC_HEAD, "lm_head"), (), ""
        )
        state = {n.removeprefix(_CTC_PREFIX): t for n, t in state.items() if not n.startswith(_CTC_HEAD)}
    _check_variant(args, state)
    config = config_of(args, state)
    if ctc:
        config |= ctc_config_of(outer, head["lm_head.weight"].shape[0])
        if not config["mask_time_prob"] and not config["mask_feature_prob"]:
            # transformers has no place for mask_emb where both are 0; this computes the same and keeps it
            config |= {"apply_spec_augment": False, "mask_time_prob": 0.05}
    projected = "post_extract_proj.weight" in state
    names = _names(config, projected)
    tensors = renamed(state, names, (PRETRAINING,), "this fairseq Wav2Vec2")
    if not projected:  # fairseq leaves the projection out where both widths are equal; the identity computes the same
        tensors["feature_projection.projection.weight"] = torch.eye(config["hidden_size"])
        tensors["feature_projection.projection.bias"] = torch.zeros(config["hidden_size"])
    if not ctc:
        return "Wav2Vec2Model", config, tensors
    return "Wav2Vec2ForCTC", config, {f"wav2vec2.{name}": tensor for name, tensor in tensors.items()} | head


def wav2vec2_from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], normalize: bool | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(arguments, task arguments, state dict) of the fairseq model with the outputs of this transformers model.

    Args:
        config, state: of a `Wav2Vec2Model` or, with an ``lm_head``, a `Wav2Vec2ForCTC`.
        normalize: whether the audio is normalised to zero mean and unit variance; None takes what fairseq's published
            models do: only those with layer norms in the feature extractor are.

    Raises:
        DenseError: parts that fairseq's model has no place for (adapters).
    """
    refuse_unless({"no adapters": not config["add_adapter"] and config["adapter_attn_dim"] is None}, "this Wav2Vec2")
    ctc = "lm_head.weight" in state
    bare = {name.removeprefix("wav2vec2."): t for name, t in state.items() if not name.startswith("lm_head.")}
    projected = config["conv_dim"][-1] != config["hidden_size"]
    ignored: tuple[str, ...] = ()
    if not projected:
        weight, bias = (bare[f"feature_projection.projection.{part}"] for part in ("weight", "bias"))
        identity = torch.equal(weight, torch.eye(len(weight)).to(weight)) and not bool(bias.any())
        refuse_unless({"a feature projection that is the identity, fairseq has none here": identity}, "this Wav2Vec2")
        ignored = (r"feature_projection\.projection\..*",)
    back = {ours: theirs for theirs, ours in _names(config, projected).items()}
    tensors = renamed(bare, back, ignored, "this Wav2Vec2")
    normalize = config["feat_extract_norm"] == "layer" if normalize is None else normalize
    model = args_of(config)
    task = {"_name": "audio_pretraining", "data": "", "normalize": normalize}
    if not ctc:
        return model, task, tensors
    tensors = {f"{_CTC_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"{_CTC_HEAD}.{part}": state[f"lm_head.{part}"] for part in ("weight", "bias")}
    outer = ctc_args_of(config) | {"w2v_args": {"model": model, "task": task}, "normalize": normalize}
    return outer, task | {"_name": "audio_finetuning", "labels": "ltr"}, tensors


def _names(config: Mapping[str, Any], projected: bool) -> dict[str, str]:
    """fairseq's name of each tensor -> transformers' name."""
    names = {"mask_emb": "masked_spec_embed"}
    for i in range(len(config["conv_dim"])):
        theirs, ours = f"feature_extractor.conv_layers.{i}", f"feature_extractor.conv_layers.{i}"
        names[f"{theirs}.0.weight"] = f"{ours}.conv.weight"
        if config["conv_bias"]:
            names[f"{theirs}.0.bias"] = f"{ours}.conv.bias"
        if config["feat_extract_norm"] == "layer":
            names |= linear(f"{theirs}.2.1", f"{ours}.layer_norm")
        elif i == 0:
            names |= linear(f"{theirs}.2", f"{ours}.layer_norm")
    names |= linear("layer_norm", "feature_projection.layer_norm")
    if projected:
        names |= linear("post_extract_proj", "feature_projection.projection")
    position = "encoder.pos_conv_embed.conv"
    names["encoder.pos_conv.0.bias"] = f"{position}.bias"
    names["encoder.pos_conv.0.weight_g"] = f"{position}.parametrizations.weight.original0"
    names["encoder.pos_conv.0.weight_v"] = f"{position}.parametrizations.weight.original1"
    names |= linear("encoder.layer_norm", "encoder.layer_norm")
    modules = {f"self_attn.{p}_proj": f"attention.{p}_proj" for p in ("q", "k", "v", "out")} | {
        "self_attn_layer_norm": "layer_norm",
        "fc1": "feed_forward.intermediate_dense",
        "fc2": "feed_forward.output_dense",
        "final_layer_norm": "final_layer_norm",
    }
    for block in range(config["num_hidden_layers"]):
        for theirs, ours in modules.items():
            names |= linear(f"encoder.layers.{block}.{theirs}", f"encoder.layers.{block}.{ours}")
    return names


def _check_variant(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    extractor = args.get("extractor_mode") or "default"
    refuse_unless(
        {
            "transformer blocks (layer_type transformer)": (args.get("layer_type") or "transformer") == "transformer",
            "raw features as input (quantize_input false)": not args.get("quantize_input"),
            "one positional convolution (pos_conv_depth 1)": (args.get("pos_conv_depth") or 1) == 1
            and "encoder.pos_conv.0.weight_v" in state,
            f"extractor_mode one of {', '.join(EXTRACTORS)}": extractor in EXTRACTORS,
        },
        "this fairseq Wav2Vec2 is a variant that transformers' Wav2Vec2 does not compute",
    )
