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

%fused_psum (param_0.1: bf16[8,16]) -> bf16[8,16] {{
  %param_0.1 = bf16[8,16]{{1,0}} parameter(0)
  ROOT %psum.1 = bf16[8,16]{{1,0}} all-reduce(%param_0.1), channel_id=4, {TENSOR}, to_apply=%add, metadata={{op_name="p/layer_0/psum"}}, backend_config={{"collective_backend_config":{{"backend":"DEFAULT","kernel_strategy":"KERNEL_STRATEGY_TRITON_ONE_SHOT"}}}}
}}

%fused_wide (param_0.2: bf16[64,16]) -> bf16[64,16] {{
  %param_0.2 = bf16[64,16]{{1,0}} parameter(0)
  ROOT %psum.2 = bf16[64,16]{{1,0}} all-reduce(%param_0.2), channel_id=5, {TENSOR}, to_apply=%add, metadata={{op_name="p/layer_1/psum"}}, backend_config={{"collective_backend_config":{{"backend":"DEFAULT","kernel_strategy":"KERNEL_STRATEGY_TRITON_TWO_SHOT"}}}}
}}

ENTRY %main (param.0: bf16[8,16], param.1: bf16[32,16]) -> f32[] {{
  %param.0 = bf16[8,16]{{1,0}} parameter(0), metadata={{op_name="leaves"}}
  %param.1 = bf16[32,16]{{1,0}} parameter(1)
  %psum = bf16[8,16]{{1,0}} all-reduce(%param.0), channel_id=1, {TENSOR}, to_apply=%add, metadata={{op_name="p/embed/psum"}}, backend_config={{"collective_backend_config":{{"backend":"DEFAULT","kernel_strategy":"KERNEL_STRATEGY_DEFAULT"}}}}
  %collective-permute-start = ((bf16[2,16]{{1,0}}), bf16[2,16]{{1,0}}) collective-permute-start(%param.1), channel_id=2, source_target_pairs={PAIRS}, metadata={{op_name="p/layer_0/ppermute"}}
  %scores = f32[8,32]{{1,0:T(8,128)}} fusion(%psum, %param.1), kind=kCustom, calls=%fused_scores, metadata={{op_name="p/layer_0/bktgs/dot_general"}}
  %view = f32[8,32]{{1,0}} bitcast(%scores)
  %mpmd_map.1 = (bf16[4,8]{{1,0}}, bf16[99,16]{{1,0}}, bf16[99,16]{{1,0}}) custom-call(%psum, %pool, %pool), custom_call_target="mosaic_gpu_v2", operand_layout_constraints={{bf16[8,16]{{1,0}}, bf16[99,16]{{1,0}}, bf16[99,16]{{1,0}}}}, output_to_operand_aliasing={{{{1}}: (1, {{}}), {{2}}: (2, {{}})}}, metadata={{op_name="p/layer_0/heads/mpmd_map"}}
  %collective-permute-done = bf16[2,16]{{1,0}} collective-permute-done(%collective-permute-start)
  %again = (f32[8,32]{{1,0}}, /*index=1*/f32[8]{{0}}) fusion(%psum, %param.1), kind=kCustom, calls=%fused_scores
  %tuple = (s32[], bf16[8,16]{{1,0}}) tuple(%zero, %psum)
  %while.1 = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%c, body=%experts_body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %while.2 = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%c, body=%experts_body
  %exchange = bf16[4,8]{{1,0}} all-to-all(%param.0), channel_id=3, replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, dimensions={{0}}
  %fusion-start = ((bf16[8,16]{{1,0}}), bf16[8,16]{{1,0}}) fusion-start(%psum), kind=kCustom, calls=%fused_psum, backend_config={{"fusion_backend_config":{{"kind":"__triton_collective"}}}}
  %meanwhile = f32[8,32]{{1,0}} fusion(%psum, %param.1), kind=kCustom, calls=%fused_scores
  %dot.3 = f32[8,8]{{1,0}} dot(%param.0, %param.0), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
  %fusion-done = bf16[8,16]{{1,0}} fusion-done(%fusion-start), backend_config={{"fusion_backend_config":{{"kind":"__triton_collective"}}}}
  %wide = bf16[64,16]{{1,0}} fusion(%tall), kind=kCustom, calls=%fused_wide, backend_config={{"fusion_backend_config":{{"kind":"__triton_collective"}}}}
  %scattered = bf16[2,16]{{1,0}} reduce-scatter(%param.0), channel_id=6, replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, dimensions={{0}}, to_apply=%add
  %reduce-scatter-start = ((bf16[8,16]{{1,0}}), bf16[4,16]{{1,0}}) reduce-scatter-start(%param.0), channel_id=7, {TENSOR}, dimensions={{0}}, to_apply=%add
  %reduce-scatter-done = bf16[4,16]{{1,0}} reduce-scatter-done(%reduce-scatter-start)
  %alone-start = ((bf16[8,16]{{1,0}}), bf16[8,16]{{1,0}}) all-reduce-start(%param.0), channel_id=10, {TENSOR}, to_apply=%add, metadata={{op_name="p/alone/psum"}}
  %alone-done = bf16[8,16]{{1,0}} all-reduce-done(%alone-start)
  %both-start = ((bf16[8,16]{{1,0}}, f32[8]{{0}}), (bf16[8,16]{{1,0}}, f32[8]{{0}})) all-reduce-start(%param.0, %tall), channel_id=11, {TENSOR}, to_apply=%add, metadata={{op_name="p/both/psum"}}
  %both-done = (bf16[8,16]{{1,0}}, f32[8]{{0}}) all-reduce-done(%both-start)
  %combined-start = (bf16[8,16]{{1,0}}, f32[8]{{0}}) all-reduce-start(%param.0, %tall), channel_id=8, replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, to_apply=%add, metadata={{op_name="p/combined/psum"}}
  %combined-done = (bf16[8,16]{{1,0}}, f32[8]{{0}}) all-reduce-done(%combined-start)
  %gather-start = ((bf16[8,16]{{1,0}}, f32[8]{{0}}), (bf16[16,16]{{1,0}}, f32[16]{{0}})) all-gather-start(%param.0, %tall), channel_id=9, {TENSOR}, dimensions={{0}}, metadata={{op_name="p/combined/gather"}}
  %gather-done = (bf16[16,16]{{1,0}}, f32[16]{{0}}) all-gather-done(%gather-start)
}}
"""  # noqa: E501 - an instruction is a line
SCORES, BODY = 2 * 8 * 32 * 16, 2 * 8 * 8 * 16


def collectives():
    return {collective.scope or collective.kind: collective for collective in Ledger(TEXT, MESH).collectives}


def test_matrix_products_are_counted_in_fusions_and_in_loops_of_known_length():
    ledger = Ledger(TEXT, MESH)
    assert ledger.flops() == 3 * SCORES + 4 * BODY
    assert ledger.flops("bktgs") == 3 * SCORES


def test_collectives_have_their_axes_their_bytes_and_what_hides_them():
    found = collectives()
    psum, transfer, exchange = found["p/embed/psum"], found["p/layer_0/ppermute"], found["all-to-all"]
    assert (psum.kind, psum.scope, psum.axes, psum.ranks, psum.nbytes) == ("all-reduce", "p/embed/psum", ("tensor",), 2, (256,))
    assert (transfer.kind, transfer.axes, transfer.ranks, transfer.nbytes) == ("collective-permute", ("sequence",), 4, (64,))
    assert (exchange.kind, exchange.axes, exchange.ranks, exchange.nbytes) == ("all-to-all", ("sequence",), 4, (64,))
    # Beside the scores, a kernel that writes [4, 8] numbers, and some more in place.
    assert (transfer.flops_meanwhile, transfer.bytes_meanwhile) == (SCORES, 4 * 8 * 32 + 2 * 4 * 8)
    assert [c.flops_meanwhile + c.bytes_meanwhile for c in (psum, exchange)] == [0, 0]
    assert {c.strategy for c in (psum, transfer, exchange)} == {"NCCL"}


LOOP = f"""\
HloModule jit_program, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {{
  ROOT %sum = bf16[] add(%x, %y)
}}

