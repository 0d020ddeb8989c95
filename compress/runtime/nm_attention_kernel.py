"""The Triton kernels of N:M attention maps: online softmax with the selection inside (ALGORITHMS C.3), forward only.

Per row of queries, over tiles of keys that hold whole groups: m' = max(m, max S); p = exp(S - m'); c = exp(m - m');
l = l c + sum p over all valid keys; o = o c + (p keep) V over the kept ones; O = o / l at the end.

Two ways of selecting. Up to M = 8 the members of a group lie in M separate tiles, each the product of the queries with
every M-th key, so that a group stands at one place of M tensors and its ranking is arithmetic inside a thread, without
any shuffle. Larger groups lie side by side in one tile and are searched N (or M - N) times for their best (worst).

This module imports Triton; ``nm_attention.py`` imports it when it is first needed. Legend: Q queries, K keys, D head
dimension, E value dimension, g group in a tile, M group size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in float32. ``WIDEN``: Triton's interpreter multiplies the bits of bfloat16 as integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _valid_and_bias(
    mask_ptr, query_Q, key_K, queries, keys, offset, threshold, stride_mq, stride_mk,
    MASK: tl.constexpr, PER_QUERY: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Which (query, key) pairs count, and what is added to their scores. ``offset``: keys - queries."""
    inside_K = (key_K >= 0) & (key_K < keys)
    valid = inside_K[None, :]
    if CAUSAL:
        valid = valid & (key_K[None, :] <= query_Q[:, None] + offset)
    bias = 0.0
    if MASK != 0:
        if PER_QUERY:
            where = query_Q[:, None].to(tl.int64) * stride_mq + key_K[None, :] * stride_mk
            value = tl.load(mask_ptr + where, mask=(query_Q[:, None] < queries) & inside_K[None, :], other=0)
        else:
            value = tl.load(mask_ptr + key_K * stride_mk, mask=inside_K, other=0)[None, :]
        if MASK == 1:
            valid = valid & (value != 0)
        else:
            bias = value.to(tl.float32)
            valid = valid & (bias > threshold)
    return valid, bias


