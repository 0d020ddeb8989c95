"""An adapter's record as text, for people who want to know what an architecture is made of, or to write a new one."""

from __future__ import annotations

from .record import Adapter, Permutable


def show(adapter: Adapter) -> str:
    """The whole record, one line per entry, patterns as they stand in it."""
    lines = [f"adapter {adapter.name}", f"  serves       {', '.join(adapter.model_types)}"]
    lines += [f"  checked with {adapter.library}", f"  block        {adapter.block}"]
    lines += [f"  GEMMs        {count} in each {kind}" for kind, count in adapter.kinds.items()]
    width = max(len(site.role) for site in adapter.gemms)
    for site in adapter.gemms:
        notes = [
            note for note, there in (("[in, out]", site.layout == "in_out"), ("Q, K and V", site.parts == 3)) if there
        ]
        lines.append(f"    {site.role:<{width}}  {site.pattern}" + (f"  ({', '.join(notes)})" if notes else ""))
    for attention in adapter.attention:
        lines.append(f"  {attention.kind + ' map':<12} {attention.pattern}")
    named = {
        "final": adapter.final_projection,
        "pooler": adapter.pooler,
        "embeddings": adapter.embeddings,
        "activation": adapter.activation,
        "beside it": ", ".join(adapter.beside_activation) or None,
        "left dense": ", ".join(adapter.left_dense) or None,
    }
    lines += [f"  {what:<12} {pattern}" for what, pattern in named.items() if pattern is not None]
    lines += [f"  permutable   {_permutation(entry)}" for entry in adapter.permutable]
    return "\n".join(lines)


def _permutation(entry: Permutable) -> str:
    where = "inside a head" if entry.within == "head" else "freely"
    unless = f", unless {entry.unless} is there" if entry.unless else ""
    return f"columns of {entry.consumer_role} {where}, with the rows of {' and '.join(entry.producer_roles)}{unless}"