%fused_product (param_0.3: bf16[8,16], param_1.3: bf16[32,16]) -> bf16[8,32] {{
  %param_0.3 = bf16[8,16]{{1,0}} parameter(0)
  %param_1.3 = bf16[32,16]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[8,32]{{1,0}} dot(%param_0.3, %param_1.3), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}

%fused_row (param_0.4: bf16[99,16], param_1.4: s32[1]) -> (bf16[1,16], s32[1]) {{
  %param_0.4 = bf16[99,16]{{1,0}} parameter(0)
  %param_1.4 = s32[1]{{0}} parameter(1)
  %flat = bf16[99,16]{{1,0}} bitcast(%param_0.4)
  %row = bf16[1,16]{{1,0}} dynamic-slice(%flat, %param_1.4), dynamic_slice_sizes={{1,16}}
  ROOT %rows = (bf16[1,16]{{1,0}}, s32[1]{{0}}) tuple(%row, %param_1.4)
}}

%fused_update (param_0.5: s32[32,8], param_1.5: s32[1,8], param_2.5: s32[]) -> s32[32,8] {{
  %param_0.5 = s32[32,8]{{1,0}} parameter(0)
  %param_1.5 = s32[1,8]{{1,0}} parameter(1)
  %param_2.5 = s32[] parameter(2)
  %changed = s32[32,8]{{1,0}} dynamic-update-slice(%param_0.5, %param_1.5, %param_2.5)
  ROOT %whole = s32[32,8]{{1,0}} bitcast(%changed)
}}

%fused_psum (param_0.1: bf16[8,16]) -> bf16[8,16] {{
  %param_0.1 = bf16[8,16]{{1,0}} parameter(0)
  ROOT %psum.1 = bf16[8,16]{{1,0}} all-reduce(%param_0.1), channel_id=4, {TENSOR}, to_apply=%add, metadata={{op_name="p/layer_0/psum"}}, backend_config={{"collective_backend_config":{{"kernel_strategy":"KERNEL_STRATEGY_TRITON_ONE_SHOT"}}}}
}}

%inner_body (param.4: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %copy.1 = bf16[8,16]{{1,0}} copy(%x.1), metadata={{op_name="p/draft/layer_1/copy"}}
  %x.1 = bf16[8,16]{{1,0}} get-tuple-element(%param.4), index=1
}}

