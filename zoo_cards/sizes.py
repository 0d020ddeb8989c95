"""What a checkpoint weighs, in both ways of counting: as the papers do, and in bytes on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .card import Breakdown, Size, StorageForm


def measure_size(checkpoint: str | Path, dense: str | Path) -> Size:
    """Sizes of a checkpoint folder against the folder of its dense model.

    The paper size counts the GEMMs of the blocks and the final projection; those that the plan leaves alone count in
    FP16 on both sides (Yu et al. 2023, Table 1). Unstructured zeros count like other values: the papers save nothing by
    them. The true size counts the checkpoint's own files, not the card's; a bitmap counts among the indices.

    Raises:
        CheckpointError: no checkpoint, or a damaged one. FileNotFoundError: no weights in ``dense``.
    """
    from safetensors.torch import load_file

    from ..compress.checkpoint import MANIFEST, WEIGHTS, check_files, load_manifest
    from ..compress.pack import forms, unpack
    from ..compress.packing import paper_bytes
    from ..models import adapter_named
    from ..models.adapter import find_sites
    from ..models.dense import build

    folder = Path(checkpoint)
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    tensors = load_file(folder / WEIGHTS)
    planned = {gemm.name: gemm for gemm in manifest.plan.gemms}

    bits = {
        form.name: int(form.number.removeprefix("int").removeprefix("float")) for form in forms(tensors, manifest.plan)
    }
    dense_paper = paper = 0
    sites = find_sites(build(manifest.model), adapter_named(manifest.plan.adapter))
    for gemm in (*sites.gemms, *((sites.final,) if sites.final else ())):
        shape = (gemm.out_features, gemm.in_features)
        dense_paper += paper_bytes(shape, None, 16)
        plan = planned.get(gemm.name)
        if plan is None:
            paper += paper_bytes(shape, None, 16)
        else:
            paper += paper_bytes(shape, plan.pattern, bits[gemm.name])

    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        gemm_name, _, part = name.rpartition(".")
        parts[part if gemm_name in planned else "other"] += tensor.numel() * tensor.element_size()
    total = (folder / MANIFEST).stat().st_size + sum(file["bytes"] for file in manifest.files.values())
    values, indices = parts["values"], parts["index"] + parts["bitmap"]
    scales = parts["scale"] + parts["input_scale"] + parts["input_zero_point"]
    state = unpack(tensors, manifest.plan, keep_int8=False).state
    dense_bytes, dense_dtype = _dense_files(Path(dense))
    return Size(
        paper_dense_fp16_bytes=dense_paper,
        paper_bytes=paper,
        true_dense_bytes=dense_bytes,
        true_dense_dtype=dense_dtype,
        true_bytes=total,
        breakdown=Breakdown(values, indices, scales, total - values - indices - scales),
        parameters=sum(tensor.numel() for tensor in state.values()),
        nonzeros=sum(int(tensor.count_nonzero()) for tensor in state.values()),
    )


def measure_storage(checkpoint: str | Path) -> tuple[StorageForm, ...]:
    """How the matrices of a checkpoint lie in its weight file: one entry per form, in the order of the plan, then its
    integer embedding tables.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    from safetensors.torch import load_file

    from ..compress.checkpoint import WEIGHTS, check_files, load_manifest
    from ..compress.pack import forms

    folder = Path(checkpoint)
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    tensors = load_file(folder / WEIGHTS)

    def size(name: str) -> int:
        return tensors[name].numel() * tensors[name].element_size() if name in tensors else 0

    sums: dict[tuple[str, str, str], list[int]] = {}
    for form in forms(tensors, manifest.plan):
        counts = (1, form.weights, form.bytes, size(f"{form.name}.scale"))
        entry = sums.setdefault((form.form, form.number, form.note), [0, 0, 0, 0])
        entry[:] = [before + more for before, more in zip(entry, counts)]
    found = [
        StorageForm(form, number, count, weights, size_, scales, note)
        for (form, number, note), (count, weights, size_, scales) in sums.items()
    ]
    for table in manifest.plan.embeddings:
        values, scales = size(f"{table.name}.values"), size(f"{table.name}.scale")
        found.append(StorageForm("table", f"int{table.bits}", 1, table.rows * table.width, values, scales, table.name))
    return tuple(found)


def _dense_files(folder: Path) -> tuple[int, str]:
    """Bytes of all files of a dense model's folder, and the number format that most of its weights have."""
    from safetensors import safe_open

    dtypes: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                count = 1
                for length in part.get_shape():
                    count *= length
                dtypes[part.get_dtype()] += count
    if not dtypes:
        raise FileNotFoundError(f"expected the dense model's *.safetensors in {folder}, found none")
    most = dtypes.most_common(1)[0][0]
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), names.get(most, most)
