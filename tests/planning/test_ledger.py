"""A compiled program's text, counted: cut down from what XLA makes for H100s, shapes made small."""

from __future__ import annotations

import pytest

from l4jax.planning.ledger import Ledger
from sharding.mesh import MeshSpec

MESH = MeshSpec(sequence=4, tensor=2)
PAIRS = "{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
TENSOR = "replica_groups=mesh['data'=1,'sequence'=4,'expert'=1,'tensor'=2] {'tensor'}"
TEXT = f"""\
HloModule jit_program, is_scheduled=true, entry_computation_layout={{(bf16[8,16]{{1,0}})->f32[]}}

%fused_scores (param_0: bf16[8,16], param_1: bf16[32,16]) -> f32[8,32] {{
  %param_0 = bf16[8,16]{{1,0}} parameter(0)
  %param_1 = bf16[32,16]{{1,0}} parameter(1)
  ROOT %dot.1 = f32[8,32]{{1,0}} dot(%param_0, %param_1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}, metadata={{op_name="p/layer_0/bktgs/dot_general"}}
}}

%experts_body (param.2: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %param.2 = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %x = bf16[8,16]{{1,0}} get-tuple-element(%param.2), index=1
  %dot.2 = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}

%add (x: bf16[], y: bf16[]) -> bf16[] {{
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}}

ENTRY %main (param.0: bf16[8,16], param.1: bf16[32,16]) -> f32[] {{
  %param.0 = bf16[8,16]{{1,0}} parameter(0), metadata={{op_name="leaves"}}
  %param.1 = bf16[32,16]{{1,0}} parameter(1)
  %psum = bf16[8,16]{{1,0}} all-reduce(%param.0), channel_id=1, {TENSOR}, to_apply=%add, metadata={{op_name="p/embed/psum"}}
  %collective-permute-start = ((bf16[2,16]{{1,0}}), bf16[2,16]{{1,0}}) collective-permute-start(%param.1), channel_id=2, source_target_pairs={PAIRS}, metadata={{op_name="p/layer_0/ppermute"}}
  %scores = f32[8,32]{{1,0:T(8,128)}} fusion(%psum, %param.1), kind=kCustom, calls=%fused_scores, metadata={{op_name="p/layer_0/bktgs/dot_general"}}
  %view = f32[8,32]{{1,0}} bitcast(%scores)
  %collective-permute-done = bf16[2,16]{{1,0}} collective-permute-done(%collective-permute-start)
  %again = (f32[8,32]{{1,0}}, /*index=1*/f32[8]{{0}}) fusion(%psum, %param.1), kind=kCustom, calls=%fused_scores
  %tuple = (s32[], bf16[8,16]{{1,0}}) tuple(%zero, %psum)
  %while.1 = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%c, body=%experts_body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %while.2 = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%c, body=%experts_body
  %exchange = bf16[4,8]{{1,0}} all-to-all(%param.0), channel_id=3, replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, dimensions={{0}}
}}
"""  # noqa: E501 - an instruction is a line
SCORES, BODY = 2 * 8 * 32 * 16, 2 * 8 * 8 * 16


def test_matrix_products_are_counted_in_fusions_and_in_loops_of_known_length():
    ledger = Ledger(TEXT, MESH)
    assert ledger.flops() == 2 * SCORES + 3 * BODY
    assert ledger.flops("bktgs") == 2 * SCORES


def test_collectives_have_their_axes_their_bytes_and_what_hides_them():
    psum, transfer, exchange = Ledger(TEXT, MESH).collectives
    assert (psum.kind, psum.scope, psum.axes, psum.ranks, psum.nbytes) == ("all-reduce", "p/embed/psum", ("tensor",), 2, (256,))
    assert (transfer.kind, transfer.axes, transfer.ranks, transfer.nbytes) == ("collective-permute", ("sequence",), 4, (64,))
    assert (exchange.kind, exchange.axes, exchange.ranks, exchange.nbytes) == ("all-to-all", ("sequence",), 4, (64,))
    assert (transfer.flops_meanwhile, transfer.bytes_meanwhile) == (SCORES, 4 * 8 * 32)
    assert [c.flops_meanwhile + c.bytes_meanwhile for c in (psum, exchange)] == [0, 0]


def test_what_a_device_sends():
    psum, transfer, exchange = Ledger(TEXT, MESH).collectives
    assert (psum.sent_bytes, transfer.sent_bytes, exchange.sent_bytes) == (256, 64, 48)


def test_a_form_of_groups_that_is_not_known_is_an_error():
    text = TEXT.replace("replica_groups={{0,2,4,6},{1,3,5,7}}", "replica_groups=[2,4]<=[4,2]T(1,0)")
    with pytest.raises(ValueError, match="exchange has groups of devices in a form that is not known"):
        _ = Ledger(text, MESH).collectives
