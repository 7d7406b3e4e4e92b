"""Reading an optimised program: what runs, how often, and where it comes from."""

import pytest

from flax_asr.estimate import hlo

HEAD = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/flax_asr/step.py"
2 "/somewhere/flax_asr/ctc.py"

FunctionNames
1 "accumulate"
2 "ctc_loss"

FileLocations
1 {file_name_id=1 function_name_id=1 line=172 end_line=172 column=24 end_column=24}
2 {file_name_id=2 function_name_id=2 line=30 end_line=31 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

"""


def cycles(number: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


def entry(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{before}ENTRY %main.1_spmd (p.1: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def computation(name: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p.1: f32[8]) -> f32[8] {{\n{body}\n}}\n\n"


def total(text: str) -> int:
    return sum((o.cycles or 0) * o.times for o in hlo.operations(text))


P = "%p.1 = f32[8]{0:T(128)} parameter(0)"


def test_estimates_of_the_entry_add_up_and_those_inside_fusions_do_not():
    inside = computation("fused.1", P, f"ROOT %a = f32[8]{{0}} add(%p.1, %p.1), {cycles(1000)}")
    text = entry(
        P,
        f"%f.1 = f32[8]{{0:T(128)S(1)}} fusion(%p.1), kind=kLoop, calls=%fused.1, {cycles(5)}",
        f"ROOT %b = (f32[8]{{0}}, s32[]{{:T(128)}}) broadcast(%f.1), {cycles(7)}",
        before=inside,
    )
    assert total(text) == 12


def test_a_loop_counts_as_often_as_it_runs():
    body = computation("body.1", P, f"ROOT %n = f32[8]{{0}} negate(%p.1), {cycles(10)}")
    until_96 = computation(
        "until.1",
        P,
        "%c.1 = s32[]{:T(128)} constant(96)",
        "%i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0",
        "ROOT %lt = pred[]{:T(512)} compare(%i.1, %c.1), direction=LT",
    )
    open_ended = computation("until.1", P, "ROOT %lt = pred[] custom(%p.1)")
    loop = "ROOT %w = f32[8]{0} while(%p.1), condition=%until.1, body=%body.1"
    assert total(entry(P, loop, before=body + until_96)) == 960
    assert total(entry(P, loop, before=body + open_ended)) == 10
    stated = loop + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert total(entry(P, stated, before=body + open_ended)) == 70


def test_loops_inside_loops_multiply():
    inner = computation("inner.1", P, f"ROOT %n = f32[8]{{0}} negate(%p.1), {cycles(3)}")
    condition = computation("any.1", P)
    trips = 'backend_config={"known_trip_count":{"n":"5"}}'
    loop = "ROOT %w = f32[8]{0} while(%p.1), condition=%any.1, body=%"
    outer = computation("outer.1", P, f"{loop}inner.1, {trips}")
    assert total(entry(P, f"{loop}outer.1, {trips}", before=inner + condition + outer)) == 75


def test_of_a_choice_the_branch_with_the_most_cycles_counts():
    branches = "".join(
        computation(f"branch.{n}", P, f"ROOT %n = f32[8]{{0}} negate(%p.1), {cycles(n)}")
        for n in (3, 11)
    )
    for choice in (
        "branch_computations={%branch.3, %branch.11}",
        "true_computation=%branch.11, false_computation=%branch.3",
    ):
        line = f"ROOT %c = f32[8]{{0}} conditional(%p.1, %p.1, %p.1), {choice}"
        assert total(entry(P, line, before=branches)) == 11


def test_collectives_and_custom_calls_come_out_with_their_bytes():
    text = entry(
        P,
        "%q.1 = bf16[4,16]{1,0} parameter(1)",
        "%r.1 = f32[8]{0} all-reduce(%p.1), replica_groups={{0,1,2,3}}, to_apply=%sum",
        "%g.1 = f32[64]{0} all-gather(%p.1), replica_groups=[2,8]<=[16], dimensions={0}",
        "%k.1 = (f32[8]{0}, /*index=1*/pred[8]{0}) custom-call(%p.1, %q.1),"
        ' custom_call_target="tpu_custom_call",'
        ' backend_config={"cost_estimate":{"flops":"1200","bytes_accessed":"9"}}',
        '%a.1 = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"',
        "ROOT %s.1 = f32[8]{0} sort(%p.1), dimensions={0}",
    )
    reduce, gather, kernel, sort = hlo.operations(text)
    assert (reduce.is_collective, reduce.group, reduce.result_bytes) == (True, 4, 32)
    assert (gather.is_collective, gather.group, gather.operand_bytes) == (True, 8, 32)
    assert gather.result_bytes == 256
    assert (kernel.target, kernel.flops, kernel.cycles) == ("tpu_custom_call", 1200, None)
    assert (kernel.operand_bytes, kernel.result_bytes) == (32 + 128, 32 + 8)
    assert (sort.kind, sort.cycles) == ("sort", None)


def test_a_collective_inside_a_fusion_is_found():
    inside = computation(
        "fused.1", P, "ROOT %r = f32[8]{0} all-reduce(%p.1), replica_groups={{0,1}}"
    )
    line = "ROOT %f = f32[8]{0} fusion(%p.1), kind=kCustom, calls=%fused.1"
    (found,) = hlo.operations(entry(P, line, before=inside))
    assert (found.kind, found.group) == ("all-reduce", 2)


STEP = "jit(_fun)/shard_map/transpose(jvp(Wav2Vec2ForCTCModule))/wav2vec2/"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (STEP + "feature_extractor/conv_layers/0/layer_norm/mul", "feature encoder"),
        (STEP + "feature_projection/layer_norm/mul", "feature projection"),
        (STEP + "encoder/pos_conv_embed/conv/cond/branch_0_fun/conv", "positional convolution"),
        (STEP + "encoder/layers/3/attention/q_proj/dot_general", "attention projections"),
        (STEP + "encoder/layers/3/attention/bqhd,bkhd->bhqk/dot_general", "attention"),
        (STEP + "encoder/layers/cond/branch_1_fun/0.run/0/feed_forward/add", "feed-forward"),
        (STEP + "encoder/layers/3/final_layer_norm/mul", "layer norms"),
        ("jit(_fun)/shard_map/jvp(Wav2Vec2ForCTCModule)/lm_head/dot_general", "head"),
        ("jit(_fun)/shard_map/jvp()/while", "CTC"),
    ],
)
def test_an_operation_is_filed_under_its_module(path, expected):
    frame = 2 if expected == "CTC" else 1
    line = f'ROOT %a = f32[8]{{0}} add(%p.1), metadata={{op_name="{path}" stack_frame_id={frame}}}'
    (found,) = hlo.operations(entry(P, f"{line}, {cycles(1)}"))
    assert hlo.part(found) == expected


def test_what_comes_from_nowhere_known_is_said_to_be_other():
    (found,) = hlo.operations(entry(P, f"ROOT %a = f32[8]{{0}} add(%p.1), {cycles(1)}"))
    assert (hlo.part(found), hlo.part(found, "optimiser")) == ("other", "optimiser")
    reduce = hlo.Operation("all-reduce-start", STEP + "encoder/layers/0/attention/psum")
    assert hlo.part(reduce) == "collectives"


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.operations("module @jit_step {}")