%inner_condition (param.5: (s32[], bf16[8,16])) -> pred[] {{
  ROOT %less = pred[] compare(%a, %b), direction=LT
}}

%taken (param.6: bf16[8,16]) -> bf16[8,16] {{
  ROOT %copy.2 = bf16[8,16]{{1,0}} copy(%param.6)
}}

%body (param.2: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %param.2 = (s32[], bf16[8,16]{{1,0}}, bf16[32,16]{{1,0}}) parameter(0)
  %x = bf16[8,16]{{1,0}} get-tuple-element(%param.2), index=1
  %w = bf16[32,16]{{1,0}} get-tuple-element(%param.2), index=2
  %pool = bf16[99,16]{{1,0}} get-tuple-element(%param.2), index=3
  %one = s32[1]{{0}} get-tuple-element(%param.2), index=4
  %out = s32[32,8]{{1,0}} get-tuple-element(%param.2), index=5
  %new = s32[1,8]{{1,0}} get-tuple-element(%param.2), index=6
  %at = s32[] get-tuple-element(%param.2), index=7
  %mpmd_map.1 = (bf16[4,8]{{1,0}}, bf16[99,16]{{1,0}}) custom-call(%x, %pool), custom_call_target="mosaic_gpu_v2", operand_layout_constraints={{bf16[8,16]{{1,0}}, bf16[99,16]{{1,0}}}}, output_to_operand_aliasing={{{{1}}: (1, {{}})}}, metadata={{op_name="p/verify/layer_0/heads/mpmd_map"}}
  %product = bf16[8,32]{{1,0}} fusion(%x, %w), kind=kCustom, calls=%fused_product
  %row_fusion = (bf16[1,16]{{1,0}}, s32[1]{{0}}) fusion(%pool, %one), kind=kLoop, calls=%fused_row, metadata={{op_name="p/embed/gather"}}
  %fusion-start = ((bf16[8,16]{{1,0}}), bf16[8,16]{{1,0}}) fusion-start(%x), kind=kCustom, calls=%fused_psum, metadata={{op_name="p/layer_1/psum"}}
  %fusion-done = bf16[8,16]{{1,0}} fusion-done(%fusion-start)
  %inner = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%inner_condition, body=%inner_body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %branch = bf16[8,16]{{1,0}} conditional(%p, %x, %x), true_computation=%taken, false_computation=%taken
  %update = s32[32,8]{{1,0}} fusion(%out, %new, %at), kind=kLoop, calls=%fused_update, metadata={{op_name="p/write"}}
}}

%condition (param.3: (s32[], bf16[8,16])) -> pred[] {{
  %param.3 = (s32[], pred[4]{{0}}) parameter(0)
  %done = pred[4]{{0}} get-tuple-element(%param.3), index=1
  ROOT %copy.3 = pred[4]{{0}} copy(%done)
}}

