"""A live fairseq model from a checkpoint, where fairseq is installed (CONTRIBUTING, "Extras").

Squeezoo compresses live fairseq modules too: ``fairseq.py`` has their records. Two things are particular:

* fairseq's attention does not call its four linears but hands their ``.weight`` to one function. A parametrization of
  ``.weight`` is seen there, a forward hook is not. `call_projections_` makes it call them.
* fairseq reads no safetensors and Squeezoo no pickles, so results go back through `save_fairseq_checkpoint`.
"""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from torch import nn

from .errors import DenseError
from .fairseq_checkpoint import FairseqCheckpoint
from .torchvision_guard import ensure_torchvision_importable


def build_fairseq(checkpoint: FairseqCheckpoint) -> nn.Module:
    """The fairseq model of a checkpoint with its weights, in evaluation mode, built without its task and data folder.

    BART gets a dictionary of made-up symbols of the right size, which the forward pass does not read. Pre-training
    modules that the checkpoint does not hold are left out, as fairseq does for fine-tuning.

    Raises:
        DenseError: fairseq is not installed, or the tensors do not fit the arguments.
    """
    ensure_torchvision_importable()
    try:
        import fairseq.models  # noqa: F401
    except ImportError as error:
        raise DenseError(
            f"fairseq cannot be imported ({error}). It is an extra: CONTRIBUTING.md, section Extras, has the commands. "
            f"Without it, to_transformers(checkpoint) gives a transformers model with the same outputs."
        ) from error
    make = {"bart": _bart, "wav2vec2": _wav2vec2, "wav2vec_ctc": _wav2vec_ctc}[checkpoint.kind]
    model = make(checkpoint)
    try:
        model.load_state_dict(dict(checkpoint.state), strict=True)
    except RuntimeError as error:
        raise DenseError(f"the tensors do not fit the fairseq {checkpoint.kind} of these arguments: {error}") from error
    return model.eval()


def call_projections_(model: nn.Module) -> int:
    """Make every fairseq attention call its linears, so that input quantizers work. Returns how many there are.

    Outputs stay equal within float rounding: fairseq has both ways and takes this one when decoding step by step.
    """
    found = [m for m in model.modules() if hasattr(m, "skip_embed_dim_check") and hasattr(m, "q_proj")]
    for module in found:
        module.skip_embed_dim_check = True  # type: ignore[assignment]
    return len(found)


def _bart(checkpoint: FairseqCheckpoint) -> Any:
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY
    from fairseq.models.bart import BARTModel

    args = Namespace(**{"task": "denoising", **checkpoint.args, "load_checkpoint_heads": True})
    name = str(checkpoint.args.get("arch") or checkpoint.args.get("_name"))
    ARCH_CONFIG_REGISTRY["bart_large" if name == "bart" else name](args)
    dictionary = _dictionary(Dictionary, int(checkpoint.state["encoder.embed_tokens.weight"].shape[0]))
    return BARTModel.build_model(args, SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary))


def _wav2vec2(checkpoint: FairseqCheckpoint) -> Any:
    from fairseq.dataclass.utils import merge_with_parent
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
    from omegaconf import OmegaConf

    cfg = merge_with_parent(Wav2Vec2Config(), OmegaConf.create(checkpoint.args), remove_missing=True)
    model = Wav2Vec2Model.build_model(cfg)
    if "final_proj.weight" not in checkpoint.state:
        model.remove_pretraining_modules()
    return model


def _wav2vec_ctc(checkpoint: FairseqCheckpoint) -> Any:
    from fairseq.data import Dictionary
    from fairseq.dataclass.utils import merge_with_parent
    from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
    from omegaconf import OmegaConf

    # These three are references to other parts of fairseq's config, which is not here.
    inner = checkpoint.args["w2v_args"]
    own = {"normalize": inner["task"].get("normalize", False), "data": "", "ddp_backend": "legacy_ddp"}
    cfg = merge_with_parent(Wav2Vec2CtcConfig(), OmegaConf.create({**checkpoint.args, **own}), remove_missing=True)
    dictionary = _dictionary(Dictionary, int(checkpoint.state["w2v_encoder.proj.weight"].shape[0]))
    return Wav2VecCtc.build_model(cfg, SimpleNamespace(target_dictionary=dictionary))


def _dictionary(make: Any, size: int) -> Any:
    """fairseq's four special symbols, then made-up ones."""
    dictionary = make()
    for index in range(size - len(dictionary)):
        dictionary.add_symbol(f"symbol{index}")
    if len(dictionary) != size:
        raise DenseError(f"expected at least {len(dictionary)} symbols, fairseq's special ones, found {size}")
    return dictionary