@triton.jit
def nm_attention_small(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr,
    stride_qb, stride_qh, stride_qq, stride_qd,
    stride_kb, stride_kh, stride_kk, stride_kd,
    stride_vb, stride_vh, stride_vk, stride_ve,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ob, stride_oh, stride_oq, stride_oe,
    heads, heads_per_group, queries, keys, width, value_width, shift, scale, threshold,
    N: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr, PER_QUERY: tl.constexpr, CAUSAL: tl.constexpr,
    RENORMALIZE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """M of 2, 4 or 8. ``shift``: keys of the first group that lie before key 0 (a cache that dropped some)."""
    tiles = (queries + BLOCK_Q - 1) // BLOCK_Q
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + (head // heads_per_group) * stride_kh
    v_ptr += batch * stride_vb + (head // heads_per_group) * stride_vh
    mask_ptr += batch * stride_mb + head * stride_mh
    out_ptr += batch * stride_ob + head * stride_oh
    query_Q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    group_g = tl.arange(0, BLOCK_G)
    d_D = tl.arange(0, BLOCK_D)
    e_E = tl.arange(0, BLOCK_E)
    in_Q, in_D, in_E = query_Q < queries, d_D < width, e_E < value_width
    q_QD = tl.load(
        q_ptr + query_Q[:, None].to(tl.int64) * stride_qq + d_D[None, :] * stride_qd,
        mask=in_Q[:, None] & in_D[None, :], other=0.0,
    )  # fmt: skip
    largest_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total_Q = tl.zeros([BLOCK_Q], tl.float32)
    out_QE = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    offset = keys - queries
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile + 1) * BLOCK_Q + offset)
    for start in range(-shift, end, BLOCK_G * M):
        scores = ()
        for j in tl.static_range(M):
            key_g = start + group_g * M + j
            inside_g = (key_g >= 0) & (key_g < keys)
            k_Dg = tl.load(
                k_ptr + key_g[None, :].to(tl.int64) * stride_kk + d_D[:, None] * stride_kd,
                mask=in_D[:, None] & inside_g[None, :], other=0.0,
            )  # fmt: skip
            valid, bias = _valid_and_bias(
                mask_ptr, query_Q, key_g, queries, keys, offset, threshold, stride_mq, stride_mk,
                MASK, PER_QUERY, CAUSAL,
            )  # fmt: skip
            score_Qg = _product(q_QD, k_Dg, PRECISION, WIDEN) * scale + bias
            scores = scores + (tl.where(valid, score_Qg, float("-inf")),)  # noqa: RUF005 (Triton knows no unpacking)
        highest_Qg = scores[0]
        for j in tl.static_range(1, M):
            highest_Qg = tl.maximum(highest_Qg, scores[j])
        new_Q = tl.maximum(largest_Q, tl.max(highest_Qg, 1))
        # Where nothing was valid yet everything is -inf: any finite number makes exp() give 0 instead of NaN.
        level_Q = tl.where(new_Q == float("-inf"), 0.0, new_Q)
        fade_Q = tl.exp(largest_Q - level_Q)
        out_QE *= fade_Q[:, None]
        sum_Qg = tl.zeros([BLOCK_Q, BLOCK_G], tl.float32)
        for j in tl.static_range(M):
            before_Qg = tl.zeros([BLOCK_Q, BLOCK_G], tl.int32)  # members that go before j: larger, or equal and lower
            for i in tl.static_range(M):
                if i < j:
                    before_Qg += (scores[i] >= scores[j]).to(tl.int32)
                elif i > j:
                    before_Qg += (scores[i] > scores[j]).to(tl.int32)
            p_Qg = tl.exp(scores[j] - level_Q[:, None])
            kept_Qg = tl.where(before_Qg < N, p_Qg, 0.0)
            sum_Qg += kept_Qg if RENORMALIZE else p_Qg
            key_g = start + group_g * M + j
            inside_g = (key_g >= 0) & (key_g < keys)
            v_gE = tl.load(
                v_ptr + key_g[:, None].to(tl.int64) * stride_vk + e_E[None, :] * stride_ve,
                mask=inside_g[:, None] & in_E[None, :], other=0.0,
            )  # fmt: skip
            out_QE += _product(kept_Qg.to(v_gE.dtype), v_gE, PRECISION, WIDEN)
        total_Q = total_Q * fade_Q + tl.sum(sum_Qg, 1)
        largest_Q = new_Q
    out_QE = out_QE / tl.where(total_Q == 0.0, 1.0, total_Q)[:, None]
    tl.store(
        out_ptr + query_Q[:, None].to(tl.int64) * stride_oq + e_E[None, :] * stride_oe,
        out_QE.to(out_ptr.dtype.element_ty), mask=in_Q[:, None] & in_E[None, :],
    )  # fmt: skip


@triton.jit
def _keep_by_search(score_QgM, N: tl.constexpr, M: tl.constexpr):
    """The N largest of the last axis, equal ones by lower index. Takes the best N times, or drops the worst."""
    member_M = tl.arange(0, M)[None, None, :]
    if 2 * N <= M:
        keep_QgM = score_QgM != score_QgM  # nowhere
        for _ in range(N):
            best_Qg = tl.max(score_QgM, 2)
            first_Qg = tl.min(tl.where(score_QgM == best_Qg[:, :, None], member_M, M), 2)
            hit_QgM = member_M == first_Qg[:, :, None]
            keep_QgM = keep_QgM | hit_QgM
            score_QgM = tl.where(hit_QgM, float("-inf"), score_QgM)
    else:
        keep_QgM = score_QgM == score_QgM  # everywhere
        for _ in range(M - N):
            worst_Qg = tl.min(score_QgM, 2)
            last_Qg = tl.max(tl.where(score_QgM == worst_Qg[:, :, None], member_M, -1), 2)
            hit_QgM = member_M == last_Qg[:, :, None]
            keep_QgM = keep_QgM & (member_M != last_Qg[:, :, None])
            score_QgM = tl.where(hit_QgM, float("inf"), score_QgM)
    return keep_QgM


@triton.jit
def nm_attention_large(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr,
    stride_qb, stride_qh, stride_qq, stride_qd,
    stride_kb, stride_kh, stride_kk, stride_kd,
    stride_vb, stride_vh, stride_vk, stride_ve,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ob, stride_oh, stride_oq, stride_oe,
    heads, heads_per_group, queries, keys, width, value_width, shift, scale, threshold,
    N: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr, PER_QUERY: tl.constexpr, CAUSAL: tl.constexpr,
    RENORMALIZE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """M of 16 to 256: BLOCK_G whole groups side by side in a tile."""
    tiles = (queries + BLOCK_Q - 1) // BLOCK_Q
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + (head // heads_per_group) * stride_kh
    v_ptr += batch * stride_vb + (head // heads_per_group) * stride_vh
    mask_ptr += batch * stride_mb + head * stride_mh
    out_ptr += batch * stride_ob + head * stride_oh
    query_Q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d_D = tl.arange(0, BLOCK_D)
    e_E = tl.arange(0, BLOCK_E)
    in_Q, in_D, in_E = query_Q < queries, d_D < width, e_E < value_width
    q_QD = tl.load(
        q_ptr + query_Q[:, None].to(tl.int64) * stride_qq + d_D[None, :] * stride_qd,
        mask=in_Q[:, None] & in_D[None, :], other=0.0,
    )  # fmt: skip
    largest_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total_Q = tl.zeros([BLOCK_Q], tl.float32)
    out_QE = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    offset = keys - queries
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile + 1) * BLOCK_Q + offset)
    for start in range(-shift, end, BLOCK_G * M):
        key_K = start + tl.arange(0, BLOCK_G * M)
        inside_K = (key_K >= 0) & (key_K < keys)
        k_DK = tl.load(
            k_ptr + key_K[None, :].to(tl.int64) * stride_kk + d_D[:, None] * stride_kd,
            mask=in_D[:, None] & inside_K[None, :], other=0.0,
        )  # fmt: skip
        valid, bias = _valid_and_bias(
            mask_ptr, query_Q, key_K, queries, keys, offset, threshold, stride_mq, stride_mk, MASK, PER_QUERY, CAUSAL,
        )  # fmt: skip
        score_QK = _product(q_QD, k_DK, PRECISION, WIDEN) * scale + bias
        score_QK = tl.where(valid, score_QK, float("-inf"))
        new_Q = tl.maximum(largest_Q, tl.max(score_QK, 1))
        level_Q = tl.where(new_Q == float("-inf"), 0.0, new_Q)
        fade_Q = tl.exp(largest_Q - level_Q)
        keep_QgM = _keep_by_search(tl.reshape(score_QK, (BLOCK_Q, BLOCK_G, M)), N, M)
        p_QK = tl.exp(score_QK - level_Q[:, None])
        kept_QK = tl.where(tl.reshape(keep_QgM, (BLOCK_Q, BLOCK_G * M)), p_QK, 0.0)
        v_KE = tl.load(
            v_ptr + key_K[:, None].to(tl.int64) * stride_vk + e_E[None, :] * stride_ve,
            mask=inside_K[:, None] & in_E[None, :], other=0.0,
        )  # fmt: skip
        out_QE = out_QE * fade_Q[:, None] + _product(kept_QK.to(v_KE.dtype), v_KE, PRECISION, WIDEN)
        total_Q = total_Q * fade_Q + tl.sum(kept_QK if RENORMALIZE else p_QK, 1)
        largest_Q = new_Q
    out_QE = out_QE / tl.where(total_Q == 0.0, 1.0, total_Q)[:, None]
    tl.store(
        out_ptr + query_Q[:, None].to(tl.int64) * stride_oq + e_E[None, :] * stride_oe,
        out_QE.to(out_ptr.dtype.element_ty), mask=in_Q[:, None] & in_E[None, :],
    )  # fmt: skip