ENTRY %main (param.0: bf16[8,16]) -> bf16[8,16] {{
  %before = bf16[8,16]{{1,0}} copy(%param.0)
  %while.1 = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%inner_condition, body=%inner_body
  %while.2 = (s32[], bf16[8,16]{{1,0}}) while(%tuple), condition=%condition, body=%body
}}
"""  # noqa: E501 - an instruction is a line


def test_an_iteration_of_the_largest_loop_is_listed_in_the_order_of_the_schedule():
    """With its condition and three iterations of the loop within, without branches and what is outside."""
    launches = Ledger(LOOP, MESH).iteration
    assert [launch.name for launch in launches] == [
        "mpmd_map.1", "product", "row_fusion", "fusion-start", "copy.1", "copy.1", "copy.1", "update", "copy.3",
    ]  # fmt: skip
    # A product that XLA split has no scope: it counts to the layer of the launch before it. A drafter's layer is not one of the model's.
    assert [launch.layer for launch in launches] == [0, 0, None, 1, None, None, None, None, None]
    assert [launch.kernel for launch in launches if launch.kernel] == ["heads"]
    assert [launch.collective.strategy for launch in launches if launch.collective] == ["one-shot"]


def test_bytes_of_a_launch_leave_out_what_is_sliced_away_or_changed_in_place():
    found = {launch.name: launch for launch in Ledger(LOOP, MESH).iteration}
    nbytes = {name: (launch.operand_bytes, launch.written_bytes) for name, launch in found.items()}
    assert nbytes["product"] == ((2 * 8 * 16, 2 * 32 * 16), 2 * 8 * 32)
    assert nbytes["row_fusion"] == ((2 * 16, 4), 2 * 16 + 4)
    assert nbytes["update"] == ((0, 4 * 8, 4), 4 * 8)
    assert nbytes["copy.3"] == ((4,), 4)
    assert (nbytes["mpmd_map.1"][1], found["mpmd_map.1"].operand_shapes) == (2 * 4 * 8, ((8, 16), (99, 16)))
    assert {name: launch.flops for name, launch in found.items() if launch.flops} == {"product": 2 * 8 * 32 * 16}


def test_a_program_without_a_loop_has_no_iteration():
    with pytest.raises(ValueError, match="the program has no loop; expected one of decoding or speculation"):
        _ = Ledger(TEXT[: TEXT.index("ENTRY")] + "ENTRY %main (x: f32[]) -> f32[] {\n}\n", MESH).iteration


def test_a_sum_inside_a_kernel_is_a_collective_hidden_by_what_its_caller_does_meanwhile():
    one_shot, two_shot = collectives()["p/layer_0/psum"], collectives()["p/layer_1/psum"]
    assert (one_shot.kind, one_shot.strategy, one_shot.axes, one_shot.nbytes) == ("all-reduce", "one-shot", ("tensor",), (256,))
    assert (one_shot.flops_meanwhile, one_shot.bytes_meanwhile) == (SCORES + BODY, 4 * 8 * 32)
    assert (two_shot.kind, two_shot.strategy, two_shot.axes, two_shot.nbytes) == ("all-reduce", "two-shot", ("tensor",), (2048,))
    assert (two_shot.flops_meanwhile, two_shot.bytes_meanwhile) == (0, 0)


def test_what_a_device_sends():
    found = collectives()
    psum, transfer, exchange = found["p/embed/psum"], found["p/layer_0/ppermute"], found["all-to-all"]
    assert (psum.sent_bytes, transfer.sent_bytes, exchange.sent_bytes) == (256, 64, 48)


def test_a_reduce_scatter_sends_every_other_ranks_share():
    """Its result is a rank's own share of the sum: 64 bytes of 256 with three others, 128 bytes with one."""
    scatters = [collective for collective in Ledger(TEXT, MESH).collectives if collective.kind == "reduce-scatter"]
    assert [(c.axes, c.ranks, c.nbytes, c.sent_bytes) for c in scatters] == [
        (("sequence",), 4, (64,), 3 * 64),
        (("tensor",), 2, (128,), 128),
    ]


def test_a_one_shot_sum_sends_its_whole_array_to_every_other_rank():
    """To seven others, 256 bytes each; in two shots, and by NCCL, an eighth of it twice."""
    eight = MeshSpec(tensor=8)
    of = {c.scope: (c.ranks, c.sent_bytes) for c in Ledger(TEXT.replace(TENSOR, "replica_groups={{0,1,2,3,4,5,6,7}}"), eight).collectives}
    assert of["p/layer_0/psum"] == (8, 7 * 256)
    assert of["p/layer_1/psum"] == (8, 2 * 7 * 2048 // 8)
    assert of["p/embed/psum"] == (8, 2 * 7 * 256 // 8)


def test_what_starts_together_is_counted_once():
    """A start is a tuple of operands and results; XLA also writes starts of sums as a tuple of results only."""
    found = collectives()
    nbytes = {scope: found[f"p/{scope}"].nbytes for scope in ("alone/psum", "both/psum", "combined/psum", "combined/gather")}
    assert nbytes == {"alone/psum": (256,), "both/psum": (256, 32), "combined/psum": (256, 32), "combined/gather": (512, 64)}
    assert (found["p/combined/psum"].sent_bytes, found["p/combined/gather"].sent_bytes) == (2 * 288 * 3 // 4, 576 // 2)


def test_a_form_of_groups_that_is_not_known_is_an_error():
    text = TEXT.replace("channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}", "channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0)")
    with pytest.raises(ValueError, match="exchange has groups of devices in an unknown form"):
        _ = Ledger(text, MESH).collectives
