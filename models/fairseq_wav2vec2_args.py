"""The arguments of fairseq's Wav2Vec2 and Wav2VecCtc as transformers' config, and back."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import DenseError
from .fairseq_names import activation, count, fairseq_activation, needed

EXTRACTORS = {"default": "group", "layer_norm": "layer"}
_CONV = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"  # fairseq's default


def config_of(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """transformers' config of the bare model; sizes are read off the tensors.

    Raises:
        DenseError: arguments that are missing, that transformers has no equal for, or that contradict the tensors.
    """
    layers = conv_layers(args.get("conv_feature_layers") or _CONV)
    shapes = [tuple(state[f"feature_extractor.conv_layers.{i}.0.weight"].shape) for i in range(len(layers))]
    if [(shape[0], shape[2]) for shape in shapes] != [(width, kernel) for width, kernel, _ in layers]:
        raise DenseError(f"conv_feature_layers says {layers}, the tensors have the shapes {shapes}")
    width, group_width, kernel = state["encoder.pos_conv.0.weight_v"].shape
    return {
        "model_type": "wav2vec2",
        "hidden_size": width,
        "num_hidden_layers": count(state, "encoder.layers"),
        "num_attention_heads": needed(args, "encoder_attention_heads"),
        "intermediate_size": state["encoder.layers.0.fc1.weight"].shape[0],
        "hidden_act": activation(args, "gelu"),
        "feat_extract_norm": EXTRACTORS[args.get("extractor_mode") or "default"],
        "do_stable_layer_norm": bool(args.get("layer_norm_first")),
        "conv_dim": [dim for dim, _, _ in layers],
        "conv_kernel": [size for _, size, _ in layers],
        "conv_stride": [stride for _, _, stride in layers],
        "conv_bias": bool(args.get("conv_bias")),
        "num_conv_pos_embeddings": kernel,
        "num_conv_pos_embedding_groups": width // group_width,
        "hidden_dropout": args.get("dropout", 0.1),
        "attention_dropout": args.get("attention_dropout", 0.1),
        "activation_dropout": args.get("activation_dropout", 0.0),
        "feat_proj_dropout": args.get("dropout_input", 0.0),
        "layerdrop": args.get("encoder_layerdrop", 0.0),
        "apply_spec_augment": False,  # fairseq masks the input of this model in pre-training only
    }


def ctc_config_of(outer: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """What a CTC model's own arguments override, and its head. fairseq's CTC blank is symbol 0, `<s>`."""
    return {
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": outer.get("dropout", 0.0),
        "attention_dropout": outer.get("attention_dropout", 0.0),
        "activation_dropout": outer.get("activation_dropout", 0.0),
        "feat_proj_dropout": outer.get("dropout_input", 0.0),
        "final_dropout": outer.get("final_dropout", 0.0),
        "layerdrop": outer.get("layerdrop", 0.0),
        "apply_spec_augment": bool(outer.get("apply_mask", False)),
        "mask_time_prob": outer.get("mask_prob", 0.5),
        "mask_time_length": outer.get("mask_length", 10),
        "mask_feature_prob": outer.get("mask_channel_prob", 0.0),
        "mask_feature_length": outer.get("mask_channel_length", 10),
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
    }


def args_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of fairseq's Wav2Vec2Model."""
    layers = list(zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"]))
    extractors = {ours: theirs for theirs, ours in EXTRACTORS.items()}
    return {
        "_name": "wav2vec2",
        "extractor_mode": extractors[config["feat_extract_norm"]],
        "encoder_layers": config["num_hidden_layers"],
        "encoder_embed_dim": config["hidden_size"],
        "encoder_ffn_embed_dim": config["intermediate_size"],
        "encoder_attention_heads": config["num_attention_heads"],
        "activation_fn": fairseq_activation(config["hidden_act"]),
        "layer_norm_first": config["do_stable_layer_norm"],
        "conv_feature_layers": str([tuple(map(int, layer)) for layer in layers]),
        "conv_bias": config["conv_bias"],
        "conv_pos": config["num_conv_pos_embeddings"],
        "conv_pos_groups": config["num_conv_pos_embedding_groups"],
        "dropout": config["hidden_dropout"],
        "attention_dropout": config["attention_dropout"],
        "activation_dropout": config["activation_dropout"],
        "dropout_input": config["feat_proj_dropout"],
        "encoder_layerdrop": config["layerdrop"],
    }


def ctc_args_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of fairseq's Wav2VecCtc."""
    return {
        "_name": "wav2vec_ctc",
        "w2v_path": "",
        "data": "",
        "no_pretrained_weights": True,
        "dropout": config["hidden_dropout"],
        "attention_dropout": config["attention_dropout"],
        "activation_dropout": config["activation_dropout"],
        "dropout_input": config["feat_proj_dropout"],
        "final_dropout": config["final_dropout"],
        "layerdrop": config["layerdrop"],
        "apply_mask": config["apply_spec_augment"],
        "mask_prob": config["mask_time_prob"],
        "mask_length": config["mask_time_length"],
        "mask_channel_prob": config["mask_feature_prob"],
        "mask_channel_length": config["mask_feature_length"],
    }


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """(width, kernel, stride) of each convolution, from fairseq's expression, which fairseq itself runs as code.

    Only lists, tuples, whole numbers, ``+`` and ``*`` are read.

    Raises:
        DenseError: anything else stands there.
    """
    try:
        layers = _evaluate(ast.parse(text, mode="eval").body)
        found = [(int(width), int(kernel), int(stride)) for width, kernel, stride in layers]
    except (SyntaxError, TypeError, ValueError, RecursionError):
        raise DenseError(
            f"conv_feature_layers {text!r}: expected a list of (width, kernel, stride) like {_CONV!r}"
        ) from None
    return found


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item) for item in node.elts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        times, other = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(other, list) and times * len(other) > 100:
            raise ValueError("too many convolutions")
        return left * right
    raise ValueError(f"{type(node).__name__} is not read")
